"""Checkpoints of every kind, read as one: names and keys of Hugging Face, float32 weights a tensor at a time."""
