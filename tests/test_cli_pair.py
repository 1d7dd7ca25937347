"""Pairing end to end: a daemon of its own process, `hearthd pair`, `hearth pair` and `hearth ask`, in fresh homes."""

import json
import os
import pty
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import hearth
from hearth.__main__ import main as hearth_program
from hearth._certificate import fingerprint
from hearth._paired import PairedDaemon
from hearthd import durable_file
from hearthd.__main__ import main as hearthd_program
from hearthd.access.tokens import create_token, list_tokens
from hearthd.bundles.bundle import Bundle
from hearthd.configuration.config import load_config
from hearthd.listening.tls import Certificate, find_files, read_certificate
from paired_board import Board, Device, Running, free_port
from serving import asynchronous


@pytest.fixture
def start() -> Iterator[Callable[[Board], Running]]:
    running: list[Running] = []

    def start_daemon(board: Board) -> Running:
        board.prepare()
        running.append(Running(board))
        return running[-1].wait()

    yield start_daemon
    for each in running:
        each.stop()


@pytest.fixture
def board(tmp_path: Path) -> Board:
    made = Board(tmp_path / "board", free_port())
    made.directory.mkdir()
    made.write_usual()
    return made


@pytest.fixture
def device(tmp_path: Path) -> Device:
    (tmp_path / "home").mkdir()
    return Device(tmp_path / "home")


HOST = socket.gethostname().partition(".")[0]


def test_two_commands_and_a_question(board: Board, device: Device, start: Callable[[Board], Running]) -> None:
    # The first code makes the certificate, without which the daemon does not start.
    code = board.code("phone")
    running = start(board)
    paired = device.hearth("pair", code)
    assert (paired.returncode, paired.stdout) == (
        0, f"paired with {HOST} at 127.0.0.1:{board.port}, as phone (role user)\n",
    ), paired.stderr  # fmt: skip
    asked = device.hearth("ask", "hello")
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout
    assert f"at 127.0.0.1:{board.port}" in device.hearth("status").stdout
    assert "TestForCausalLM" in device.hearth("models").stdout
    listed = json.loads(device.hearth("pair", "--list", "--json").stdout)
    assert [each["name"] for each in listed["daemons"]] == [HOST]

    (stored,) = device.daemons.directory.iterdir()
    assert [each.stat().st_mode & 0o777 for each in (stored.parent, stored)] == [0o700, 0o600]
    token = device.daemons.read(HOST).token
    for shown in (paired, asked, device.hearth("pair", "--list")):
        assert token not in shown.stdout + shown.stderr
    assert token not in running.log
    assert token not in json.dumps(listed)

    again = device.hearth("pair", code)
    assert (again.returncode, again.stdout) == (1, "")
    assert "it was used, or has expired" in again.stderr
    # What was stored before still works; revoked, it does not.
    assert device.hearth("status").returncode == 0
    assert board.hearthd("token", "revoke", "phone").returncode == 0
    refused = device.hearth("ask", "hello")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    # Words for a person, who has never heard of metadata.
    said = f"{HOST} does not let this device in any more: its token was taken back, or has expired; to be let in again"
    assert f"{said}, on the board: sudo hearthd pair NAME, and here: hearth pair CODE" in refused.stderr
    assert said in device.hearth("status").stderr
    # Whoever brings a token of its own, on purpose, is told what the daemon says, and the options of this program.
    token = ("--address", f"127.0.0.1:{board.port}", "--ca", str(board.state / "tls/server.crt"), "--token-file")
    (device.home / "token").write_text("hearth_nobodys\n")
    unknown = device.hearth("ask", *token, str(device.home / "token"), "hello")
    assert (unknown.returncode, "no valid credential: give --token-file" in unknown.stderr) == (1, True), unknown.stderr


def test_the_python_client_finds_the_paired_daemon(
    board: Board, device: Device, start: Callable[[Board], Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    start(board)
    assert device.hearth("pair", board.code("laptop"), "--name", "kitchen").returncode == 0
    monkeypatch.setenv("HOME", str(device.home))
    for name in ("XDG_CONFIG_HOME", "HEARTH_ADDRESS", "HEARTH_DAEMON", "HEARTH_TOKEN", "HEARTH_CA"):
        monkeypatch.delenv(name, raising=False)
    with hearth.Client() as client:
        assert client.chat("hello").text
        assert client.address == f"127.0.0.1:{board.port}"
    with hearth.Client(daemon="kitchen") as client:
        assert client.status().state == "serving"

    @asynchronous
    async def ask() -> None:
        async with hearth.AsyncClient() as client:
            assert (await client.chat("hello")).text
            assert (await client.status()).state == "serving"

    ask()
    assert board.hearthd("token", "revoke", "laptop").returncode == 0
    refused = "kitchen does not let this device in any more: .* hearth pair CODE"
    with hearth.Client() as client:
        for call in (client.status, lambda: client.chat("hello")):
            with pytest.raises(hearth.AuthenticationError, match=refused):
                call()

    @asynchronous
    async def ask_again() -> None:
        async with hearth.AsyncClient() as client:
            with pytest.raises(hearth.AuthenticationError, match=refused):
                await client.chat("hello")
            with pytest.raises(hearth.AuthenticationError, match=refused):
                await client.status()

    ask_again()
    with pytest.raises(hearth.ConfigurationError, match="paired are: kitchen"):
        hearth.Client(daemon="cellar")
    with pytest.raises(hearth.ConfigurationError, match="beside token"):
        hearth.Client(daemon="kitchen", token="x")
    # What is said explicitly wins.
    monkeypatch.setenv("HEARTH_ADDRESS", "127.0.0.1:1")
    assert hearth.Client().address == "127.0.0.1:1"
    assert hearth.Client("127.0.0.1:2").address == "127.0.0.1:2"
    assert hearth.Client(daemon="kitchen").address == f"127.0.0.1:{board.port}"
    monkeypatch.delenv("HEARTH_ADDRESS")
    # So do credentials of one's own, which are some other daemon's.
    assert hearth.Client(token="x").address != f"127.0.0.1:{board.port}"


def test_of_several_daemons_one_must_be_named(
    tmp_path: Path, device: Device, start: Callable[[Board], Running]
) -> None:
    for name in ("cellar", "kitchen"):
        board = Board(tmp_path / name, free_port())
        board.directory.mkdir()
        board.write_usual()
        start(board)
        assert device.hearth("pair", board.code("phone"), "--name", name).returncode == 0
    undecided = device.hearth("ask", "hello")
    assert undecided.returncode == 2
    assert "several daemons: cellar, kitchen; name one (--daemon, HEARTH_DAEMON" in undecided.stderr
    assert device.hearth("status", "--daemon", "kitchen").returncode == 0
    assert device.hearth("status", HEARTH_DAEMON="cellar").returncode == 0
    both = device.hearth("status", "--daemon", "kitchen", "--address", "127.0.0.1:1")
    assert both.returncode == 2
    forgotten = device.hearth("pair", "--forget", "cellar")
    assert (forgotten.returncode, "hearthd token revoke phone" in forgotten.stdout) == (0, True)
    assert device.hearth("status").returncode == 0
    assert device.daemons.names() == ["kitchen"]


def test_pairing_again_takes_the_old_ones_place(
    board: Board, device: Device, start: Callable[[Board], Running]
) -> None:
    start(board)
    assert device.hearth("pair", board.code("phone"), "--name", "kitchen").returncode == 0
    first = device.daemons.read("kitchen")
    taken = board.hearthd("pair", "phone", "--address", "127.0.0.1")
    assert (taken.returncode, taken.stdout) == (78, "")
    assert "'phone' is taken" in taken.stderr
    assert device.hearth("pair", board.code("phone2")).returncode == 0
    assert device.daemons.names() == ["kitchen"]
    second = device.daemons.read("kitchen")
    assert first.token != second.token
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize(
    ("stored", "again", "is_of_older_version"),
    [((), (), False), ((), (), True), (("--name", "kitchen"), (), False), (("--name", "kitchen"),) * 2 + (True,)],
)
def test_a_daemon_with_a_new_certificate_takes_its_old_place(
    board: Board,
    device: Device,
    start: Callable[[Board], Running],
    stored: tuple[str, ...],
    again: tuple[str, ...],
    is_of_older_version: bool,
) -> None:
    running = start(board)
    assert device.hearth("pair", board.code("phone"), *stored).returncode == 0
    (name,) = device.daemons.names()
    before = device.daemons.read(name)
    assert before.own_name == HOST
    if is_of_older_version:
        file = device.daemons.directory / name
        fields = json.loads(file.read_text())
        del fields["own_name"]
        file.write_text(json.dumps(fields))
    running.stop()
    # A card that was set up anew.
    shutil.rmtree(board.state)
    start(board)
    assert "then pair again" in device.hearth("ask", "hello").stderr
    paired = device.hearth("pair", board.code("phone"), *again)
    assert paired.returncode == 0, paired.stderr
    assert f"{name} has another certificate than before" in paired.stdout
    assert device.daemons.names() == [name]
    assert device.daemons.read(name).fingerprint != before.fingerprint
    assert device.hearth("ask", "hello").returncode == 0


@pytest.mark.parametrize("is_on", [True, False])
def test_another_daemon_of_the_same_name_takes_nobodys_place(
    tmp_path: Path, board: Board, device: Device, start: Callable[[Board], Running], is_on: bool
) -> None:
    """Two cards with the same host name, at addresses of their own; and the first may be switched off just now."""
    first = start(board)
    assert device.hearth("pair", board.code("phone")).returncode == 0
    if not is_on:
        first.stop()
    other = Board(tmp_path / "other", free_port())
    other.directory.mkdir()
    other.write_usual()
    start(other)
    code = other.code("phone")
    taken = device.hearth("pair", code, "--name", HOST)
    assert (taken.returncode, "it is another daemon's" in taken.stderr) == (2, True)
    paired = device.hearth("pair", code)
    assert paired.returncode == 0, paired.stderr
    assert "another certificate than before" not in paired.stdout
    assert f"if it is no more: hearth pair --forget {HOST}\n" in paired.stdout
    assert device.daemons.names() == [HOST, f"{HOST}-2"]
    undecided = device.hearth("ask", "hello")
    assert (undecided.returncode, "hearth pair --forget NAME" in undecided.stderr) == (2, True)


def test_the_secret_goes_to_nobody_with_another_certificate(
    tmp_path: Path, board: Board, device: Device, start: Callable[[Board], Running]
) -> None:
    """Somebody else answers at the address of the code, and hears a handshake and nothing more."""
    code = board.code("phone")
    imposter = Board(tmp_path / "imposter", board.port)
    imposter.directory.mkdir()
    imposter.write_usual()
    running = start(imposter)
    refused = device.hearth("pair", code)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "shows another certificate than the code says" in refused.stderr
    assert "nothing was sent" in refused.stderr
    assert device.daemons.names() == []
    assert "pairing code" not in running.log
    # The code is as good as before.
    running.stop()
    start(board)
    assert device.hearth("pair", code).returncode == 0


def test_a_token_goes_to_nobody_with_another_certificate(
    tmp_path: Path, board: Board, device: Device, start: Callable[[Board], Running]
) -> None:
    running = start(board)
    assert device.hearth("pair", board.code("tablet")).returncode == 0
    running.stop()
    imposter = Board(tmp_path / "imposter", board.port)
    imposter.directory.mkdir()
    imposter.write_usual()
    other = start(imposter)
    for words in (("ask", "hello"), ("status",), ("ask", "--wait", "0", "hello")):
        refused = device.hearth(*words)
        assert refused.returncode == 1
        assert "another certificate than the one that" in refused.stderr
    assert "without a" not in other.log


def test_the_certificate_is_accepted_wherever_the_board_is(
    board: Board, device: Device, start: Callable[[Board], Running]
) -> None:
    """The address stands in no certificate: 127.0.0.5 is as good as what the router gives tomorrow."""
    board.write(f'[server]\ntcp = ["127.0.0.5:{board.port}"]\n[tls]\ndirectory = "auto"\n[auth]\ntoken_file = "auto"\n')
    code = board.hearthd("pair", "phone", "--address", "127.0.0.5").stdout.strip()
    start(board)
    paired = device.hearth("pair", code)
    assert paired.returncode == 0, paired.stderr
    assert device.hearth("ask", "hello").returncode == 0


def test_a_second_address_serves_when_the_first_does_not(
    board: Board, device: Device, start: Callable[[Board], Running]
) -> None:
    start(board)
    made = board.hearthd("pair", "phone", "--address", "127.0.0.9", "--address", "127.0.0.1")
    assert device.hearth("pair", made.stdout.strip()).returncode == 0
    assert device.daemons.read(HOST).addresses == (f"127.0.0.1:{board.port}", f"127.0.0.9:{board.port}")
    stored = device.daemons.read(HOST)
    # As if the board had moved to the second of the stored addresses.
    moved = PairedDaemon(
        stored.name, tuple(reversed(stored.addresses)), stored.certificate, stored.server_name, stored.fingerprint,
        stored.token, stored.device, stored.role,
    )  # fmt: skip
    device.daemons.write(moved)
    assert f"at 127.0.0.1:{board.port}" in device.hearth("status").stdout


def test_a_certificate_of_the_houses_own_authority_is_pinned_as_well(
    board: Board, device: Device, start: Callable[[Board], Running]
) -> None:
    from tls_files import make_tls_files

    files = make_tls_files(board.directory, names="DNS:hearth.example,IP:127.0.0.1")
    board.write(
        f'[server]\ntcp = ["127.0.0.1:{board.port}"]\n[auth]\ntoken_file = "auto"\n'
        f'[tls]\ncertificate = "{files.certificate}"\nkey = "{files.key}"\n'
    )
    code = board.code("phone")
    start(board)
    assert device.hearth("pair", code).returncode == 0
    assert device.hearth("ask", "hello").returncode == 0
    stored = device.daemons.read(HOST)
    assert stored.server_name == "hearth.example"
    served = Certificate(files.certificate.read_bytes(), b"").fingerprint.hex()
    assert stored.fingerprint == served == fingerprint(ssl.PEM_cert_to_DER_cert(files.certificate.read_text()))


def test_a_board_that_is_closed_says_how_to_open_it(board: Board) -> None:
    board.write("")
    refused = board.hearthd("pair", "phone")
    assert (refused.returncode, refused.stdout) == (78, "")
    assert refused.stderr.count("\n") == 1
    for line in ('[server] tcp = ["0.0.0.0:50051"]', '[tls] directory = "auto"', '[auth] token_file = "auto"'):
        assert line in refused.stderr
    assert "hearthd pair phone --open-lan" in refused.stderr
    assert board.file.read_text() == ""


def test_a_board_that_only_itself_can_call_is_not_led_onto_the_lan(board: Board) -> None:
    board.write_usual()
    refused = board.hearthd("pair", "phone", "--config", str(board.file))
    assert refused.returncode == 78
    option = f" --config {board.file}"
    assert f"`hearthd pair phone --open-lan{option}` do that; or, to open nothing, `hearthd" in refused.stderr
    assert f"`hearthd pair phone --address HOST:PORT{option}`" in refused.stderr
    before = board.file.read_text()
    # What the doctor advises where there is no certificate; with --open-lan where no token file is configured.
    assert board.hearthd("pair", "phone", "--address", f"127.0.0.1:{board.port}").returncode == 0
    assert board.file.read_text() == before
    board.write(before.partition("[auth]")[0])
    assert board.hearthd("pair", "tablet", "--address", f"127.0.0.1:{board.port}", "--open-lan").returncode == 0
    assert board.file.read_text().replace("\n\n", "\n") == before


def test_open_lan_opens_it_and_the_daemon_starts_on_what_it_made(
    board: Board, device: Device, start: Callable[[Board], Running], tmp_path: Path
) -> None:
    board.write(f'[server]\ntcp = ["127.0.0.1:{board.port}"]\n')
    opened = board.hearthd("pair", "phone", "--open-lan", "--address", "127.0.0.1")
    assert opened.returncode == 0, opened.stderr
    assert "lets other machines call now" in opened.stderr
    assert "made a certificate" in opened.stderr
    start(board)
    assert device.hearth("pair", opened.stdout.strip()).returncode == 0
    assert device.hearth("ask", "hello").returncode == 0


@dataclass
class Systemctl:
    """A program that notes what it is told, for there is no systemd here."""

    directory: Path

    @property
    def told(self) -> list[str]:
        file = self.directory / "told"
        return file.read_text().splitlines() if file.exists() else []

    def write(self, lines: str) -> None:
        program = self.directory / "systemctl"
        program.write_text(f'#!/bin/sh\necho "$@" >>{self.directory}/told\n{lines}\n')
        program.chmod(0o755)


@pytest.fixture
def systemctl(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systemctl:
    """For `hearthd_program` in this process, which gets the board's environment, too."""
    made = Systemctl(tmp_path / "bin")
    made.directory.mkdir()
    made.write("")
    for name, value in board.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{made.directory}:{os.environ['PATH']}")
    monkeypatch.setattr("hearthd.pairing.running_daemon._SYSTEMD", tmp_path)
    return made


OPEN_LAN = ("pair", "phone", "--open-lan", "--address", "127.0.0.1")


@pytest.mark.parametrize(("is_enabled", "verb"), [(0, "restart"), (1, "try-restart")])
def test_open_lan_restarts_the_service_unless_it_serves_this_certificate(
    board: Board, systemctl: Systemctl, start: Callable[[Board], Running], is_enabled: int, verb: str
) -> None:
    systemctl.write(f'[ "$1" != is-enabled ] || exit {is_enabled}')
    board.write("")
    assert hearthd_program(OPEN_LAN) == 0
    restart = ["is-enabled --quiet hearthd.service", f"{verb} hearthd.service"]
    assert systemctl.told == restart
    board.write_usual()
    # Nothing is to be written any more, but nobody listens: a code would be of no use.
    assert hearthd_program(OPEN_LAN) == 0
    assert systemctl.told == 2 * restart
    # Unasked, no service is restarted.
    assert hearthd_program(("pair", "phone", "--address", "127.0.0.1")) == 0
    assert systemctl.told == 2 * restart
    # Once it is open, nothing is restarted any more.
    start(board)
    assert hearthd_program(OPEN_LAN) == 0
    assert systemctl.told == 2 * restart
    systemctl.write("exit 1")
    board.write("")
    assert hearthd_program(OPEN_LAN) == 78


def test_open_lan_refuses_before_it_writes_anything(
    board: Board, systemctl: Systemctl, capsys: pytest.CaptureFixture[str]
) -> None:
    refusals = [
        (("Anna's iPad",), 'token name "Anna\'s iPad": give up to 64 of'),
        (("phone", "--role", "kidd"), "there is no role 'kidd'; there are: admin, user, monitor"),
        (("phone", "--minutes", "61"), "--minutes is 61"),
        (("phone", "--address", "a:99999"), "no number from 1 to 65535"),
    ]
    for words, said in refusals:
        board.write("# mine\n")
        assert hearthd_program(("pair", *words, "--open-lan")) == 78
        shown = capsys.readouterr()
        assert (shown.out, said in shown.err, shown.err.count("\n")) == ("", True, 1), shown.err
        assert board.file.read_text() == "# mine\n"
        assert not board.state.exists()
    board.prepare()
    create_token(board.state / "tokens", "phone")
    assert hearthd_program(OPEN_LAN) == 78
    assert "'phone' is taken" in capsys.readouterr().err
    # A broken pair, which only its owner can put right.
    (board.state / "tls/server.crt").write_text("no certificate")
    assert hearthd_program(("pair", "tablet", *OPEN_LAN[2:])) == 78
    assert "server.crt" in capsys.readouterr().err
    # Whoever must show a certificate cannot be paired, and is not told first to open anything.
    (board.state / "tls/clients.crt").write_text("an authority")
    for ending in ((), ("--open-lan",)):
        assert hearthd_program(("pair", "tablet", *ending)) == 78
        shown = capsys.readouterr()
        assert ("clients.crt" in shown.err, "open-lan" in shown.err) == (True, False)
    assert board.file.read_text() == "# mine\n"
    assert systemctl.told == []


def test_open_lan_goes_on_where_it_was_interrupted_and_a_daemon_starts_at_every_moment(
    board: Board, systemctl: Systemctl, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ends it after each change that it makes on the disk, and at the restart; then the same command again."""
    steps = 0
    last_step = 0

    def interrupted(really: Callable[..., object]) -> Callable[..., object]:
        def step(*arguments: object, **options: object) -> object:
            nonlocal steps
            done = really(*arguments, **options)
            steps += 1
            if steps == last_step:
                raise KeyboardInterrupt
            return done

        return step

    monkeypatch.setattr("hearthd.durable_file.sync_directory", interrupted(durable_file.sync_directory))
    monkeypatch.setattr("hearthd.pairing.running_daemon.subprocess.run", interrupted(subprocess.run))
    found_open = []
    while True:
        last_step, steps = last_step + 1, 0
        shutil.rmtree(board.directory)
        board.directory.mkdir()
        board.write("")
        (systemctl.directory / "told").unlink(missing_ok=True)
        code = hearthd_program(OPEN_LAN)
        if steps < last_step:
            break
        assert code != 0
        config = load_config(board.file)
        files = find_files(config.tls)
        found_open.append(files is not None)
        if files is not None:
            # What `hearthd serve` reads before it serves.
            read_certificate(files)
            assert config.auth.token_file
            assert list_tokens(config.auth.token_file) == []
        capsys.readouterr()
        # As many steps as it takes: this one is not interrupted.
        steps = 1000
        assert hearthd_program(OPEN_LAN) == 0
        assert capsys.readouterr().out.startswith("hearth://127.0.0.1:")
        assert "restart hearthd.service" in systemctl.told
    # Token file, key, certificate; then the file that names them; is it enabled, restart; then the code.
    assert found_open == [False] * 3 + [True] * 4
    assert code == 0


def test_a_daemon_that_wants_certificates_of_its_callers_pairs_nobody(board: Board) -> None:
    board.prepare()
    (board.state / "tls/clients.crt").write_bytes((board.state / "tls/server.crt").read_bytes())
    refused = board.hearthd("pair", "phone", "--address", "127.0.0.1")
    assert (refused.returncode, refused.stdout) == (78, "")
    assert "clients.crt" in refused.stderr
    listed = board.hearthd("pair", "--list")
    assert (listed.returncode, listed.stdout) == (0, "")
    assert listed.stderr == "hearthd: no device is being paired; hearthd pair NAME makes a code\n"


SERVICE_USER = 64321


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_a_daemon_of_another_user_uses_what_root_made(
    tmp_path: Path, device: Device, start: Callable[[Board], Running]
) -> None:
    """As the service does: DynamicUser owns its state directory, and `sudo hearthd pair` writes there."""
    # Not below pytest's own directory, which only root may enter.
    with tempfile.TemporaryDirectory() as directory:
        inside = ["setpriv", f"--reuid={SERVICE_USER}", f"--regid={SERVICE_USER}", "--clear-groups"]
        board = Board(Path(directory) / "board", free_port())
        os.chmod(directory, 0o755)
        board.directory.mkdir()
        board.write_usual()
        for place in (board.state, board.directory / "runtime"):
            place.mkdir(mode=0o700, exist_ok=True)
            os.chown(place, SERVICE_USER, SERVICE_USER)
        # As root, whose own the files must not become.
        code = board.code("phone")
        board.inside = inside
        running = start(board)
        assert device.hearth("pair", code).returncode == 0
        board.inside = []
        # Root writes the token file that the daemon has just written.
        second = board.code("tablet")
        assert device.hearth("pair", second).returncode == 0
        assert device.hearth("ask", "hello").returncode == 0
        assert board.hearthd("token", "revoke", "tablet").returncode == 0
        assert device.hearth("ask", "hello").returncode == 1
        owners = {path.name: path.stat().st_uid for path in board.state.rglob("*")}
        assert set(owners.values()) == {SERVICE_USER}, owners
        running.stop()
        assert "Permission" not in running.log
        # Nobody else makes codes, nor gets a traceback.
        board.inside = ["setpriv", f"--reuid={SERVICE_USER + 1}", "--clear-groups"]
        for words in (("third", "--address", "127.0.0.1"), ("--list",), ("--cancel", "third")):
            refused = board.hearthd("pair", *words)
            assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (78, "", 1), refused.stderr
            assert "run this as root" in refused.stderr or "Permission denied" in refused.stderr


@pytest.mark.model
def test_the_real_daemon_with_the_real_model_is_paired_and_asked(
    board: Board, device: Device, default_bundle: Bundle
) -> None:
    board.prepare()
    board.write(
        board.file.read_text()
        + f'[model]\ndirectory = "{default_bundle.path.parent}"\n[engine]\nthreads = 1\nslots = 1\n'
    )
    daemon = subprocess.Popen(
        [sys.executable, "-m", "hearthd", "serve"], stderr=subprocess.PIPE, text=True, env=board.environment
    )
    try:
        assert daemon.stderr
        said = next(line for line in daemon.stderr if "serving" in line or "critical" in line)
        assert "serving smollm2-135m" in said
        assert device.hearth("pair", board.code("phone")).returncode == 0
        asked = device.hearth("ask", "--temperature", "0", "--max-tokens", "24", "What is the capital of France?")
        assert "Paris" in asked.stdout, asked.stderr
    finally:
        daemon.terminate()
        daemon.communicate(timeout=60)


def test_a_daemon_that_is_not_there_is_told_while_the_code_is_made(
    board: Board, start: Callable[[Board], Running], tmp_path: Path
) -> None:
    absent = board.hearthd("pair", "phone", "--address", "127.0.0.1")
    assert absent.returncode == 0
    assert f"no daemon with TLS answers at 127.0.0.1:{board.port}" in absent.stderr
    running = start(board)
    present = board.hearthd("pair", "phone", "--address", "127.0.0.1")
    assert "warning" not in present.stderr
    running.stop()
    other = Board(tmp_path / "other", board.port)
    other.directory.mkdir()
    other.write_usual()
    start(other)
    assert "shows another certificate" in board.hearthd("pair", "phone", "--address", "127.0.0.1").stderr


def test_devices_that_are_being_paired_are_listed_and_taken_back(board: Board) -> None:
    board.code("phone")
    board.code("tablet", "--role", "monitor", "--minutes", "60")
    listed = board.hearthd("pair", "--list")
    assert re.fullmatch(r"phone\tuser\t10 minutes left\ntablet\tmonitor\t60 minutes left\n", listed.stdout)
    assert board.hearthd("pair", "--cancel", "phone").returncode == 0
    assert "phone" not in board.hearthd("pair", "--list").stdout
    # A code that nobody used made no token.
    assert list_tokens(board.state / "tokens") == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "give one of NAME, --list and --cancel NAME"),
        (("phone", "--list"), 2, "give one of NAME"),
        (("a b",), 78, "token name 'a b'"),
        (("phone", "--role", "king"), 78, "there is no role 'king'; there are: admin, user, monitor"),
        (("phone", "--minutes", "0"), 78, "--minutes is 0; give 1 to 60"),
        (("phone", "--address", "x y"), 78, "--address 'x y'"),
        (("phone", "--address", "a:1", "--address", "b:2"), 78, "all with the same port"),
        (("phone", "--address", "a:99999"), 78, "no number from 1 to 65535"),
    ],
)
def test_what_cannot_be_is_refused(
    board: Board,
    words: tuple[str, ...],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in board.environment.items():
        monkeypatch.setenv(name, value)
    if words and "--address" not in words and "--list" not in words:
        words = (*words, "--address", "127.0.0.1")
    try:
        ended = hearthd_program(["pair", *words])
    except SystemExit as error:  # argparse
        ended = int(error.code or 0)
    shown = capsys.readouterr()
    assert (ended, shown.out) == (code, "")
    assert said in shown.err


def test_a_terminal_shows_a_qr_code_that_says_the_same(board: Board) -> None:
    """Read it as a camera would: its modules from the half blocks, compared with those of the code beside it."""
    import segno

    main, inner = pty.openpty()
    subprocess.run(["stty", "rows", "60", "cols", "120"], stdin=inner, check=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "hearthd", "pair", "phone", "--address", "127.0.0.1"],
        stdout=inner, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, env=board.environment,
    )  # fmt: skip
    os.close(inner)
    shown = b""
    while True:
        try:
            shown += os.read(main, 65536)
        except OSError:
            break
    os.close(main)
    assert process.wait(30) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode())
    code = text.split()[-1]
    assert code.startswith("hearth://127.0.0.1:")
    border = 2
    expected = [list(row) for row in segno.make_qr(code.upper(), error="l").matrix_iter(border=border)]
    rows: list[list[int]] = []
    for line in text.replace("\r", "").split("\n"):
        if len(line) == len(expected[0]) and set(line) <= set(" ▀▄█"):
            # A block is light: dark terminals are the rule.
            rows.append([0 if character in "█▀" else 1 for character in line])
            rows.append([0 if character in "█▄" else 1 for character in line])
    assert rows[: len(expected)] == [[int(bool(module)) for module in row] for row in expected]


# What the device says by itself.


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give one of CODE, --list and --forget NAME"),
        (("hearth://x", "--list"), "give one of CODE"),
        (("nonsense",), "this is no pairing code, which begins with hearth://"),
        (("--forget", "nobody"), "this user is not paired with it; paired are: none"),
        (("--forget", "../x"), "not paired with it"),
    ],
)
def test_wrong_words_are_told(
    device: Device,
    words: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(device.home))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    assert hearth_program(["pair", *words]) == 2
    shown = capsys.readouterr()
    assert (shown.out, said in shown.err) == ("", True)


def test_a_code_is_not_used_up_where_nothing_can_be_stored(
    board: Board, device: Device, start: Callable[[Board], Running]
) -> None:
    start(board)
    code = board.code("phone")
    (device.home / ".config").write_text("a file where the directory belongs")
    refused = device.hearth("pair", code)
    assert refused.returncode == 2
    assert "cannot be written" in refused.stderr
    (device.home / ".config").unlink()
    assert device.hearth("pair", code).returncode == 0


def test_a_stored_daemon_that_others_may_read_or_nobody_can_is_refused(device: Device) -> None:
    stored = PairedDaemon("kitchen", ("127.0.0.1:1",), "PEM", "hearthd", "ab", "t0ken", "phone", "user")
    device.daemons.write(stored)
    assert device.daemons.read("kitchen") == stored
    file = device.daemons.directory / "kitchen"
    file.chmod(0o644)
    refused = device.hearth("status")
    assert refused.returncode == 2
    assert f"run: chmod 600 {file}" in refused.stderr
    file.chmod(0o600)
    for content in (
        "",
        "{}",
        "[]",
        '{"version": 2}',
        file.read_text()[:-20],
        "[" * 60000,
        '{"version": 1, "addresses": [1]}',
    ):
        file.write_text(content)
        refused = device.hearth("status")
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "hearth pair --forget kitchen" in refused.stderr
    assert device.hearth("pair", "--forget", "kitchen").returncode == 0
