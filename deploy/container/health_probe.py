"""Ask the daemon beside this whether it serves, by grpc.health.v1 on its Unix socket; 0 if it does, else 1.

The container's HEALTHCHECK. It needs no token there, and knows nothing of the configuration but where the socket is.
"""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

ADDRESS = "unix:///run/hearth/hearthd.sock"
SECONDS = 4


def main(address: str = ADDRESS) -> int:
    """Return the exit code; a reason goes to standard error."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        except grpc.RpcError as error:
            print(f"health: {error.code().name}", file=sys.stderr)
            return 1
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    print(f"health: {status}", file=sys.stderr)
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
