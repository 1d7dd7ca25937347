"""gRPC, loaded so that it finds .local names, which most boards go by. The only place that imports it.

gRPC's own resolver asks DNS servers only; the system's (GRPC_DNS_RESOLVER=native) asks multicast DNS too. gRPC reads
that variable once, when it is imported, for the whole process: so it is set here, before any channel and whatever its
address, unless the program set it itself or imported gRPC earlier. Called by `_channel`, `_client`, `_async_client`.
"""

import os
import sys

if "grpc" not in sys.modules:
    os.environ.setdefault("GRPC_DNS_RESOLVER", "native")

import grpc
from grpc import aio

__all__ = ["aio", "grpc"]
