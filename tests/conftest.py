"""What several test modules share: the real default bundle, and how hypothesis runs."""

from pathlib import Path

import pytest
from hypothesis import settings

from hearthd.bundles.bundle import Bundle
from places import DEFAULT_BUNDLE, ROOT

# How long one example takes says more of the machine, and of what else runs on it, than of the code.
settings.register_profile("hearth", deadline=None)
settings.load_profile("hearth")


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
