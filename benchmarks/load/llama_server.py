"""llama-cpp-python's own server, in the environment and with the weights that `make bench` has made for its engine.

Called by the scenario `peer`. Knows its options, and nothing of chats.
"""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from pathlib import Path

from load.server_process import ServerError, ServerProcess, free_port

_READY_SECONDS = 120.0
_LOOK_SECONDS = 0.2


class LlamaServer(ServerProcess):
    """`python -m llama_cpp.server`."""

    def __init__(
        self, python: Path, model: Path, log: Path, *, threads: int, context_length: int, interrupts: bool
    ) -> None:
        """interrupts: its default, in which a request that comes ends the answer that is being written."""
        super().__init__("llama-cpp-python's server", log)
        self.port = free_port()
        options: dict[str, object] = {
            "model": model,
            "host": "127.0.0.1",
            "port": self.port,
            "n_ctx": context_length,
            "n_threads": threads,
            "n_threads_batch": threads,
            "flash_attn": True,
            # Its default computes the logits of every token of a prompt, for those who ask for them.
            "logits_all": False,
            "verbose": False,
            "interrupt_requests": interrupts,
        }
        self._command: list[str | Path] = [python, "-m", "llama_cpp.server"]
        for name, value in options.items():
            self._command += [f"--{name}", str(value)]

    def start(self) -> None:
        """Start it and return when it lists its model."""
        self._spawn(self._command, {"PYTHONNOUSERSITE": "1", "HF_HUB_OFFLINE": "1"})
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline:
            try:
                self.check_alive()
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v1/models", timeout=5):
                    return
            except ServerError:
                self.stop()
                raise
            except (urllib.error.URLError, OSError):
                time.sleep(_LOOK_SECONDS)
        self.stop()
        raise ServerError(f"{self.name} did not answer after {_READY_SECONDS:g} s; see {self.log}")
