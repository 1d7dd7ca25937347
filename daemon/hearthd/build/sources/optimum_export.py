"""Export a checkpoint to ONNX with optimum, in a process of its own: torch's memory is gone before the build begins.

The only module that knows torch, transformers and optimum (the extra `export`), and it imports them in that process
only. The exporter writes the graph and config.json; the tokenizer, the chat template and the generation defaults come
from Hearth's own reading of the checkpoint, because optimum drops some of them, and a GGUF file has none that it could
copy. Nothing is unpickled and nothing downloaded here. Called by `optimum_source`; run by itself as
`python -m hearthd.build.sources.optimum_export CHECKPOINT DIRECTORY`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hearthd.build.checkpoints.checkpoint import open_checkpoint
from hearthd.build.checkpoints.onnx_checkpoint import OnnxCheckpoint
from hearthd.build.decoder.architecture import DecoderSpec
from hearthd.errors import BuildError

if TYPE_CHECKING:
    from hearthd.build.checkpoints.checkpoint import Checkpoint

__all__ = ["complete_export", "export_checkpoint", "export_graph"]

_PACKAGES: Final = ("torch", "transformers", "optimum", "optimum.exporters.onnx")
_TASK: Final = "text-generation-with-past"


def export_checkpoint(checkpoint: Path, directory: Path) -> str:
    """Export a GGUF file or a Hugging Face directory into `directory`, which is made: 4 bytes a weight, or more.

    Returns the checkpoint's licence. Raises BuildError when the extra `export` is not installed, when Hearth or optimum
    cannot express the architecture, and when transformers reads the checkpoint otherwise than Hearth.
    """
    with open_checkpoint(checkpoint) as source:
        DecoderSpec.from_config(source.config)
        _require_packages()
        directory.mkdir(parents=True)
        _run_exporter(checkpoint, directory)
        complete_export(source, directory)
        return source.license


def export_graph(checkpoint: Path, directory: Path) -> None:
    """Load a checkpoint with transformers and export it: graph and config.json, what the process of its own does."""
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


def complete_export(source: Checkpoint, directory: Path) -> None:
    """Write the texts beside an exported graph. Raises BuildError when transformers read the checkpoint otherwise."""
    _write_texts(source, directory)
    spec = DecoderSpec.from_config(source.config)
    with OnnxCheckpoint(directory) as exported:
        _check_same(source.source, asdict(spec), asdict(DecoderSpec.from_config(exported.config)))


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
    command = [sys.executable, "-m", "hearthd.build.sources.optimum_export", str(checkpoint.resolve()), str(directory)]
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


def _check_same(source: str, ours: object, theirs: object) -> None:
    """Hold what transformers made of the configuration, which the graph now is, against what Hearth makes of it."""
    for where, value, other in _differences("", ours, theirs):
        raise BuildError(
            f"{source}: transformers reads {where} as {str(other)[:40]}, and it is {str(value)[:40]}: the exported "
            "graph would be of another model. Build from the checkpoint itself, without --from-optimum"
        )


def _differences(where: str, value: Any, other: Any) -> Iterator[tuple[str, object, object]]:
    """Yield where two configurations differ, and how; numbers only by more than the rounding of float32."""
    if isinstance(value, Mapping) and isinstance(other, Mapping) and value.keys() == other.keys():
        for key in value:
            yield from _differences(f"{where}.{key}".lstrip("."), value[key], other[key])
    elif isinstance(value, list | tuple) and isinstance(other, list | tuple) and len(value) == len(other):
        for index, (each, counterpart) in enumerate(zip(value, other, strict=True)):
            yield from _differences(f"{where}[{index}]", each, counterpart)
    elif isinstance(value, float) and isinstance(other, float):
        if not math.isclose(value, other, rel_tol=1e-6):
            yield where, float(value), float(other)
    elif value != other:
        yield where, value, other


if __name__ == "__main__":
    export_graph(Path(sys.argv[1]), Path(sys.argv[2]))
