"""Token ids and KV in, logits out: everything that knows ONNX Runtime, and the memory that it works on."""
