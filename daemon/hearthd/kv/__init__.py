"""What KV there may be, what of it is worth keeping, and what outlives a restart.

`kv_cache` is the door: the engine asks nothing else. The memory itself is `kv_buffers`, which `runner` owns.
"""
