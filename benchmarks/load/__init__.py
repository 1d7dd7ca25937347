"""A load generator for a Hearth daemon: who asks when and what, what came back, and which targets that meets.

Called by `../serve.py`. Takes nothing from the daemon's own process but what it says over gRPC and what the kernel says
of it; only `engine_worker` and `hearth_server` know how one is started.
"""
