"""What a decoder is, and its fused graph: shapes, weights, and each matmul in each of its forms."""
