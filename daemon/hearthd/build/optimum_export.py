"""Export a checkpoint to ONNX with optimum, in a process of its own: torch's memory is gone before the build begins.

The only module that knows torch, transformers and optimum (the extra `export`), and it imports them in that process
only. The exporter writes the graph and config.json; the tokenizer, the chat template and the generation defaults come
from Hearth's own reading of the checkpoint, because optimum drops some of them, and a GGUF file has none that it could
copy. Nothing is unpickled and nothing downloaded here. Called by `optimum_source`; run by itself as
`python -m hearthd.build.optimum_export CHECKPOINT DIRECTORY`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hearthd.build.architecture import DecoderSpec
from hearthd.build.checkpoint import open_checkpoint
from hearthd.build.onnx_checkpoint import OnnxCheckpoint
from hearthd.errors import BuildError

if TYPE_CHECKING:
    from hearthd.build.checkpoint import Checkpoint

__all__ = ["export_checkpoint"]

_PACKAGES: Final = ("torch", "transformers", "optimum", "optimum.exporters.onnx")
_TASK: Final = "text-generation-with-past"


def export_checkpoint(checkpoint: Path, directory: Path) -> str:
    """Export a GGUF file or a Hugging Face directory into `directory`, which is made: 4 bytes a weight, or more.

    Returns the checkpoint's licence. Raises BuildError when the extra `export` is not installed, when Hearth or optimum
    cannot express the architecture, and when transformers reads the checkpoint otherwise than Hearth.
    """
    with open_checkpoint(checkpoint) as source:
        spec = DecoderSpec.from_config(source.config)
        _require_packages()
        directory.mkdir(parents=True)
        _run_exporter(checkpoint, directory)
        _write_texts(source, directory)
        with OnnxCheckpoint(directory) as exported:
            _check_same(checkpoint, asdict(spec), asdict(DecoderSpec.from_config(exported.config)))
        return source.license


def _require_packages() -> None:
    for package in _PACKAGES:
        try:
            found = importlib.util.find_spec(package) is not None
        except ImportError:
            found = False
        if not found:
            raise BuildError(
                f"exporting a checkpoint needs {package}, which is not installed: pip install "
                "'hearth-chat[daemon,export]', best into an environment of its own; "
                "a directory that is exported already needs none of it"
            )


def _run_exporter(checkpoint: Path, directory: Path) -> None:
    command = [sys.executable, "-m", "hearthd.build.optimum_export", str(checkpoint.resolve()), str(directory)]
    # What is here is exported, and nothing asked of the hub.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "0"}
    finished = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        check=False,
    )
    if finished.returncode or not (directory / "model.onnx").is_file():
        lines = [line.strip() for line in finished.stdout.splitlines() if line.strip()]
        said = lines[-1] if lines else f"nothing; it ended with code {finished.returncode}"
        raise BuildError(f"{checkpoint}: optimum cannot export it: {said[:300]}")


def _write_texts(source: Checkpoint, directory: Path) -> None:
    """Write what a checkpoint directory has beside its weights and its configuration."""
    (directory / "tokenizer.json").write_text(source.tokenizer_json, encoding="utf-8")
    (directory / "chat_template.jinja").write_text(source.chat_template, encoding="utf-8")
    tokens = {"bos_token": source.bos_token, "eos_token": source.eos_token}
    _write_json(directory / "tokenizer_config.json", {key: token for key, token in tokens.items() if token})
    _write_json(directory / "generation_config.json", {"eos_token_id": list(source.eos_ids), **source.generation})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check_same(checkpoint: Path, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Hold what transformers made of the configuration, which the graph now is, against what Hearth makes of it."""
    for key, value in ours.items():
        if not _is_close(value, theirs[key]):
            raise BuildError(
                f"{checkpoint}: transformers reads its {key} as {str(theirs[key])[:80]}, it is {str(value)[:80]}; the "
                "exported graph would be of another model. Build from the checkpoint itself, without --from-optimum"
            )


def _is_close(value: Any, other: Any) -> bool:
    """Compare numbers, and what is made of numbers, up to the rounding of float32."""
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other, rel_tol=1e-6)
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        return value.keys() == other.keys() and all(_is_close(value[key], other[key]) for key in value)
    if isinstance(value, tuple | list) and isinstance(other, tuple | list):
        return len(value) == len(other) and all(map(_is_close, value, other))
    return bool(value == other)


def _main(checkpoint: Path, directory: Path) -> None:
    """Load a checkpoint with transformers and export it: what the process of its own does."""
    import torch
    from optimum.exporters.onnx import onnx_export_from_model
    from transformers import AutoModelForCausalLM

    where: dict[str, Any] = {"gguf_file": checkpoint.name} if checkpoint.is_file() else {"use_safetensors": True}
    folder = checkpoint.parent if checkpoint.is_file() else checkpoint
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, **where
    )
    # GGUF files do not name it, and the graph alone does not tell.
    model.config.architectures = [type(model).__name__]
    onnx_export_from_model(model, directory, task=_TASK, do_validation=False)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
