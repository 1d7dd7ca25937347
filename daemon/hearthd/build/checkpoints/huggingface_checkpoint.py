"""A Hugging Face checkpoint directory as a checkpoint: config.json, safetensors, tokenizer.json, chat template.

Written by transformers 4 or 5; huggingface_config makes one spelling of their configurations. Knows no GGUF and needs
neither torch nor transformers. Called by checkpoint.open_checkpoint.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

from tokenizers import Tokenizer

from hearthd.build.checkpoints.checkpoint import Checkpoint, one_line, unsupported_architecture
from hearthd.build.checkpoints.huggingface_config import one_spelling
from hearthd.build.checkpoints.safetensors_file import SafetensorsFile
from hearthd.build.decoder.architecture import ARCHITECTURES
from hearthd.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

_MAX_JSON_BYTES: Final = 128 * 2**20
_MAX_SHARDS: Final = 1000
_SHARD_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.safetensors")
_LICENSE: Final = re.compile(r"^license:[ \t]*([A-Za-z0-9][A-Za-z0-9.+_-]{0,63})[ \t]*$", re.MULTILINE)
# Generation default -> (smallest, largest) that makes sense; top_k is a whole number.
_GENERATION: Final = {
    "temperature": (0.0, 100.0),
    "top_k": (0, 2**31 - 1),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, 100.0),
}


class WeightFile(Protocol):
    """A file of tensors, as `SafetensorsFile` reads it."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The tensors' shapes by name."""

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) of a tensor; one of one dimension is one row."""

    def close(self) -> None:
        """Let go of the file."""


class HuggingFaceCheckpoint(Checkpoint):
    """A directory with config.json, model.safetensors (or shards and their index), tokenizer.json and a template."""

    kind: ClassVar[str] = "Hugging Face checkpoint"
    remedy: ClassVar[str] = "give a Hugging Face checkpoint directory or a GGUF file"

    def __init__(self, path: Path) -> None:
        """Open the directory. Raises BuildError, with the remedy, for what is missing, damaged or not supported."""
        self._path = path
        self._files: list[WeightFile] = []
        config = self._json("config.json", self.remedy)
        architecture = self._architecture(config)
        if "quantization_config" in config:
            raise self._error("is quantised already (quantization_config in config.json); take the original checkpoint")
        generation = self._json("generation_config.json")
        tokenizer_config = self._json("tokenizer_config.json")
        self.tokenizer_json, tokenizer = self._tokenizer()
        self.chat_template = self._template(tokenizer_config)
        self.bos_token = self._special_token(tokenizer_config, "bos_token")
        self.eos_token = self._special_token(tokenizer_config, "eos_token")
        self.generation = self._generation(generation)
        self.source = one_line(f"{self.kind} {path.resolve().name}", 200)
        self.license = self._license()
        if not all(isinstance(config.get(key) or {}, dict) for key in ("rope_parameters", "rope_scaling")):
            raise self._error("has rope_parameters or rope_scaling that are no object in config.json")
        self.config = one_spelling(config, architecture)
        self.config["eos_token_id"] = self._eos_ids(config, generation, tokenizer)
        try:
            self._where = self._open_weights()
            embedding = self.shape("model.embed_tokens.weight")
            if len(embedding) != 2:
                raise self._error(f"has model.embed_tokens.weight of shape {embedding}; a matrix is needed")
        except BaseException:
            self.close()
            raise
        # Some checkpoints have more rows than config.json says; the graph has as many as there are.
        self.config["vocab_size"] = embedding[0]

    @property
    def tensor_names(self) -> frozenset[str]:
        """Names of the tensors in all shards."""
        return frozenset(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._file(name).shapes[name]

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A tensor as float32."""
        shape = self.shape(name)
        return self._file(name).rows(name, 0, math.prod(shape[:-1])).reshape(shape)

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows of a matrix as float32."""
        return self._file(name).rows(name, start, stop)

    def close(self) -> None:
        """Unmap all shards."""
        for file in self._files:
            file.close()

    def _file(self, name: str) -> WeightFile:
        try:
            return self._where[name]
        except KeyError:
            raise self._error(f"has no tensor {name!r}; the checkpoint is incomplete") from None

    def _open_weights(self) -> Mapping[str, WeightFile]:
        single = self._path / "model.safetensors"
        if single.is_file():
            whole = SafetensorsFile(single)
            self._files.append(whole)
            return dict.fromkeys(whole.shapes, whole)
        index = self._json(
            "model.safetensors.index.json",
            "there is no model.safetensors either; convert older *.bin weights with transformers' save_pretrained",
        )
        where = index.get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(shard, str) for shard in where.values()):
            raise self._error("has an index without weight_map from tensors to files; fetch it again")
        shards = sorted(set(where.values()))
        if len(shards) > _MAX_SHARDS:
            raise self._error(f"has {len(shards)} shards; at most {_MAX_SHARDS} are allowed")
        opened: dict[str, SafetensorsFile] = {}
        for shard in shards:
            if not _SHARD_NAME.fullmatch(shard):
                raise self._error(f"has an index that names the file {ascii(shard)[:80]}; plain *.safetensors are read")
            opened[shard] = SafetensorsFile(self._path / shard)
            self._files.append(opened[shard])
        for name, shard in where.items():
            if name not in opened[shard].shapes:
                raise self._error(f"has no tensor {name!r} in {shard}, where its index says it is; fetch it again")
        return {name: opened[shard] for name, shard in where.items()}

    def _architecture(self, config: Mapping[str, Any]) -> str:
        names = config.get("architectures")
        name = names[0] if isinstance(names, list) and len(names) == 1 else config.get("model_type")
        if name not in ARCHITECTURES:
            raise unsupported_architecture(self._path, str(name)[:80])
        return str(name)

    def _tokenizer(self) -> tuple[str, Tokenizer]:
        text = self._text("tokenizer.json")
        if text is None:
            raise self._error(
                "has no tokenizer.json; make one where transformers is installed: "
                "AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)"
            )
        try:
            return text, Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises bare Exception
            raise self._error(f"has a tokenizer.json that does not load: {ascii(str(error))[:200]}") from error

    def _template(self, tokenizer_config: Mapping[str, Any]) -> str:
        template = self._text("chat_template.jinja")
        if template is None:
            template = tokenizer_config.get("chat_template")
            if isinstance(template, list):
                named = [each for each in template if isinstance(each, dict) and each.get("name") == "default"]
                template = named[0].get("template") if named else None
        if not isinstance(template, str) or not template.strip():
            raise self._error(
                "has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
                "take an instruct or chat checkpoint, or write the template that this one was trained with"
            )
        return template

    def _special_token(self, tokenizer_config: Mapping[str, Any], key: str) -> str:
        for source in (tokenizer_config, self._json("special_tokens_map.json")):
            value = source.get(key)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                return value
        return ""

    def _eos_ids(self, config: Mapping[str, Any], generation: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
        """Unite what config.json and generation_config.json say; either may have one id or a list."""
        found: list[int] = []
        for value in (
            config.get("eos_token_id"),
            generation.get("eos_token_id"),
            tokenizer.token_to_id(self.eos_token),
        ):
            found += value if isinstance(value, list) else [] if value is None else [value]
        if not found or not all(type(each) is int and each >= 0 for each in found):
            raise self._error(
                f"has the eos_token_id {ascii(found)[:80]}; without a valid one an answer would never end"
            )
        return list(dict.fromkeys(found))

    def _generation(self, content: Mapping[str, Any]) -> dict[str, float]:
        defaults: dict[str, float] = {}
        for key, (smallest, largest) in _GENERATION.items():
            value = content.get(key)
            if value is None:
                continue
            if type(value) not in (int, float) or not smallest <= value <= largest:
                raise self._error(
                    f"has {key} {ascii(value)[:40]} in generation_config.json; correct it to {smallest} to {largest}"
                )
            defaults[key] = int(value) if key == "top_k" else float(value)
        return defaults

    def _license(self) -> str:
        readme = self._path / "README.md"
        if not readme.is_file():
            return ""
        with readme.open(encoding="utf-8", errors="replace") as file:
            start = file.read(8192)
        front_matter = start.split("\n---", 1)[0] if start.startswith("---") else ""
        match = _LICENSE.search(front_matter)
        return match.group(1) if match else ""

    def _json(self, name: str, remedy: str | None = None) -> dict[str, Any]:
        """Read a JSON object; a missing file is an empty one unless there is a remedy to name."""
        text = self._text(name)
        if text is None:
            if remedy is None:
                return {}
            raise self._error(f"has no {name}; {remedy}")
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._error(f"has a {name} that is not JSON: {str(error)[:100]}") from error
        if not isinstance(content, dict):
            raise self._error(f"has a {name} that is not a JSON object")
        return content

    def _text(self, name: str) -> str | None:
        file = self._path / name
        if not file.is_file():
            return None
        try:
            if file.stat().st_size > _MAX_JSON_BYTES:
                raise self._error(f"has a {name} of more than {_MAX_JSON_BYTES} bytes")
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise self._error(f"has a {name} that cannot be read: {error}") from error

    def _error(self, message: str) -> BuildError:
        return BuildError(f"{self._path}: {message}")
