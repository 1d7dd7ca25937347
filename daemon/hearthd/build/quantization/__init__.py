"""Which int8 for which matmul, found by measurement, and how faithful the result is."""
