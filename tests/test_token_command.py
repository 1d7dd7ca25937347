"""`hearthd token`: names, roles and times in words, and one clear line for what cannot be."""

import json
import os
import re
from datetime import datetime
from pathlib import Path

import pytest

from hearthd.__main__ import main
from hearthd.access.tokens import create_token, list_tokens
from hearthd.configuration import paths


@pytest.fixture(autouse=True)
def token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give hearthd places of the test's own, as systemd would."""
    for name in [name for name in os.environ if name.startswith("HEARTHD_")]:
        monkeypatch.delenv(name)
    for name in ("STATE", "RUNTIME", "CONFIGURATION"):
        monkeypatch.setenv(f"{name}_DIRECTORY", str(tmp_path / name.lower()))
    return tmp_path / "state/tokens"


def configure(token_file: Path, text: str) -> None:
    file = token_file.parent.parent / "configuration/hearthd.toml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("words", "seconds"),
    [("90m", 5400), ("12h", 43200), ("30d", 2592000), ("2w", 1209600), ("100y", 3153600000)],
)
def test_a_token_lives_as_long_as_it_is_told(token_file: Path, words: str, seconds: int) -> None:
    assert main(["token", "create", "guest", "--expires", words]) == 0
    (token,) = list_tokens(token_file)
    assert token.expires is not None
    lives = datetime.fromisoformat(token.expires) - datetime.fromisoformat(token.created)
    assert lives.total_seconds() == seconds


@pytest.mark.parametrize("words", ["", "0d", "-1d", "30", "d", "1.5h", "101y", "9999999999d", "1 d", "30D"])
def test_what_is_no_time_is_wrong_usage(token_file: Path, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["token", "create", "guest", f"--expires={words}"])
    assert caught.value.code == 2
    assert "give for example 12h, 30d or 1y, at most 100y" in capsys.readouterr().err
    assert not token_file.exists()


def test_a_role_must_be_built_in_or_configured(token_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "create", "screen", "--role", "monitor"]) == 0
    capsys.readouterr()
    assert main(["token", "create", "phone", "--role", "guest"]) == 78
    assert capsys.readouterr().err == (
        "hearthd: there is no role 'guest'; give one of admin, user, monitor, or add a section [roles.NAME] to the "
        "configuration first\n"
    )
    configure(token_file, '[roles.guest]\nmethods = ["chat"]')
    assert main(["token", "create", "phone", "--role", "guest"]) == 0
    assert [(token.name, token.role) for token in list_tokens(token_file)] == [
        ("screen", "monitor"),
        ("phone", "guest"),
    ]


def test_a_token_that_nobody_asks_for_says_so(token_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = (
        f"hearthd: callers need no token until {token_file.parent.parent}/configuration/hearthd.toml has [auth] "
        'token_file = "{}" and the daemon is restarted'
    )
    assert main(["token", "create", "phone"]) == 0
    assert capsys.readouterr().err.splitlines()[1:] == [said.format("auto")]
    other = token_file.parent / "other"
    assert main(["token", "create", "phone", "--token-file", str(other)]) == 0
    assert capsys.readouterr().err.splitlines()[1:] == [said.format(other)]
    configure(token_file, '[auth]\ntoken_file = "auto"')
    assert main(["token", "create", "tablet"]) == 0
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_list_says_role_dates_and_what_is_not_valid(token_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create_token(token_file, "kitchen")
    create_token(token_file, "old", role="monitor", seconds_valid=-1)
    create_token(token_file, "odd", role="guest")
    assert main(["token", "list"]) == 0
    date = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    kitchen, old, odd = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"kitchen\tuser\t{date}\tnever", kitchen)
    assert re.fullmatch(rf"old\tmonitor\t{date}\t{date} \(expired\)", old)
    assert re.fullmatch(rf"odd\tguest\t{date}\tnever \(role guest is not configured: no rights\)", odd)

    assert main(["token", "list", "--json"]) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    assert [(each["name"], each["role"], each["is_expired"]) for each in tokens] == [
        ("kitchen", "user", False),
        ("old", "monitor", True),
        ("odd", "guest", False),
    ]
    assert tokens[0]["expires"] is None
    assert all(re.fullmatch(date, tokens[1][key]) for key in ("created", "expires"))


def test_a_token_file_that_systemd_copies_is_read_and_changed_where_it_comes_from(
    token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(token_file, '[auth]\ntoken_file = "$CREDENTIALS_DIRECTORY/tokens"\n')
    assert main(["token", "list"]) == 78
    assert "as root, while it runs" in capsys.readouterr().err
    # What root finds of the running service.
    credentials = tmp_path / "credentials/hearthd.service"
    environment = paths.service_environment({}, credentials=credentials.parent)
    assert environment == {}
    credentials.mkdir(parents=True)
    environment = paths.service_environment({}, credentials=credentials.parent)
    assert environment == {"CREDENTIALS_DIRECTORY": str(credentials)}
    monkeypatch.setenv(*environment.popitem())
    create_token(credentials / "tokens", "phone")
    assert main(["token", "list"]) == 0
    assert capsys.readouterr().out.startswith("phone\t")
    for words in (["create", "guest"], ["revoke", "phone"]):
        assert main(["token", *words]) == 78
        assert "change the file that it is made of, with --token-file" in capsys.readouterr().err
    assert main(["token", "create", "guest", "--token-file", str(tmp_path / "credstore")]) == 0
    assert [token.name for token in list_tokens(tmp_path / "credstore")] == ["guest"]


def test_no_device_is_paired_by_a_token_file_that_systemd_copies(
    token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    configure(token_file, '[tls]\ndirectory = "auto"\n[auth]\ntoken_file = "$CREDENTIALS_DIRECTORY/tokens"\n')
    assert main(["pair", "phone", "--address", "192.0.2.1"]) == 78
    assert 'no device can be added to; set it to "auto"' in capsys.readouterr().err
