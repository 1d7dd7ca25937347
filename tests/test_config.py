"""The configuration: what is read from where, and that whatever nobody can have meant is refused with the remedy."""

import itertools
import json
import os
import re
import tempfile
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hearthd.configuration import config as config_module
from hearthd.configuration import paths
from hearthd.configuration.config import Config, EngineConfig, ModelConfig, ServerConfig, load_config
from hearthd.configuration.roles import BUILT_IN, Role
from hearthd.errors import ConfigError

ENVIRONMENT = {"HOME": "/home/pi", "XDG_RUNTIME_DIR": "/run/user/1000"}
SHIPPED = Path(__file__).parent.parent / "deploy/hearthd.toml"
# [roles.NAME] and [models.NAME] are sections of sections.
SECTIONS = [section for section in fields(Config) if section.name not in ("roles", "model_options")]


def write(directory: Path, text: str) -> Path:
    file = directory / "hearthd.toml"
    file.write_text(text)
    return file


def load(directory: Path, text: str, **environment: str) -> Config:
    return load_config(write(directory, text), ENVIRONMENT | environment)


def refusal(directory: Path, text: str, **environment: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(directory, text, **environment)
    message = str(caught.value)
    assert "\n" not in message
    return message


def uncommented(text: str) -> str:
    return re.sub(r"^#(?=[a-z_]+ = )", "", text, flags=re.MULTILINE)


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "") == load_config(None, ENVIRONMENT | {"XDG_CONFIG_HOME": str(tmp_path / "nothing")})
    assert load(tmp_path, "").engine == EngineConfig()


def test_the_shipped_file_changes_nothing(tmp_path: Path) -> None:
    assert load(tmp_path, SHIPPED.read_text()) == load(tmp_path, "")


def test_the_shipped_file_names_the_unit_limit_that_connections_need() -> None:
    unit = SHIPPED.parent / "systemd/hearthd.service"
    found = re.search(r"^LimitNOFILE=(\d+)$", unit.read_text(), flags=re.MULTILINE)
    assert found
    about = SHIPPED.read_text().partition("#max_connections =")[0].rpartition("\n\n")[2]
    assert found[0] in about
    bound = re.search(r"more than (\d+), raise", about)
    assert bound
    # Twice, for TCP and Unix, and a hundred for files, threads and the listening sockets.
    assert ServerConfig().max_connections <= int(bound[1]) <= (int(found[1]) - 100) // 2


def test_the_shipped_file_shows_every_key_with_its_default(tmp_path: Path) -> None:
    text = uncommented(SHIPPED.read_text())
    shown = {section: set(table) for section, table in tomllib.loads(text).items()}
    known = {each.name: {key.name for key in fields(getattr(load(tmp_path, ""), each.name))} for each in SECTIONS}
    assert shown == known
    assert load(tmp_path, text) == load(tmp_path, "")


def test_the_shipped_file_shows_every_key_of_a_role_with_its_default(tmp_path: Path) -> None:
    example = SHIPPED.read_text().partition("#   [roles.guest]\n")[2].partition("\n\n")[0]
    lines = [line.removeprefix("#   ") for line in example.splitlines() if re.match(r"#   [a-z_]+ = ", line)]
    shown = tomllib.loads("\n".join(lines))
    assert shown == {key.name: getattr(Role(), key.name) for key in fields(Role)} | {
        "methods": list(Role().methods),
        "models": [],
    }
    assert load(tmp_path, "\n".join(["[roles.guest]", *lines])).roles["guest"] == Role()


def test_a_role_of_the_file_joins_the_built_in_ones_and_may_change_keys_of_them(tmp_path: Path) -> None:
    text = (
        '[roles.guest]\nmethods = ["chat"]\nmodels = ["a"]\ntokens_per_day = 9\n[roles.user]\nrequests_per_minute = 7'
    )
    config = load(tmp_path, text)
    assert list(config.roles) == ["admin", "user", "monitor", "guest"]
    assert config.roles["guest"] == Role(methods=("chat",), models=("a",), tokens_per_day=9)
    assert config.roles["user"] == Role(requests_per_minute=7)
    assert config.roles["monitor"] == BUILT_IN["monitor"]
    told = config_module.role_settings(config)
    assert told["roles.guest.tokens_per_day"] == 9
    assert {name.split(".")[1] for name in told} == {"guest", "user"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("roles = 1", "write [roles.NAME]"),
        ("[roles]\nguest = 1", "roles.guest is 1; write [roles.guest]"),
        ("[roles.Guest]", "roles.Guest cannot be a role's name; give up to 32 of"),
        ("[roles.guest]\nmethod = []", "there is no key 'method'; did you mean methods?"),
        ('[roles.guest]\nmethods = ["talk"]', "'talk' is none of all, chat, models"),
        ('[roles.guest]\nmethods = ["chat", "chat"]', "each at most once"),
        ("[roles.guest]\nrequests_per_minute = -1", "0 to 1000000"),
        ("[roles.guest]\ntokens_per_day = true", "0 to 1000000000000"),
        ("[roles.guest]\nmax_concurrent_chats = 1.5", "0 to 1024"),
        (
            '[auth]\nopen_role = "guest"',
            "auth.open_role is 'guest'; give one of admin, user, monitor, or add [roles.guest]",
        ),
        ('[auth]\ncertificates = {"a.lan" = "guest"}', "auth.certificates of 'a.lan' is 'guest'; give one of admin"),
        ('[auth]\ncertificates = {"a b" = "user"}', "names of client certificates with their roles"),
        ('[auth]\ncertificates = {"a.lan" = 1}', "names of client certificates with their roles"),
        ('[auth]\ncertificates = ["a.lan"]', "a table of at most 1024"),
    ],
)
def test_a_wrong_role_is_refused_by_name(tmp_path: Path, text: str, reason: str) -> None:
    assert reason in refusal(tmp_path, text)


def test_certificates_can_be_set_from_the_environment(tmp_path: Path) -> None:
    pairs = (("phone.lan", "user"), ("tv.lan", "monitor"))
    assert load(tmp_path, '[auth.certificates]\n"phone.lan" = "user"\n"tv.lan" = "monitor"').auth.certificates == pairs
    assert load(tmp_path, "", HEARTHD_AUTH_CERTIFICATES="phone.lan=user, tv.lan = monitor").auth.certificates == pairs
    assert "HEARTHD_AUTH_CERTIFICATES is" in refusal(tmp_path, "", HEARTHD_AUTH_CERTIFICATES="phone.lan")


def test_the_shipped_file_says_something_about_every_key() -> None:
    lines = SHIPPED.read_text().splitlines()
    silent = [
        line
        for before, line in itertools.pairwise(lines)
        if re.match(r"#[a-z_]+ = ", line) and not before.startswith(("# ", "#key", "#certificate"))
    ]
    assert silent == []


def test_the_environment_goes_before_the_file(tmp_path: Path) -> None:
    text = '[engine]\nslots = 3\nthreads = 2\n[server]\ntcp = ["127.0.0.1:1"]\nallow_insecure_lan = false'
    config = load(
        tmp_path,
        text,
        HEARTHD_ENGINE_SLOTS="5",
        HEARTHD_SERVER_TCP="127.0.0.1:50052, [::1]:50052",
        HEARTHD_SERVER_ALLOW_INSECURE_LAN="True",
        HEARTHD_SERVER_DRAIN_GRACE_SECONDS="1.5",
        HEARTHD_AUTH_TOKEN_FILE="/etc/tokens",
        HEARTHD_LOG_LEVEL="debug",
    )
    assert (config.engine.slots, config.engine.threads) == (5, 2)
    assert config.server.tcp == ("127.0.0.1:50052", "[::1]:50052")
    assert config.server.allow_insecure_lan is True
    assert config.server.drain_grace_seconds == 1.5
    assert config.auth.token_file == Path("/etc/tokens")
    assert config.log.level == "debug"


def test_an_empty_variable_means_an_empty_list(tmp_path: Path) -> None:
    assert load(tmp_path, "", HEARTHD_SERVER_TCP="").server.tcp == ()


def test_hearthd_config_names_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "[engine]\nslots = 7")
    assert load_config(None, ENVIRONMENT | {"HEARTHD_CONFIG": str(file)}).engine.slots == 7


def test_auto_finds_the_places_of_this_user(tmp_path: Path) -> None:
    environment = {"STATE_DIRECTORY": "/var/lib/hearth", "RUNTIME_DIRECTORY": "/run/hearth"}
    config = load(tmp_path, '[auth]\ntoken_file = "auto"', **environment)
    assert config.server.unix_socket == Path("/run/hearth/hearthd.sock")
    assert config.model.directory == Path("/var/lib/hearth/models")
    assert config.auth.token_file == Path("/var/lib/hearth/tokens")


def test_a_misspelt_key_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    message = refusal(tmp_path, "[engine]\nslot = 3")
    assert "[engine]: there is no key 'slot'; did you mean slots?" in message


def test_a_misspelt_section_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    assert "there is no section 'sever'; did you mean server?" in refusal(tmp_path, "[sever]\n")


def test_a_misspelt_variable_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    message = refusal(tmp_path, "", HEARTHD_SERVER_TPC="x")
    assert "no variable 'HEARTHD_SERVER_TPC'; did you mean HEARTHD_SERVER_TCP?" in message


@pytest.mark.parametrize(
    ("section", "key", "value", "limit"),
    [
        ("engine", "slots", "0", "1 to 64"),
        ("engine", "slots", "65", "1 to 64"),
        ("engine", "slots", "true", "1 to 64"),
        ("engine", "slots", "2.0", "1 to 64"),
        ("engine", "max_answer_seconds", "nan", "1 to 86400"),
        ("engine", "max_answer_seconds", "inf", "1 to 86400"),
        ("server", "drain_grace_seconds", "-1", "0 to 3600"),
        ("server", "tcp", '"127.0.0.1:1"', "list"),
        ("server", "tcp", "[1]", "list"),
        ("server", "unix_socket", '"relative"', "absolute path"),
        ("server", "unix_socket", f'"/{"x" * 107}"', "at most 107"),
        ("server", "unix_socket_mode", "660", "octal string"),
        ("server", "unix_socket_mode", '"1777"', "octal string"),
        ("server", "allow_insecure_lan", '"yes"', "true or false"),
        ("model", "name", '"../etc"', "a-z, 0-9"),
        ("model", "directory", '""', "absolute path"),
        ("limits", "max_request_bytes", "9999999999", "1024 to 4194304"),
        ("log", "level", '"loud"', "debug, info, warning, error"),
    ],
)
def test_a_wrong_value_is_refused_with_key_value_and_limit(
    tmp_path: Path, section: str, key: str, value: str, limit: str
) -> None:
    message = refusal(tmp_path, f"[{section}]\n{key} = {value}")
    assert f"{section}.{key} is " in message
    assert limit in message
    shown = str(tomllib.loads(f"x = {value}")["x"])
    assert shown[:60] in message


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ENGINE_SLOTS", "many"),
        ("ENGINE_SLOTS", "1" * 30),
        ("ENGINE_MAX_ANSWER_SECONDS", "soon"),
        ("AUTH_HEALTH_OPEN", "1"),
    ],
)
def test_a_wrong_variable_is_refused_with_its_name_and_text(tmp_path: Path, variable: str, value: str) -> None:
    message = refusal(tmp_path, "", **{f"HEARTHD_{variable}": value})
    assert message.startswith(f"HEARTHD_{variable} is {value!r}; give ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[server]\nunix_socket = ""\ntcp = []', "both empty"),
        ('[tls]\ncertificate = "/c.pem"', "tls.key is missing"),
        ('[tls]\nkey = "/k.pem"', "tls.certificate is missing"),
        ("[auth]\nunix_needs_token = true", "auth.token_file is empty"),
        ("[engine]\ncontext_length = 64\nprefill_chunk = 65", "at most engine.context_length, 64"),
        ("engine = 1", "it is a section"),
        ("[engine", "is not TOML"),
        ("x = 1", "no section 'x'"),
    ],
)
def test_values_that_do_not_go_together_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    assert reason in refusal(tmp_path, text)


def test_a_path_may_begin_with_the_directory_of_systemds_credentials(tmp_path: Path) -> None:
    text = '[tls]\ndirectory = "$CREDENTIALS_DIRECTORY"\n[auth]\ntoken_file = "$CREDENTIALS_DIRECTORY/tokens"\n'
    config = load(tmp_path, text, CREDENTIALS_DIRECTORY="/run/credentials/hearthd.service")
    assert str(config.tls.directory) == "/run/credentials/hearthd.service"
    assert str(config.auth.token_file) == "/run/credentials/hearthd.service/tokens"
    assert "tls.directory is '$CREDENTIALS_DIRECTORY', and systemd has passed no credentials" in refusal(tmp_path, text)
    # Nothing else is taken for a variable.
    other = '[auth]\ntoken_file = "$CREDENTIALS_DIRECTORY_/tokens"\n'
    assert "give an absolute path" in refusal(tmp_path, other, CREDENTIALS_DIRECTORY="/run/credentials/x")


def test_who_may_read_a_credential_is_systemds_affair() -> None:
    environment = {"CREDENTIALS_DIRECTORY": "/run/credentials/hearthd.service"}
    assert paths.is_credential(Path("/run/credentials/hearthd.service/tokens"), environment)
    assert not paths.is_credential(Path("/var/lib/hearth/tokens"), environment)
    # Root, in a shell, looks at what the service has.
    assert paths.is_credential(Path("/run/credentials/hearthd.service/tokens"), {})
    assert not paths.is_credential(Path("/etc/credstore/hearth.tokens"), {})


def test_two_sockets_on_one_path_are_refused(tmp_path: Path) -> None:
    text = '[server]\nunix_socket = "/run/x"\ntls_socket = "/run/x"\n'
    assert "one speaks TLS and the other does not" in refusal(tmp_path, text)


def test_a_named_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_config(tmp_path / "missing.toml", ENVIRONMENT)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(None, ENVIRONMENT | {"HEARTHD_CONFIG": str(tmp_path / "missing.toml")})


def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(tmp_path / "binary", ENVIRONMENT)
    (tmp_path / "big").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(ConfigError, match="more than"):
        load_config(tmp_path / "big", ENVIRONMENT)


@pytest.mark.parametrize(
    ("written", "size"), [("0", 0), ("5000", 5000), ('"64M"', 64 * 2**20), ('"3K"', 3072), ('"2G"', 2**31)]
)
def test_a_size_is_a_number_or_one_with_a_unit(tmp_path: Path, written: str, size: int) -> None:
    assert load(tmp_path, f"[engine]\nkv_bytes = {written}").engine.kv_bytes == size
    assert load(tmp_path, "", HEARTHD_ENGINE_KV_BYTES=written.strip('"')).engine.kv_bytes == size


@pytest.mark.parametrize("written", ['"64"', '"64 M"', '"64MB"', '"-1M"', "-1", "1.5", '"9999999G"', "true"])
def test_a_size_of_another_form_is_refused(tmp_path: Path, written: str) -> None:
    with pytest.raises(ConfigError, match='a string such as "64M": a whole number with K, M or G, powers of 1024'):
        load(tmp_path, f"[engine]\nkv_bytes = {written}")


def test_zero_threads_are_the_cpus_that_this_process_may_use() -> None:
    assert EngineConfig().num_threads == len(os.sched_getaffinity(0))
    assert EngineConfig(threads=3).num_threads == 3


def test_every_key_can_be_set_from_the_environment(tmp_path: Path) -> None:
    config = load(tmp_path, "")
    written = {}
    for key, value in config_module.settings(config).items():
        text = f"0{value:o}" if key.endswith("_mode") else ",".join(value) if isinstance(value, tuple) else value
        written["HEARTHD_" + key.upper().replace(".", "_")] = "" if text is None else str(text)
    assert load(tmp_path, "", **written) == config


KEYS = [(section.name, key.name) for section in SECTIONS for key in fields(section.type)]  # type: ignore[arg-type]
VALUES = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.booleans(),
    st.text(st.characters(codec="ascii"), max_size=200),
    st.lists(st.integers(0, 9)),
    st.lists(st.text(st.characters(codec="ascii"))),
)


@settings(deadline=None)
@given(st.sampled_from(KEYS), VALUES)
def test_any_value_is_taken_or_refused_by_name(key: tuple[str, str], value: object) -> None:
    # JSON's texts, numbers and lists are TOML's, but for the names of the odd floats.
    written = repr(value) if isinstance(value, float) else json.dumps(value).replace("\x7f", "\\u007f")
    with tempfile.TemporaryDirectory() as directory:
        try:
            load(Path(directory), f"[{key[0]}]\n{key[1]} = {written}")
            message = f"{key[0]}."
        except ConfigError as error:
            message = str(error)
    assert f"{key[0]}." in message
    assert "\n" not in message


def test_paths_prefer_systemd_then_root_then_xdg() -> None:
    systemd = {"STATE_DIRECTORY": "/var/lib/private/hearth:/other", "RUNTIME_DIRECTORY": "/run/x"} | ENVIRONMENT
    assert paths.state_directory(systemd, is_root=True) == Path("/var/lib/private/hearth")
    assert paths.unix_socket(systemd, is_root=False) == Path("/run/x/hearthd.sock")
    assert paths.configuration_file({"CONFIGURATION_DIRECTORY": "/etc/x"}, is_root=False) == Path("/etc/x/hearthd.toml")

    assert paths.state_directory(ENVIRONMENT, is_root=True) == Path("/var/lib/hearth")
    assert paths.unix_socket(ENVIRONMENT, is_root=True) == Path("/run/hearth/hearthd.sock")
    assert paths.configuration_file(ENVIRONMENT, is_root=True) == Path("/etc/hearth/hearthd.toml")

    assert paths.model_directory(ENVIRONMENT, is_root=False) == Path("/home/pi/.local/share/hearth/models")
    assert paths.model_directory(ENVIRONMENT | {"XDG_DATA_HOME": "/d"}, is_root=False) == Path("/d/hearth/models")
    assert paths.unix_socket(ENVIRONMENT, is_root=False) == Path("/run/user/1000/hearth/hearthd.sock")
    assert paths.configuration_file(ENVIRONMENT, is_root=False) == Path("/home/pi/.config/hearth/hearthd.toml")


def test_the_socket_is_never_below_tmp() -> None:
    bare = paths.unix_socket({"HOME": "/home/pi"}, is_root=False)
    assert bare == Path("/home/pi/.local/share/hearth/run/hearthd.sock")


def test_relative_directories_of_the_environment_are_ignored() -> None:
    assert paths.state_directory({"HOME": "/h", "XDG_DATA_HOME": "data"}, is_root=False) == Path(
        "/h/.local/share/hearth"
    )


def test_the_tree_cannot_be_changed() -> None:
    config = Config(model=ModelConfig(directory=Path("/m")))
    with pytest.raises(AttributeError):
        config.engine.slots = 9  # type: ignore[misc]
