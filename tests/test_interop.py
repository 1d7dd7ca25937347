"""A client in another language, made from the protos alone, understands the protocol, health and reflection.

Runs against a scripted daemon; HEARTH_INTEROP_ADDRESS (with HEARTH_CA and HEARTH_TOKEN_FILE) names a real one instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

import grpc_js
import scripted_daemon as peer
from hearth.v1 import chat_pb2
from tls_files import make_tls_files

pytestmark = [
    pytest.mark.network,
    pytest.mark.skipif(bool(grpc_js.missing()), reason=grpc_js.missing() or "-"),
]
NAMED = os.environ.get("HEARTH_INTEROP_ADDRESS", "")
SERVICES = {
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
    "hearth.v1.ChatService",
    "hearth.v1.ModelService",
    "hearth.v1.StatusService",
}


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    grpc_js.install()


@pytest.fixture(params=["tcp", "unix", "tls"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, object]]:
    if request.param == "tls":
        files = make_tls_files(tmp_path)
        (tmp_path / "token").write_text("s3cret\n")
        credentials = grpc.ssl_server_credentials([(files.key.read_bytes(), files.certificate.read_bytes())])
        with peer.ScriptedDaemon(credentials=credentials, token="s3cret") as daemon:
            yield {"address": daemon.address, "ca": files.ca, "token_file": tmp_path / "token"}
    else:
        address = f"unix://{tmp_path}/hearthd.sock" if request.param == "unix" else "127.0.0.1:0"
        with peer.ScriptedDaemon(address=address) as daemon:
            yield {"address": daemon.address}


def test_a_client_in_javascript(target: dict[str, object]) -> None:
    printed = grpc_js.call(**target)  # type: ignore[arg-type]
    assert printed["chat"]["text"] == "Hello, world"
    assert printed["chat"]["deltas"] == 2
    assert printed["chat"]["final"]["finish_reason"] == "FINISH_REASON_END_OF_TURN"
    assert printed["chat"]["final"]["usage"] == {
        "prompt_tokens": 10,
        "cached_prompt_tokens": 4,
        "completion_tokens": 3,
        "drafted_tokens": 0,
        "accepted_tokens": 0,
    }
    assert [model["name"] for model in printed["models"]] == ["tiny", "other"]
    assert printed["models"][0]["parameter_count"] == 134_515_008
    assert (printed["health"], printed["chat_health"]) == ("SERVING", "SERVING")
    assert set(printed["services"]) == SERVICES
    assert (printed["status"]["state"], printed["status"]["uptime_ms"]) == ("DAEMON_STATE_SERVING", 93_784_500)


def check_real_daemon(address: str, **files: Path) -> None:
    """What holds for any daemon that serves; `files` as for `grpc_js.call`. For tests with the real one too."""
    printed = grpc_js.call(address, **files)
    assert printed["chat"]["text"]
    assert printed["chat"]["final"]["finish_reason"] in chat_pb2.FinishReason.keys()[1:]
    assert printed["chat"]["final"]["request_id"] == "interop-1"
    assert printed["models"]
    assert (printed["health"], printed["chat_health"]) == ("SERVING", "SERVING")
    assert set(printed["services"]) >= SERVICES
    assert printed["status"]["state"] == "DAEMON_STATE_SERVING"


if NAMED:

    def test_a_client_in_javascript_against_a_named_daemon() -> None:
        files = {"ca": os.environ.get("HEARTH_CA"), "token_file": os.environ.get("HEARTH_TOKEN_FILE")}
        check_real_daemon(NAMED, **{name: Path(file) for name, file in files.items() if file})
