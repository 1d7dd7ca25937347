"""Write a checkpoint of ours as a Hugging Face directory, so that all peers start from the same weights.

Knows the file formats, no peer. Runs in the product's environment, without torch or safetensors. Called by
`install.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from hearthd.build.checkpoints.checkpoint import Checkpoint, open_checkpoint

# What config.json says of the same thing elsewhere, or what a reader of it computes by itself.
_NOT_IN_CONFIG = ("rope_freq_factors",)


def write_huggingface_directory(checkpoint_path: Path, directory: Path) -> None:
    """Write config.json, model.safetensors (float32) and tokenizer files to a new directory."""
    directory.mkdir(parents=True)
    with open_checkpoint(checkpoint_path) as checkpoint:
        config = {key: value for key, value in checkpoint.config.items() if key not in _NOT_IN_CONFIG}
        config["dtype"] = config["torch_dtype"] = "float32"
        eos = checkpoint.eos_ids
        # One end of turn is written as a number: onnxruntime-genai's builder wants that.
        config["eos_token_id"] = eos[0] if len(eos) == 1 else list(eos)
        _write_json(directory / "config.json", config)
        generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
        _write_json(directory / "generation_config.json", generation)
        (directory / "tokenizer.json").write_text(checkpoint.tokenizer_json, encoding="utf-8")
        tokenizer = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": checkpoint.bos_token or None,
            "eos_token": checkpoint.eos_token or None,
            "pad_token": checkpoint.eos_token or None,
            "chat_template": checkpoint.chat_template,
            "model_max_length": config["max_position_embeddings"],
        }
        _write_json(directory / "tokenizer_config.json", tokenizer)
        _write_safetensors(directory / "model.safetensors", checkpoint)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _write_safetensors(path: Path, checkpoint: Checkpoint) -> None:
    """Write all tensors one after the other: 8 bytes of header length, a JSON header, little-endian data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    names = sorted(checkpoint.tensor_names)
    offset = 0
    for name in names:
        shape = checkpoint.shape(name)
        end = offset + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name in names:
            file.write(checkpoint.tensor(name).astype("<f4", copy=False).tobytes())
