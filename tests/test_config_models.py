"""[models] and [models.NAME]: which models are served, each with its own options, and what is refused."""

import json
import re
import tempfile
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundles import write_bundle
from hearthd.__main__ import main
from hearthd.bundles.manifest import is_model_name
from hearthd.configuration.config import Config, EngineConfig, ModelOptions, load_config, model_settings
from hearthd.doctor.cli import diagnose
from hearthd.doctor.needed_memory import NeededMemory
from hearthd.doctor.system import System
from hearthd.errors import ConfigError

SHIPPED = Path(__file__).parent.parent / "deploy/hearthd.toml"


def load(directory: Path, text: str) -> Config:
    file = directory / "hearthd.toml"
    file.write_text(text)
    return load_config(file, {"HOME": "/home/pi"})


def test_the_shipped_file_shows_every_key_of_a_model(tmp_path: Path) -> None:
    example = SHIPPED.read_text().partition("#   [models.smollm2-360m]\n")[2].partition("\n\n\n")[0]
    lines = [line.removeprefix("#   ") for line in example.splitlines() if re.match(r"#   [a-z_]+ = ", line)]
    assert tomllib.loads("\n".join(lines)).keys() == {key.name for key in fields(ModelOptions)}
    options = load(tmp_path, "\n".join(["[models.smollm2-360m]", *lines])).model_options["smollm2-360m"]
    # Those that [engine] decides are shown with its defaults; a model beside the default one is not kept.
    engine = EngineConfig()
    assert options == ModelOptions(
        slots=engine.slots, context_length=engine.context_length, threads=engine.threads, keep=False
    )


def test_models_are_named_beside_the_default_one_each_with_its_own_options(tmp_path: Path) -> None:
    text = """
[model]
name = "small"
[engine]
slots = 3
threads = 2
prefill_chunk = 128
[models]
max_bytes = "600M"
[models."qwen2.5-0.5b"]
[models.other]
slots = 1
context_length = 100
keep = true
[models.small]
context_length = 4096
"""
    config = load(tmp_path, text)
    assert config.model_names == ("small", "qwen2.5-0.5b", "other")
    assert config.models.max_bytes == 600 * 2**20
    assert config.for_model("qwen2.5-0.5b").engine == config.engine
    other = config.for_model("other")
    assert (other.model.name, other.model.directory) == ("other", config.model.directory)
    assert (other.engine.slots, other.engine.context_length, other.engine.prefill_chunk) == (1, 100, 100)
    assert other.engine.threads == 2
    assert config.for_model("small").engine.context_length == 4096
    told = model_settings(config)
    assert told["models.other.keep"] is True
    assert "models.other.threads" not in told


def test_a_file_without_models_serves_the_default_one(tmp_path: Path) -> None:
    config = load(tmp_path, "[engine]\nslots = 3\n")
    assert config.model_names == ("smollm2-135m",)
    assert config.for_model("smollm2-135m") == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models = 1", "models is 1; it is a section"),
        ("[models]\nmax_byte = 1", "there is no key 'max_byte'; did you mean max_bytes?"),
        ("[models]\nmax_bytes = -1", "models.max_bytes is -1; give 0 to 1125899906842624 bytes"),
        ("[models.max_bytes]\nslots = 0", "models.max_bytes.slots is 0; give a whole number from 1 to 64"),
        ("[models.Big]", "models.Big cannot be a model's name; give up to 64 of a-z"),
        ('[models."../x"]', "cannot be a model's name"),
        ('[models.""]', "cannot be a model's name"),
        ("[models.qwen2.5-0.5b]", 'models.qwen2 has sections; a name with a dot needs quotes: [models."a.b"]'),
        ("[models.a]\nslot = 1", "[models.a]: there is no key 'slot'; did you mean slots?"),
        ("[models.a]\ncontext_length = 63", "from 64 to 131072"),
        ("[models.a]\nkeep = 1", "models.a.keep is 1; give true or false"),
        ("[models.a]\nidle_seconds = -1", "from 0 to 604800"),
    ],
)
def test_models_that_cannot_be_are_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert said in str(caught.value)


@given(name=st.text(st.characters(exclude_categories=["Cs"]), max_size=70) | st.from_regex(r"[a-z0-9._/-]{1,66}"))
def test_a_models_name_is_a_name_or_refused(name: str) -> None:
    # A TOML basic string takes what JSON writes, but for DEL.
    quoted = json.dumps(name, ensure_ascii=False).replace("\x7f", "\\u007F")
    with tempfile.TemporaryDirectory() as directory:
        if is_model_name(name):
            config = load(Path(directory), f"[models.{quoted}]\n")
            assert set(config.model_names) == {"smollm2-135m", name}
        else:
            with pytest.raises(ConfigError) as caught:
                load(Path(directory), f"[models.{quoted}]\n")
            assert len(str(caught.value).splitlines()) == 1


def installed(directory: Path, *names: str) -> Path:
    """Write a configuration that serves three models, and bundles of those that are installed."""
    for name in names:
        write_bundle(directory / "models" / name, name=name)
    file = directory / "hearthd.toml"
    file.write_text(
        f'[server]\nunix_socket = "{directory}/hearthd.sock"\n[model]\ndirectory = "{directory}/models"\n'
        'name = "first"\n[models.second]\nslots = 2\n[models.third]\n'
    )
    return file


def test_check_config_opens_every_model_and_prints_its_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = installed(tmp_path, "first", "second", "third")
    assert main(["check-config", "--config", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "models.second.slots = 2" in lines
    assert "models.max_bytes = 0" in lines
    assert not any(line.startswith("models.second.threads") for line in lines)


def test_check_config_says_which_model_is_not_installed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And is content where the daemon starts: without the default model it does not, without another one it does."""
    file = installed(tmp_path, "first", "second")
    (tmp_path / "models/second/manifest.json").write_text("{")
    assert main(["check-config", "--quiet", "--config", str(file)]) == 0
    second, third = capsys.readouterr().err.splitlines()
    assert second.startswith("hearthd: warning: second cannot be served: ")
    assert third.startswith("hearthd: warning: third cannot be served: model 'third' is not installed")
    (tmp_path / "models/first/manifest.json").unlink()
    assert main(["check-config", "--quiet", "--config", str(file)]) == 78


def test_check_config_doubts_what_has_no_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = installed(tmp_path, "first", "second", "third")
    with file.open("a") as text:
        text.write(
            '[roles.kid]\nmodels = ["second", "nothere", "firts"]\n[roles.guest]\nmax_priority = "background"\n'
            '[roles.host]\ndefault_priority = "interactive"\nmax_priority = "normal"\n'
        )
    assert main(["check-config", "--quiet", "--config", str(file)]) == 0
    kid, host = capsys.readouterr().err.splitlines()
    assert kid == (
        "hearthd: warning: roles.kid.models has nothere, firts, which the daemon does not serve; it serves first, "
        "second, third"
    )
    assert host == (
        "hearthd: warning: roles.host.default_priority is interactive, more urgent than max_priority, normal; requests "
        "that ask for none get normal"
    )


def test_the_doctor_looks_at_every_model(tmp_path: Path) -> None:
    file = installed(tmp_path, "first", "second")
    found = list(diagnose(System(), lambda: load_config(file, {"HOME": str(tmp_path)}), is_quick=True))
    told = [finding.text for finding in found if finding.check == "model"]
    assert [text.partition(",")[0] for text in told[:2]] == ["first", "second"]
    assert "'third' is not installed" in told[2]
    (memory,) = (finding.text for finding in found if finding.check == "memory")
    assert "of further models" in memory


def test_memory_of_several_models_is_added_up_within_the_budget() -> None:
    first, second = NeededMemory(model=100, slots=10, prompt=5), NeededMemory(model=200, slots=20, prompt=6)
    assert first.beside(second).total == first.total + second.own
    assert first.beside(second).beside(second).total == first.total + 2 * second.own
    # What is over the budget is not loaded beside it.
    assert first.beside(second).beside(second, first.own + second.own).total == first.total + second.own
    assert first.beside(second, 1).total == first.total
