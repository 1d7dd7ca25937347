"""The token file: what is in it, who can read it, and that what was taken out is out at once."""

import os
import re
import stat
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hearthd.access.forward_clock import ForwardClock
from hearthd.access.tokens import TokenFile, create_token, list_tokens, revoke_token
from hearthd.errors import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state/tokens"


def test_a_token_is_256_random_bits_and_only_its_hash_is_kept(path: Path) -> None:
    tokens = [create_token(path, name) for name in ("kitchen", "cellar")]
    assert all(re.fullmatch(r"hearth_[A-Za-z0-9_-]{43}", token) for token in tokens)
    assert tokens[0] != tokens[1]
    kept = path.read_text()
    assert not any(token in kept or token.removeprefix("hearth_") in kept for token in tokens)
    assert [token.name for token in list_tokens(path)] == ["kitchen", "cellar"]


def test_only_the_owner_can_read_the_file(path: Path) -> None:
    create_token(path, "kitchen")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert sorted(file.name for file in path.parent.iterdir()) == ["tokens", "tokens.lock"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files for others")
def test_what_root_makes_beside_the_service_is_the_service_s(path: Path) -> None:
    path.parent.mkdir()
    os.chown(path.parent, 64321, 64322)
    create_token(path, "kitchen")
    # The lock too: pairing makes the next token in the service, under the same one.
    assert {(file.name, file.stat().st_uid, file.stat().st_gid) for file in path.parent.iterdir()} == {
        ("tokens", 64321, 64322),
        ("tokens.lock", 64321, 64322),
    }


def test_a_token_is_found_by_itself_and_by_nothing_else(path: Path) -> None:
    token = create_token(path, "kitchen")
    file = TokenFile(path)
    found = file.find(token)
    assert found is not None
    assert found.name == "kitchen"
    for wrong in ("", token[:-1], token + "x", token.upper(), found.digest, "kitchen", "hearth_\udcff"):
        assert file.find(wrong) is None


@given(st.text(max_size=100))
def test_no_text_finds_a_token(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "property/tokens"
    if not path.exists():
        create_token(path, "kitchen")
    assert TokenFile(path).find(text) is None


def test_a_revoked_token_is_refused_from_the_next_call_on(path: Path) -> None:
    kitchen, cellar = create_token(path, "kitchen"), create_token(path, "cellar")
    file = TokenFile(path)
    assert file.find(kitchen) is not None
    revoke_token(path, "kitchen")
    assert file.find(kitchen) is None
    assert file.find(cellar) is not None


def test_a_new_token_is_good_from_the_next_call_on(path: Path) -> None:
    create_token(path, "kitchen")
    file = TokenFile(path)
    assert file.find(create_token(path, "cellar")) is not None


def test_a_name_used_again_is_another_identity(path: Path) -> None:
    file_token = create_token(path, "kitchen")
    file = TokenFile(path)
    before = file.find(file_token)
    revoke_token(path, "kitchen")
    after = file.find(create_token(path, "kitchen"))
    assert before is not None
    assert after is not None
    assert before.identity != after.identity


def test_without_the_file_nobody_is_let_in(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    token = create_token(path, "kitchen")
    file = TokenFile(path)
    path.unlink()
    assert file.find(token) is None
    assert "cannot be read, no token is valid" in caplog.text


def test_a_line_that_is_no_token_lets_nobody_in_and_keeps_nobody_out(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token = create_token(path, "kitchen")
    file = TokenFile(path)
    path.write_text(path.read_text() + "cellar 1234 2026-01-01\nnonsense\n\n# a comment\n")
    assert file.find(token) is not None
    assert len(file) == 1
    assert "lines [3, 4] are no tokens" in caplog.text


def test_a_token_name_is_taken_once(path: Path) -> None:
    create_token(path, "kitchen")
    with pytest.raises(ConfigError, match="'kitchen' is taken"):
        create_token(path, "kitchen")
    assert len(list_tokens(path)) == 1


@pytest.mark.parametrize("name", ["", "a b", "a\nb", "-a", "ü", "x" * 65, "#a"])
def test_a_name_that_would_not_survive_the_file_is_refused(path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="give up to 64 of"):
        create_token(path, name)
    assert not path.exists()


def test_a_token_that_is_not_there_cannot_be_revoked(path: Path) -> None:
    create_token(path, "kitchen")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="there is no token 'cellar'"):
        revoke_token(path, "cellar")
    assert path.read_bytes() == before


def test_a_missing_file_is_told_with_the_remedy(path: Path) -> None:
    with pytest.raises(ConfigError, match="hearthd token create NAME"):
        TokenFile(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_file_that_others_may_use_is_refused(path: Path, mode: int) -> None:
    create_token(path, "kitchen")
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        TokenFile(path)


def test_a_file_with_a_wrong_line_is_refused_at_the_start(path: Path) -> None:
    create_token(path, "kitchen")
    path.write_text(path.read_text() + "nonsense\n")
    with pytest.raises(ConfigError, match="line 3"):
        TokenFile(path)


def test_a_file_that_is_too_large_is_refused(path: Path) -> None:
    create_token(path, "kitchen")
    path.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(ConfigError, match="more than"):
        TokenFile(path)


def test_a_link_in_place_of_the_new_file_is_not_followed(path: Path, tmp_path: Path) -> None:
    create_token(path, "kitchen")
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    Path(f"{path}.new").symlink_to(victim)
    create_token(path, "cellar")
    assert victim.read_text() == "untouched"
    assert not path.is_symlink()


def test_processes_that_create_at_once_lose_no_token(path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from hearthd.access.tokens import create_token\n"
        "for number in range(10): create_token(Path(sys.argv[1]), f'{sys.argv[2]}-{number}')"
    )
    workers = [subprocess.Popen([sys.executable, "-c", program, str(path), name]) for name in ("a", "b", "c")]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    assert len(list_tokens(path)) == 30


def test_a_token_has_a_role_and_an_expiry_that_survive_the_file(path: Path) -> None:
    create_token(path, "kitchen")
    create_token(path, "cellar", role="monitor")
    create_token(path, "guest", role="child", seconds_valid=86400)
    kitchen, cellar, guest = list_tokens(path)
    assert [(token.role, token.expires) for token in (kitchen, cellar)] == [("user", None), ("monitor", None)]
    assert guest.role == "child"
    assert guest.expires is not None
    day = datetime.fromisoformat(guest.expires) - datetime.fromisoformat(guest.created)
    assert day.total_seconds() == 86400


def test_a_file_of_version_0_1_is_read_and_one_without_roles_is_still_written_so(path: Path) -> None:
    token = create_token(path, "kitchen")
    old = re.compile(r"[A-Za-z0-9._-]+ [0-9a-f]{64} [0-9TZ:-]+")
    (line,) = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert old.fullmatch(line)
    found = TokenFile(path).find(token)
    assert found is not None
    assert (found.role, found.expires) == ("user", None)


def test_an_expired_token_is_refused_from_that_second_on_and_a_clock_set_back_does_not_revive_it(path: Path) -> None:
    token = create_token(path, "guest", seconds_valid=3600)
    start = datetime.fromisoformat(list_tokens(path)[0].created).timestamp()
    times = {"wall": start, "since_boot": 0.0}
    file = TokenFile(path, ForwardClock(lambda: times["wall"], lambda: times["since_boot"]).now)
    for seconds, is_valid in ((0.0, True), (3599.0, True), (3600.0, False)):
        times.update(wall=start + seconds, since_boot=seconds)
        assert (file.find(token) is not None) == is_valid
    times.update(wall=start - 365 * 86400)
    assert file.find(token) is None


def test_while_the_clock_is_set_back_time_goes_on(path: Path) -> None:
    token = create_token(path, "guest", seconds_valid=3600)
    start = datetime.fromisoformat(list_tokens(path)[0].created).timestamp()
    times = {"wall": start, "since_boot": 0.0}
    file = TokenFile(path, ForwardClock(lambda: times["wall"], lambda: times["since_boot"]).now)
    times.update(wall=start - 365 * 86400, since_boot=3599.0)
    assert file.find(token) is not None
    times.update(since_boot=3600.0)
    assert file.find(token) is None


@pytest.mark.parametrize(
    "rest", ["User", "user 2026-13-01T00:00:00Z", "user 0000-00-00T00:00:00Z", "user never x", "u;"]
)
def test_a_line_whose_role_or_expiry_is_none_lets_nobody_in(
    path: Path, caplog: pytest.LogCaptureFixture, rest: str
) -> None:
    token = create_token(path, "kitchen")
    file = TokenFile(path)
    path.write_text(path.read_text().rstrip("\n") + f" {rest}\n")
    assert file.find(token) is None
    assert "lines [2] are no tokens" in caplog.text


@pytest.mark.parametrize("role", ["", "Admin", "a b", "1a", "a\n", "x" * 33])
def test_a_role_that_would_not_survive_the_file_is_refused(path: Path, role: str) -> None:
    with pytest.raises(ConfigError, match="give up to 32 of"):
        create_token(path, "kitchen", role=role)
    assert not path.exists()
