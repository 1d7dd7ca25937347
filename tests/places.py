"""Where the repository and the default model stand: nothing that a person installed is read or written."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Where `make bundle` builds it: inside the clone.
DEFAULT_BUNDLE = ROOT / ".cache/state/models/smollm2-135m"
