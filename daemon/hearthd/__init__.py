"""The Hearth daemon: loads a bundle, decodes on ONNX Runtime, serves chats over gRPC.

Imports run one way: __main__ -> server -> service -> worker -> engine -> {runner, kv_cache, sampling, tokenizer} ->
bundle. `build` imports nothing of the serving side but `bundle`.
"""
