"""What several test modules share: the real default bundle, and where the repository stands."""

from pathlib import Path

import pytest
from hypothesis import settings

from hearthd.bundle import Bundle

# How long one example takes says more of the machine, and of what else runs on it, than of the code.
settings.register_profile("hearth", deadline=None)
settings.load_profile("hearth")

ROOT = Path(__file__).resolve().parent.parent
# Where `make bundle` builds it: inside the clone, so that no test reads or writes what a person installed.
DEFAULT_BUNDLE = ROOT / ".cache/state/models/smollm2-135m"


@pytest.fixture(scope="session")
def repository() -> Path:
    """Return the root of the clone."""
    return ROOT


@pytest.fixture(scope="session")
def default_bundle() -> Bundle:
    """Return the real SmolLM2-135M-Instruct bundle, verified once; tests that ask for it carry the mark `model`.

    A missing bundle is a failure and no skip: a suite that passes without the model has not shown that Hearth answers.
    """
    if not DEFAULT_BUNDLE.is_dir():
        pytest.fail(f"no bundle in {DEFAULT_BUNDLE}: run `make bundle`, or leave these tests out with -m 'not model'")
    return Bundle.open(DEFAULT_BUNDLE)
