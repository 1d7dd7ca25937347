"""A daemon of its own process that reads a hearthd.toml as the real one does: `python configured_daemon.py FILE`.

Everything is real but the model, which is `FakeRunner`.
"""

import os
import sys
from pathlib import Path

from hearthd.__main__ import run_server
from hearthd.configuration.config import load_config
from hearthd.logs import configure_logging
from serving import make_model, make_runner

if __name__ == "__main__":
    configure_logging("info")
    code = run_server(load_config(Path(sys.argv[1])), lambda _: make_model(make_runner()))
    sys.stderr.flush()
    os._exit(code)
