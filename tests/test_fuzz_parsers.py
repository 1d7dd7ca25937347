"""Every parser takes what it is given, or refuses it by its own error: broken, cut, nested, hostile.

One case is a good sample with a few changes. Nothing else comes out than a value or the error that the parser names, in
one line, and within seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from bundles import TINY_MANIFEST, tiny_model
from checkpoints import tiny_models, write_gguf, write_huggingface
from hearth._address import parse_address
from hearth._errors import ConfigurationError
from hearth._pairing_code import parse_code
from hearthd.access.daily_usage import DailyUsage
from hearthd.access.token_command import _lifetime
from hearthd.access.tokens import create_token, list_tokens
from hearthd.build.checkpoints.gguf_file import GgufFile
from hearthd.build.checkpoints.onnx_file import OnnxFile
from hearthd.build.checkpoints.safetensors_file import SafetensorsFile
from hearthd.bundles.external_locations import external_locations
from hearthd.bundles.manifest import Manifest
from hearthd.configuration.config import AuthConfig, ServerConfig, TlsConfig, load_config
from hearthd.errors import BuildError, BundleError, ConfigError, InvalidRequestError
from hearthd.listening.listeners import find_listeners
from hearthd.pairing.code import make_code
from hearthd.pairing.records import PairingRecords
from hearthd.policy.phrases import read_phrase
from hearthd.policy.policy_file import parse_policy
from hearthd.text.chat_template import ChatTemplate
from hearthd.text.chat_template import Message as DaemonMessage
from hearthd.text.tokenizer import ChatTokenizer
from tiny_tokenizers import CHATML, TEMPLATES, byte_level

EOS_ID = Tokenizer.from_str(byte_level()).token_to_id("<|im_end|>")
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Parser:
    """read: of a file with the input. error: what it may raise. sample: makes a good input in a directory."""

    read: Callable[[Path], object]
    error: type[Exception] | tuple[type[Exception], ...]
    sample: Callable[[Path], bytes]


def text_of(path: Path) -> str:
    # As arguments and files come that are no UTF-8.
    return path.read_bytes().decode("utf-8", "replace")


def sample_configuration(_: Path) -> bytes:
    # With every key, none commented out.
    return re.sub(rb"(?m)^#(?=[a-z_]+ = )", b"", (ROOT / "deploy/hearthd.toml").read_bytes())


def read_graph(path: Path) -> object:
    path.with_name("model.data").write_bytes(bytes(64))
    return OnnxFile(path)


def read_tokens(path: Path) -> object:
    path.chmod(0o600)
    return list_tokens(path)


def sample_tokens(directory: Path) -> bytes:
    path = directory / "tokens"
    create_token(path, "phone", seconds_valid=100.0)
    create_token(path, "tv", role="monitor")
    return path.read_bytes()


def read_tokenizer(path: Path) -> object:
    tokenizer = ChatTokenizer(text_of(path), CHATML, eos_ids=[EOS_ID])
    return tokenizer.encode_chat([DaemonMessage("user", "hello <|im_end|> \u00e9")])


def read_template(path: Path) -> object:
    template = ChatTemplate(text_of(path), bos_token="<s>", eos_token="</s>")
    return template.render([{"role": "user", "content": "hello"}], add_generation_prompt=True)


def read_usage(path: Path) -> object:
    return DailyUsage(path, lambda: 1_800_000_000.0).used("token:phone")


def sample_usage(directory: Path) -> bytes:
    usage = DailyUsage(directory / "usage.json", lambda: 1_800_000_000.0)
    usage.add("token:phone", 12)
    asyncio.run(usage.save())
    return (directory / "usage.json").read_bytes()


SECRET = bytes(range(12))


def read_pairing(path: Path) -> object:
    records = PairingRecords(path.with_name("tokens"))
    records.directory.mkdir(exist_ok=True)
    path.replace(records._path(SECRET))
    return records.find(SECRET)


def sample_pairing(directory: Path) -> bytes:
    records = PairingRecords(directory / "tokens")
    return records._path(records.create("phone", "user", seconds=600)).read_bytes()


def sample_of_model(write: Callable[..., object], name: str) -> Callable[[Path], bytes]:
    def sample(directory: Path) -> bytes:
        target = directory / name
        if name.endswith(".gguf"):
            write(target, tiny_models()["smollm2"])
            # The header; of the weights every byte means something.
            return target.read_bytes()[:6000]
        write(directory, tiny_models()["smollm2"])
        return target.read_bytes()[:6000]

    return sample


def listeners(path: Path) -> object:
    def numeric_only(host: str, port: int, **options: int) -> object:
        # Nobody's name server is asked for what is made up here.
        options["flags"] |= socket.AI_NUMERICHOST
        return getaddrinfo(host, port, **options)

    getaddrinfo = socket.getaddrinfo
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", numeric_only)
        return find_listeners(ServerConfig(tcp=(text_of(path),), unix_socket=None), TlsConfig(), AuthConfig())


CODE = make_code(["board.local", "192.168.1.7"], 50051, bytes(range(32)), bytes(range(12)))
PARSERS = {
    "hearthd.toml": Parser(lambda path: load_config(path, {"HOME": "/home/x"}), ConfigError, sample_configuration),
    "token file": Parser(read_tokens, ConfigError, sample_tokens),
    "policy": Parser(
        lambda path: parse_policy(path.read_bytes()), ValueError, lambda _: (ROOT / "docs/policy.md").read_bytes()
    ),
    "phrase": Parser(
        lambda path: read_phrase(text_of(path), is_whole_words=True),
        ValueError,
        lambda _: b"how to * a bomb?",
    ),
    "manifest": Parser(
        lambda path: Manifest.from_json(text_of(path)), BundleError, lambda _: TINY_MANIFEST.to_json().encode()
    ),
    "bundle's graph": Parser(lambda path: external_locations(path.read_bytes()), BundleError, lambda _: tiny_model()),
    "tokenizer.json": Parser(read_tokenizer, (BundleError, InvalidRequestError), lambda _: byte_level().encode()),
    "chat template": Parser(read_template, (BundleError, InvalidRequestError), lambda _: "".join(TEMPLATES).encode()),
    "GGUF": Parser(GgufFile, BuildError, sample_of_model(write_gguf, "tiny.gguf")),
    "safetensors": Parser(SafetensorsFile, BuildError, sample_of_model(write_huggingface, "model.safetensors")),
    "ONNX": Parser(read_graph, BuildError, lambda _: tiny_model()),
    "usage file": Parser(read_usage, ConfigError, sample_usage),
    "pairing record": Parser(read_pairing, ConfigError, sample_pairing),
    "address of a client": Parser(
        lambda path: parse_address(text_of(path)), ConfigurationError, lambda _: b"raspberrypi.local:50051"
    ),
    "address of the daemon": Parser(listeners, ConfigError, lambda _: b"127.0.0.1:50051"),
    "lifetime": Parser(lambda path: _lifetime(text_of(path)), argparse.ArgumentTypeError, lambda _: b"30d"),
    "pairing code": Parser(lambda path: parse_code(text_of(path)), ConfigurationError, lambda _: CODE.encode()),
}
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.one_of(
            st.tuples(st.just("flip"), st.integers(0, 7)),
            st.tuples(st.just("insert"), st.binary(min_size=1, max_size=12)),
            st.tuples(st.just("text"), st.text(max_size=6).map(lambda text: text.encode("utf-8", "surrogatepass"))),
            st.tuples(
                st.just("insert"),
                st.sampled_from(
                    [
                        b"\0",
                        b"\xff" * 8,
                        b"[" * 3000,
                        b'{"a":' * 3000,
                        b"(" * 500,
                        b"-1",
                        b"1e999",
                        b"NaN",
                        b'"',
                        b"\n",
                        b"{{",
                    ]
                ),
            ),
            st.tuples(st.just("many"), st.sampled_from([b"[", b'{"a":', b"(", b"a", b"{{", b"- "])),
            st.tuples(st.just("delete"), st.integers(1, 40)),
            st.tuples(st.just("cut"), st.just(0)),
            st.tuples(st.just("double"), st.integers(1, 200)),
        ),
    ),
    max_size=5,
)


def changed(data: bytes, edits: list[tuple[float, tuple[str, object]]]) -> bytes:
    for where, (kind, value) in edits:
        place = int(where * len(data))
        match kind, value:
            case "flip", int(bit) if place < len(data):
                data = data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
            case (("insert" | "text"), bytes(inserted)):
                data = data[:place] + inserted + data[place:]
            case "many", bytes(repeated):
                data = data[:place] + repeated * 3000 + data[place:]
            case "delete", int(number):
                data = data[:place] + data[place + number :]
            case "double", int(number):
                data = data[:place] + data[place : place + number] + data[place:]
            case "cut", _:
                data = data[:place]
    return data


class Samples:
    """The good inputs, each made once."""

    def __init__(self, directory: Path) -> None:
        self._of = {name: parser.sample(directory) for name, parser in PARSERS.items()}

    def __getitem__(self, name: str) -> bytes:
        return self._of[name]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return Samples(tmp_path_factory.mktemp("samples"))


@pytest.mark.parametrize("name", PARSERS)
@given(edits=EDITS, whole=st.one_of(st.none(), st.binary(max_size=60)))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_anything_is_read_or_refused_in_one_line(
    name: str,
    edits: list[tuple[float, tuple[str, object]]],
    whole: bytes | None,
    samples: Samples,
    tmp_path: Path,
) -> None:
    parser, path = PARSERS[name], tmp_path / "input"
    path.write_bytes(changed(samples[name] if whole is None else whole, edits))
    said = "read"
    try:
        parser.read(path)
    except parser.error as error:
        said = str(error)
    assert 0 < len(said) < 2000
    assert "\n" not in said


# The others' samples are parts of a file, or stand in another.
@pytest.mark.parametrize("name", [name for name in PARSERS if name not in ("policy", "GGUF", "safetensors")])
def test_the_sample_itself_is_read(name: str, samples: Samples, tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(samples[name])
    assert PARSERS[name].read(path) is not None
