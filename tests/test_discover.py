"""Finding daemons by multicast DNS: announced only where configured, listed, paired, and found again elsewhere.

Each test has a network of its own, a namespace with a virtual interface; they are skipped only where the kernel gives
none.
"""

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hearth_program as program
import multicast
from hearthd.listening.tls import TlsFiles, read_certificate
from paired_board import Board, Device, Running

HOST = socket.gethostname().partition(".")[0]
NETWORK = Path(multicast.__file__)
PORT = 50051

pytestmark = pytest.mark.skipif(
    multicast.why_not() is not None, reason=f"no network with multicast can be made here: {multicast.why_not()}"
)


class Network:
    """A network that lasts as long as the test."""

    def __init__(self, *addresses: str) -> None:
        self._holder = subprocess.Popen(
            [sys.executable, str(NETWORK), *addresses, "--", "sh", "-c", "echo ready; exec cat"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._holder.stdout
        assert self._holder.stdout.readline() == "ready\n"
        self.inside = ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net"]

    def move(self, old: str, new: str) -> None:
        """Give the machine another address, as a router does."""
        for words in (("del", old), ("add", new)):
            subprocess.run(
                [*self.inside, "ip", "addr", words[0], f"{words[1]}/24", "dev", multicast.INTERFACE], check=True
            )

    def python(self, text: str, *words: str) -> subprocess.Popen[str]:
        """Run a program text there; its standard input ends it."""
        return subprocess.Popen(
            [*self.inside, sys.executable, "-c", text, *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def close(self) -> None:
        self._holder.communicate()


@pytest.fixture
def join() -> Iterator[Callable[..., Network]]:
    networks: list[Network] = []

    def make(*addresses: str) -> Network:
        networks.append(Network(*addresses))
        return networks[-1]

    yield make
    for network in networks:
        network.close()


@pytest.fixture
def start(join: Callable[..., Network]) -> Iterator[Callable[[Board], Running]]:
    running: list[Running] = []

    def start_daemon(board: Board) -> Running:
        board.prepare()
        running.append(Running(board))
        announces = "announce = true" in board.file.read_text()
        # Either that it is announced, or why not.
        return running[-1].wait().wait("announced" if announces else "")

    yield start_daemon
    for each in running:
        each.stop()


def make_board(directory: Path, network: Network, port: int = PORT, *, announce: bool = True) -> Board:
    board = Board(directory, port, network.inside)
    directory.mkdir()
    board.write(
        f'[server]\ntcp = ["0.0.0.0:{port}"]\n[tls]\ndirectory = "auto"\n[auth]\ntoken_file = "auto"\n'
        + ("[discovery]\nannounce = true\n" if announce else "")
    )
    return board


def make_device(directory: Path, network: Network) -> Device:
    directory.mkdir()
    return Device(directory, network.inside)


def fingerprint(board: Board) -> str:
    files = TlsFiles(board.state / "tls/server.crt", board.state / "tls/server.key")
    return read_certificate(files).fingerprint.hex()


def discovered(device: Device, *words: str) -> list[dict[str, object]]:
    done = device.hearth("discover", "--json", *words)
    assert done.returncode == 0, done.stderr
    listed: list[dict[str, object]] = json.loads(done.stdout)["daemons"]
    return listed


def test_an_announced_daemon_is_listed_and_paired_and_asked(
    tmp_path: Path, join: Callable[..., Network], start: Callable[[Board], Running]
) -> None:
    network = join("10.77.0.1")
    board, device = make_board(tmp_path / "board", network), make_device(tmp_path / "home", network)
    start(board)
    expected = {"name": HOST, "addresses": [f"10.77.0.1:{PORT}"], "fingerprint": fingerprint(board)}
    assert discovered(device) == [{**expected, "paired_as": None}]
    made = board.hearthd("pair", "phone")
    # The board's own name, and its address on this network.
    assert made.stdout.startswith(f"hearth://{HOST.lower()}.local+10.77.0.1:{PORT}/")
    assert device.hearth("pair", made.stdout.strip(), "--name", "kitchen").returncode == 0
    assert device.hearth("ask", "hello").returncode == 0
    assert discovered(device, "--interface", "10.77.0.1") == [{**expected, "paired_as": "kitchen"}]
    shown = device.hearth("discover").stdout
    assert shown == f"{HOST}  10.77.0.1:{PORT}  certificate {fingerprint(board)[:16]}  paired as kitchen\n"


def test_a_daemon_says_nothing_unless_it_is_told_to(
    tmp_path: Path, join: Callable[..., Network], start: Callable[[Board], Running]
) -> None:
    network = join("10.77.0.1")
    start(make_board(tmp_path / "board", network, announce=False))
    assert discovered(make_device(tmp_path / "home", network)) == []


def test_a_board_on_no_network_announces_nothing(
    tmp_path: Path, join: Callable[..., Network], start: Callable[[Board], Running]
) -> None:
    network = join()
    running = start(make_board(tmp_path / "board", network))
    assert discovered(make_device(tmp_path / "home", network)) == []
    running.stop()
    assert "not announced: this machine is on no network" in running.log


def test_what_only_this_machine_can_reach_is_not_announced(
    tmp_path: Path, join: Callable[..., Network], start: Callable[[Board], Running]
) -> None:
    network = join("10.77.0.1")
    board = make_board(tmp_path / "board", network)
    board.write(board.file.read_text().replace("0.0.0.0", "127.0.0.1"))
    running = start(board)
    assert discovered(make_device(tmp_path / "home", network)) == []
    running.stop()
    assert "no other machine can reach any address of server.tcp" in running.log


def test_a_paired_board_is_found_again_at_another_address(
    tmp_path: Path, join: Callable[..., Network], start: Callable[[Board], Running]
) -> None:
    network = join("10.77.0.1")
    board, device = make_board(tmp_path / "board", network), make_device(tmp_path / "home", network)
    running = start(board)
    code = board.hearthd("pair", "phone", "--address", "10.77.0.1").stdout.strip()
    assert device.hearth("pair", code, "--name", "kitchen").returncode == 0
    running.stop()
    network.move("10.77.0.1", "10.77.0.9")
    start(board)
    asked = device.hearth("ask", "hello")
    assert asked.returncode == 0, asked.stderr
    # From now on it is looked for there first.
    assert device.daemons.read("kitchen").addresses == (f"10.77.0.9:{PORT}", f"10.77.0.1:{PORT}")
    assert f"at 10.77.0.9:{PORT}" in device.hearth("status").stdout


ANNOUNCE = """
import asyncio, ifaddr, sys
# The service's sandbox has no netlink, by which this asks for interfaces.
ifaddr.get_adapters = None
from hearthd.listening.announcing import Announcer

async def main(address, port, fingerprint):
    announcing = asyncio.create_task(Announcer(int(port), lambda: bytes.fromhex(fingerprint), lambda: [address]).run())
    print("begun", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    announcing.cancel()
    await asyncio.gather(announcing, return_exceptions=True)

asyncio.run(main(*sys.argv[1:]))
"""


def test_who_announces_itself_as_the_board_gets_no_token(
    tmp_path: Path, join: Callable[..., Network], start: Callable[[Board], Running]
) -> None:
    network = join("10.77.0.1")
    board, device = make_board(tmp_path / "board", network), make_device(tmp_path / "home", network)
    running = start(board)
    code = board.hearthd("pair", "phone", "--address", "10.77.0.1").stdout.strip()
    assert device.hearth("pair", code, "--name", "kitchen").returncode == 0
    running.stop()
    imposter = make_board(tmp_path / "imposter", network, port=50099, announce=False)
    other = start(imposter)
    liar = network.python(ANNOUNCE, "10.77.0.1", "50099", fingerprint(board))
    try:
        assert liar.stdout
        assert liar.stdout.readline() == "begun\n"
        # The lie is heard.
        assert [(each["addresses"], each["paired_as"]) for each in discovered(device)] == [
            (["10.77.0.1:50099"], "kitchen")
        ]
        refused = device.hearth("ask", "--wait", "0", "hello")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert device.daemons.read("kitchen").addresses == (f"10.77.0.1:{PORT}",)
    finally:
        liar.communicate()
    other.stop()
    assert "without a" not in other.log
    assert "was refused" not in other.log


def test_two_boards_of_one_name_are_both_listed(
    tmp_path: Path, join: Callable[..., Network], start: Callable[[Board], Running]
) -> None:
    network = join("10.77.0.1")
    boards = [make_board(tmp_path / f"board{port}", network, port) for port in (50051, 50052)]
    for board in boards:
        start(board)
    found = discovered(make_device(tmp_path / "home", network))
    assert {daemon["fingerprint"] for daemon in found} == {fingerprint(board) for board in boards}
    assert sorted(str(daemon["name"]) for daemon in found) == [HOST, f"{HOST}-2"]


FOLLOW = """
import asyncio
from hearth._discovery import discover
from hearthd.listening.announcing import Announcer

async def main():
    addresses = ["10.77.0.1"]
    announcing = asyncio.create_task(Announcer(1234, lambda: b"x" * 32, lambda: list(addresses), 0.05).run())
    for address in ("10.77.0.1", "10.77.0.2"):
        addresses[:] = [address]
        wanted = f"{address}:1234"
        found = await asyncio.to_thread(discover, 20.0, lambda each: wanted in each.addresses)
        assert wanted in found[-1].addresses, found
    announcing.cancel()
    await asyncio.gather(announcing, return_exceptions=True)
    # It has said good-bye.
    assert await asyncio.to_thread(discover, 1.0) == []
    print("followed")

asyncio.run(main())
"""


def test_an_announcement_follows_the_address_and_ends_with_the_daemon(join: Callable[..., Network]) -> None:
    done = join("10.77.0.1", "10.77.0.2").python(FOLLOW).communicate()[0]
    assert done == "followed\n"


HOSTILE = """
import socket, sys
from zeroconf import ServiceInfo, Zeroconf
network = Zeroconf(interfaces=["10.77.0.1"])
for name, mark in (("a\\x9b31mred", "zz"), ("b", "\\x1b]0;x"), ("c", None), ("d", "A" * 64), ("e", "0" * 250)):
    network.register_service(ServiceInfo(
        "_hearth._tcp.local.", name + "._hearth._tcp.local.", port=1, addresses=[socket.inet_aton("10.77.0.1")],
        properties={"fp": mark}, server="x.local."), strict=False)
print("begun", flush=True)
sys.stdin.read()
network.close()
"""


def test_hostile_announcements_are_listed_as_unknown_and_do_not_act_on_the_terminal(
    tmp_path: Path, join: Callable[..., Network]
) -> None:
    network = join("10.77.0.1")
    device = make_device(tmp_path / "home", network)
    hostile = network.python(HOSTILE)
    try:
        assert hostile.stdout
        assert hostile.stdout.readline() == "begun\n"
        shown = device.hearth("discover")
    finally:
        hostile.communicate()
    assert shown.returncode == 0, shown.stderr
    assert not set(shown.stdout + shown.stderr) & {"\x1b", "\x9b"}
    lines = shown.stdout.splitlines()
    assert len(lines) == 5
    assert all("certificate unknown  not paired" in line for line in lines)


def test_without_the_extra_the_remedy_is_told(tmp_path: Path) -> None:
    without = "import sys; sys.modules['zeroconf'] = None; import hearth.__main__ as m; sys.exit(m.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", without, "discover"],
        capture_output=True, text=True, check=False, env=program.environment(HOME=str(tmp_path)),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "hearth: looking for daemons needs the package zeroconf on this device: pip install 'hearth-chat[discover]'; "
        "and a daemon announces itself only if the board's hearthd.toml has [discovery] announce = true; or name the "
        "daemon with --address\n"
    )


def test_a_person_who_finds_nothing_is_told_what_the_board_must_have(tmp_path: Path) -> None:
    words = ("discover", "--seconds", "0.1", "--interface", "127.0.0.1")
    with program.Terminal(*words, HOME=str(tmp_path)) as terminal:
        terminal.expect("no daemon announced itself within 0.1 s; a daemon announces itself only if the board's ")
        terminal.expect("hearthd.toml has [discovery] announce = true")
        terminal.expect("without announcing: hearth pair CODE, or --address\n")
        assert terminal.wait() == 0
