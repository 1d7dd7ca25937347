"""Tokens for many sequences at once: the engine's `step`, and the parts that it is made of."""
