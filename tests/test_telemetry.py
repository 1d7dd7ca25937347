"""Nothing that Hearth stands on tells anybody that it runs.

ONNX Runtime's wheels do so from the moment that they are imported, unless they are told not to before.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("module", ["hearthd.runtime.runner", "hearthd.build.quantization.session"])
def test_whoever_imports_onnx_runtime_silences_its_telemetry(module: str, tmp_path: Path) -> None:
    program = f"import os, {module}; print(sorted(os.listdir('/proc/self/task')) == [str(os.getpid())])"
    home = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "XDG_"))}
    # A library of arrays has threads of its own.
    home |= {"HOME": str(tmp_path), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=home, capture_output=True, text=True, check=True)
    # Else: a device id and a database of events for the collector, and the threads that send them.
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == []
    assert done.stdout == "True\n"
