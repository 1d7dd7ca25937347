"""The Hearth daemon: loads a bundle, decodes on ONNX Runtime, serves chats over gRPC.

Imports run one way: __main__ -> server -> service -> worker -> engine -> {runner, kv_cache, sampling, tokenizer} ->
bundle. `build` imports nothing of the serving side but `bundle`.
"""

import os

# Before anything here can import ONNX Runtime: as soon as it is loaded, its wheels (1.31.1) look up Microsoft's
# collector of events, start threads that send to it, and keep a database and a device id below ~/.cache.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
