"""manifest.json: what a bundle says of itself, and nothing that it could say to do harm.

Every value is of its type and in its bounds, or there is no Manifest. Opens no file. Called by `bundle`, which the
others import it from.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Self

from hearthd.errors import BundleError

# What is written. The graph of version 2 gives the logits of one position: it is served without drafts.
SCHEMA_VERSION: Final = 3
_READ_VERSIONS: Final = (2, 3)
MANIFEST_NAME: Final = "manifest.json"
MODEL_NAME: Final = "model.onnx"
TOKENIZER_NAME: Final = "tokenizer.json"
TEMPLATE_NAME: Final = "chat_template.jinja"
GENERATION_NAME: Final = "generation.json"
PRESET_NAME: Final = "preset.npy"
GENERATION_KEYS: Final = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_REQUIRED_FILES: Final = (MODEL_NAME, TOKENIZER_NAME, TEMPLATE_NAME, GENERATION_NAME)

_MAX_FILES: Final = 64
_MAX_FILE_BYTES: Final = 2**40
_HASH_CHUNK_BYTES: Final = 2**20
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_FILE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
# Field -> largest value; the smallest is 1.
_NUMBERS: Final = {
    "context_length": 2**24,
    "vocab_size": 2**20,
    "num_layers": 512,
    "num_heads": 1024,
    "num_kv_heads": 1024,
    "head_dim": 1024,
    "parameter_count": 2**40,
}
# Field -> (fewest, most) token ids.
_TOKEN_IDS: Final = {
    "eos_ids": (1, 64),
    "control_ids": (0, 2**17),
    "preset_tokens": (0, 4096),
    "role_markers": (0, 64),
}
_TEXTS: Final = {
    "architecture": 64,
    "quantization": 64,
    "license": 256,
    "source": 1024,
    "kv_dtype": 16,
    "bos_token": 64,
    "eos_token": 64,
}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a bundle, as it was when the bundle was built."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bundle says of itself.

    bos_token, eos_token: what the chat template calls by these names. recipe: how each matrix was quantised.
    quality: figures measured at build, against the fp32 graph. control_ids: what a person's text must never become.
    preset_tokens: every chat starts with these, and preset.npy holds their keys and values. created_with: program ->
    version. files: plain file name -> entry, the manifest left out.
    """

    name: str
    architecture: str
    context_length: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    parameter_count: int
    quantization: str
    license: str
    source: str
    eos_ids: tuple[int, ...]
    control_ids: tuple[int, ...]
    files: Mapping[str, FileEntry]
    preset_tokens: tuple[int, ...] = ()
    role_markers: tuple[int, ...] = ()
    bos_token: str = ""
    eos_token: str = ""
    kv_dtype: str = "int8"
    recipe: Mapping[str, Any] = field(default_factory=dict)
    quality: Mapping[str, Any] = field(default_factory=dict)
    created_with: Mapping[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        """Raise BundleError unless every field is of its type and in its bounds."""
        _check_manifest(self)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, the manifest left out."""
        return sum(entry.size for entry in self.files.values())

    def to_json(self) -> str:
        """Return the text of manifest.json, always the same for the same manifest, sealed with its own hash."""
        content = asdict(self)
        return _canonical(content | {"sha256": _seal(content)})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a manifest. Raises BundleError for any text but one that `to_json` gave."""
        try:
            content = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{MANIFEST_NAME} is not JSON: {str(error)[:100]}; build the model again") from error
        if not isinstance(content, dict):
            raise BundleError(f"{MANIFEST_NAME} is not a JSON object; build the model again")
        version = content.get("schema_version")
        if type(version) is not int or version not in _READ_VERSIONS:
            readable = " and ".join(map(str, _READ_VERSIONS))
            raise BundleError(
                f"{MANIFEST_NAME} has schema_version {shown(version)}, this hearthd reads {readable}; "
                "build the model again with this hearthd, or run the hearthd that built it"
            )
        expected = {each.name for each in fields(cls)} | {"sha256"}
        if content.keys() != expected:
            wrong = ", ".join(sorted(shown(key) for key in content.keys() ^ expected)[:5])
            raise BundleError(f"{MANIFEST_NAME} lacks or does not know these keys: {wrong}; build the model again")
        seal = content.pop("sha256")
        try:
            # Canonical text: a changed byte between the values is found too, and so is a key that stands twice.
            if seal != _seal(content) or text != _canonical(content | {"sha256": seal}):
                raise BundleError(f"{MANIFEST_NAME} was changed after the build (its hash is another); build it again")
        except (ValueError, RecursionError) as error:  # a lone surrogate cannot be encoded
            raise BundleError(f"{MANIFEST_NAME} cannot be read: {str(error)[:100]}; build the model again") from error
        for key in _TOKEN_IDS:
            content[key] = _tuple(key, content[key])
        content["files"] = _file_entries(content["files"])
        return cls(**content)


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def shown(value: object) -> str:
    """Return a value of a hostile file as a message may show it: printable and short."""
    return ascii(value)[:60]


def is_model_name(name: str) -> bool:
    """Whether a model may be called so: a plain directory name that needs no quotes anywhere."""
    return _NAME.fullmatch(name) is not None


def is_finite_number(value: object) -> bool:
    """Whether a JSON value is a number that fits a float; true and false are none."""
    try:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # an integer that no float holds
        return False


def _tuple(key: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise BundleError(f"{key} is {shown(value)}, not a list of token ids")
    return tuple(value)


def _file_entries(value: object) -> dict[str, FileEntry]:
    if not isinstance(value, dict):
        raise BundleError(f"files is {shown(value)}, not an object")
    entries: dict[str, FileEntry] = {}
    for name, entry in value.items():
        if not isinstance(entry, dict) or entry.keys() != {"size", "sha256"}:
            raise BundleError(f"files has {shown(name)} without exactly a size and a sha256")
        entries[name] = FileEntry(size=entry["size"], sha256=entry["sha256"])
    return entries


def _check_manifest(manifest: Manifest) -> None:
    if manifest.schema_version not in _READ_VERSIONS:
        raise BundleError(f"schema_version is {shown(manifest.schema_version)}; {SCHEMA_VERSION} is written")
    if not isinstance(manifest.name, str) or not is_model_name(manifest.name):
        raise BundleError(f"name is {shown(manifest.name)}; up to 64 of a-z, 0-9, '.', '_', '-' are allowed")
    for key, longest in _TEXTS.items():
        text = getattr(manifest, key)
        if not isinstance(text, str) or len(text) > longest or not text.isprintable():
            raise BundleError(f"{key} is {shown(text)}; one line of at most {longest} characters is allowed")
    for key, largest in _NUMBERS.items():
        number = getattr(manifest, key)
        if type(number) is not int or not 1 <= number <= largest:
            raise BundleError(f"{key} is {shown(number)}; a whole number from 1 to {largest} is allowed")
    if manifest.num_heads % manifest.num_kv_heads:
        raise BundleError(f"num_heads {manifest.num_heads} is no multiple of num_kv_heads {manifest.num_kv_heads}")
    if manifest.kv_dtype != "int8":
        raise BundleError(
            f"kv_dtype is {shown(manifest.kv_dtype)}; int8 is what this hearthd runs: build the model again"
        )
    for key, (fewest, most) in _TOKEN_IDS.items():
        ids = getattr(manifest, key)
        if not fewest <= len(ids) <= most:
            raise BundleError(f"{key} has {len(ids)} token ids; {fewest} to {most} are allowed")
        if not all(type(token_id) is int and 0 <= token_id < manifest.vocab_size for token_id in ids):
            raise BundleError(f"{key} has a token id outside of the vocabulary of {manifest.vocab_size}")
    if bool(manifest.preset_tokens) != (PRESET_NAME in manifest.files):
        raise BundleError(f"preset_tokens and {PRESET_NAME} come together or not at all; build the model again")
    if len(manifest.preset_tokens) >= manifest.context_length:
        raise BundleError(f"preset_tokens fill the context of {manifest.context_length}")
    for key in ("recipe", "quality", "created_with"):
        if not isinstance(getattr(manifest, key), dict):
            raise BundleError(f"{key} is {shown(getattr(manifest, key))}, not an object")
    if not _are_figures(manifest.quality):
        raise BundleError("quality has a value that is neither a text nor a finite number")
    if not all(isinstance(version, str) for version in manifest.created_with.values()):
        raise BundleError("created_with has a version that is not a text")
    _check_files(manifest.files)


def _are_figures(quality: Mapping[str, Any]) -> bool:
    """Say whether all are texts or finite numbers; `kinds` has such figures for each kind of text."""
    kinds = quality.get("kinds", {})
    if not isinstance(kinds, dict) or not all(isinstance(figures, dict) for figures in kinds.values()):
        return False
    values = [value for figures in kinds.values() for value in figures.values()]
    values += [value for key, value in quality.items() if key != "kinds"]
    return all(isinstance(value, str) or is_finite_number(value) for value in values)


def _check_files(files: Mapping[str, FileEntry]) -> None:
    if len(files) > _MAX_FILES:
        raise BundleError(f"lists {len(files)} files; at most {_MAX_FILES} are allowed")
    for name, entry in files.items():
        # A plain name, so that no entry leaves the directory, and none hides.
        if not _FILE_NAME.fullmatch(name) or name == MANIFEST_NAME:
            raise BundleError(
                f"lists the file {shown(name)}; plain names of letters, digits, '.', '_', '-' are allowed"
            )
        if type(entry.size) is not int or not 0 <= entry.size <= _MAX_FILE_BYTES:
            raise BundleError(f"lists {name} with size {shown(entry.size)}; 0 to {_MAX_FILE_BYTES} bytes are allowed")
        if not isinstance(entry.sha256, str) or not _SHA256.fullmatch(entry.sha256):
            raise BundleError(f"lists {name} with sha256 {shown(entry.sha256)}; 64 hexadecimal digits are needed")
    for name in _REQUIRED_FILES:
        if name not in files:
            raise BundleError(f"lists no {name}; build the model again")
