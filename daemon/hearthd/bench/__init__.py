"""`hearthd bench`: how fast a model runs on this machine, and what the machine would allow.

`cli` is what `__main__` takes of it. `benchmarks/` compares with other engines, by the same `measure`.
"""
