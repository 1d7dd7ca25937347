"""What `hearthd model` writes to standard output: tables and facts for a person, one JSON object for a program.

Knows manifests and catalogue entries, no files and no work. Called by `cli`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hearthd.build.sources.catalogue import CatalogueEntry
from hearthd.bundles.bundle import Bundle, Manifest


def write_json(content: Mapping[str, Any]) -> None:
    """Write one JSON object."""
    print(json.dumps(content, indent=2, ensure_ascii=False))


def write_facts(facts: Mapping[str, object]) -> None:
    """Write a line for each fact."""
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        print(f"{key:<{width}}  {_figure(value)}")


def write_built(manifest: Manifest, path: Path, report: Path | None = None, *, as_json: bool) -> None:
    """Write what was built, where it is and how faithful it is; report: where the page on it is, if there is one."""
    if as_json:
        write_json(summary(manifest) | {"path": str(path)} | ({"report": str(report)} if report else {}))
        return
    kl_mean, agreement = (_figure(manifest.quality.get(key)) for key in ("kl_mean", "top1_agreement"))
    print(f"{manifest.name} is in {path} ({_megabytes(manifest)}, mean KL {kl_mean}, top-1 agreement {agreement})")
    if report:
        print(f"report: {report}")


def quality_facts(quality: Mapping[str, Any]) -> dict[str, object]:
    """Return quality figures as facts: a line for each kind of text."""
    facts = {key: value for key, value in quality.items() if key != "kinds"}
    for kind, figures in quality.get("kinds", {}).items():
        wanted = {"KL": "kl_mean", "top-1": "top1_agreement", "perplexity": "perplexity_int8", "of": "perplexity_fp32"}
        facts[kind] = " ".join(f"{label} {_figure(figures.get(key))}" for label, key in wanted.items())
    return facts


def summary(manifest: Manifest) -> dict[str, Any]:
    """Return what a list of models says of one."""
    keys = ("name", "architecture", "context_length", "parameter_count", "quantization", "license", "source", "quality")
    return {key: getattr(manifest, key) for key in keys} | {"size_bytes": manifest.size_bytes}


def write_manifests(manifests: Sequence[Manifest]) -> None:
    """Write a table of installed models."""
    rows = [["NAME", "ARCHITECTURE", "PARAMETERS", "QUANTIZATION", "SIZE", "CONTEXT", "KL", "LICENSE"]]
    rows += [
        [
            manifest.name,
            manifest.architecture,
            f"{manifest.parameter_count / 1e6:.0f}M",
            manifest.quantization,
            _megabytes(manifest),
            str(manifest.context_length),
            _figure(manifest.quality.get("kl_mean")),
            manifest.license,
        ]
        for manifest in manifests
    ]
    _write_table(rows)


def bundle_facts(bundle: Bundle, checkpoint: Path | None) -> dict[str, object]:
    """Return all that a person may want to know of a model.

    checkpoint: where the download is that it was built from, if it is still there.
    """
    manifest = bundle.manifest
    facts: dict[str, object] = {
        "name": manifest.name,
        "path": bundle.path,
        "architecture": manifest.architecture,
        "parameters": f"{manifest.parameter_count:,}",
        "context length": f"{manifest.context_length:,} tokens",
        "quantization": manifest.quantization,
        "size": _megabytes(manifest),
        "license": manifest.license,
        "source": manifest.source,
        "checkpoint": checkpoint,
    }
    facts |= {f"quality: {key}": value for key, value in quality_facts(manifest.quality).items()}
    facts |= {f"default: {key}": value for key, value in bundle.generation().items()}
    return facts | {f"built with: {program}": version for program, version in sorted(manifest.created_with.items())}


def entries_json(entries: Sequence[CatalogueEntry], installed: Sequence[str]) -> dict[str, Any]:
    """Return the catalogue as JSON."""
    models = []
    for entry in entries:
        known = {key: value for key, value in asdict(entry).items() if value is not None}
        models.append(known | {"installed": entry.name in installed})
    return {"models": models}


def write_entries(entries: Sequence[CatalogueEntry]) -> None:
    """Write a table of the catalogue, a line for each source, the default first."""
    rows = [["NAME", "PARAMETERS", "SOURCE", "WEIGHTS", "TESTED", "LICENSE", "TITLE"]]
    for entry in entries:
        for source in entry.sources:
            kind = "hub" if source is entry.hub else "package"
            row = [entry.name, entry.parameters, kind, source.precision, _figure(source.tested)]
            rows.append([*row, entry.license, entry.title])
    _write_table(rows)


def _write_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _megabytes(manifest: Manifest) -> str:
    return f"{manifest.size_bytes / 1e6:,.0f} MB"


def _figure(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_figure(each)}" for key, each in value.items()) or "-"
    return "-" if value is None else str(value)
