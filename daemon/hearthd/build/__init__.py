"""Checkpoint -> float32 weights by module path -> fused graph -> int8 -> verified bundle. Needs no torch.

Imports nothing of the serving side but `bundle`.
"""
