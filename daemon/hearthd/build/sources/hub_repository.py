"""An ID of a hub repository as a pinned source: which commit it is at now, and whether it has an ONNX graph.

Knows the hub's API, no graphs; what is pinned here `fetch` brings. Called by `optimum_source`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Final

from hearthd.build.checkpoints.onnx_checkpoint import GRAPHS
from hearthd.build.sources.catalogue import ExportSource, HubSource
from hearthd.build.sources.fetch import hub_error, silent_hub
from hearthd.errors import BuildError

__all__ = ["is_repository", "pinned"]

_PART: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_ID: Final = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,95}}))?")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


def is_repository(text: str) -> bool:
    """Say whether a text is the ID of a repository: "owner/name", or "owner/name@revision"."""
    return _ID.fullmatch(text) is not None


def pinned(text: str) -> HubSource:
    """Ask the hub which commit an ID means, and what is in it.

    Returns a source of the ONNX graph where there is one, else of the weights. Raises BuildError.
    """
    found = _ID.fullmatch(text)
    assert found is not None, "is_repository says so"
    source = HubSource(found[1], found[2] or "main", precision="float32", tested=False)
    with silent_hub():
        from huggingface_hub import HfApi

        try:
            answer = HfApi().model_info(source.repository, revision=source.revision)
            commit, names = str(answer.sha), {each.rfilename for each in answer.siblings or ()}
        except Exception as error:  # huggingface_hub lets through what its HTTP client raises
            raise hub_error(source, error) from error
    if not _COMMIT.fullmatch(commit):
        raise BuildError(f"{source.repository}: the hub says that {source.revision} is at {ascii(commit)[:60]}")
    graph = next((name for name in GRAPHS if name in names), "")
    if graph:
        return ExportSource(source.repository, commit, source.precision, tested=False, graph=graph)
    return replace(source, revision=commit)
