"""The steps of a board's life, in their order: each does what a person or the world does, and checks what comes of it.

A step returns what it found, for the table, and raises StepError if something is not as promised. Later steps build on
earlier ones. What a person types comes from the manual. Run by `scenario`.
"""

import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from device import Answering, Device
from machine import Board, BoardError, Outcome
from manual import boxes
from packages import NEWER
from transcript import Transcript

HERE: Final = Path(__file__).resolve().parent
STICK: Final = "/media/stick"
# The manual's chapters.
INSTALL, PAIR, TROUBLE, UPDATE, BACKUP, REMOVE = 3, 4, 6, 7, 8, 9
# Answered with a wide margin at each word: another processor rounds otherwise, which would turn a near tie.
QUESTION: Final = "What is the capital of France, and what is it known for?"
EXPECTED: Final = "Paris"
# A word that must be in nobody's journal.
CANARY: Final = "xylophonist"
LONG_QUESTION: Final = f"Tell me a long story about a {CANARY} and a dragon, with many turns."
GREEDY: Final = ("--temperature", "0")
# An emulated processor reads a prompt in seconds and writes some words a second.
ANSWER_SECONDS: Final = 180.0
START_SECONDS: Final = 180.0


class StepError(Exception):
    """Something is not as promised."""


def require(is_so: bool, otherwise: str) -> None:
    """Raise StepError with what is wrong unless all is well."""
    if not is_so:
        raise StepError(otherwise)


def _wait_for_text(answering: Answering) -> None:
    if not answering.wait_for_text(ANSWER_SECONDS):
        outcome = answering.finish(1)
        raise StepError(f"no answer begins; exit code {outcome.exit_code}: {outcome.output.strip()}")


class Life:
    """One board, one device, and what earlier steps leave for later ones."""

    def __init__(self, board: Board, device: Device, transcript: Transcript) -> None:
        self._board = board
        self._device = device
        self._transcript = transcript
        self._answer = ""
        self._files = ""

    # Steps.

    def boot(self) -> str:
        """Power on; everything that a fresh Debian starts must have started."""
        self._board.boot()
        state = self._board.run("systemctl is-system-running --wait", seconds=120).output.strip()
        require(state == "running", f"systemd is {state}: {self._type('systemctl --failed --no-legend').output}")
        return f"systemd is {state}, {self._memory_used()} MB in use"

    def install(self) -> str:
        """Install as the manual says; the board has no way out to a network."""
        self._type(f"sudo mkdir -p {STICK} && sudo mount -o ro LABEL=stick {STICK}")
        self._type(f"cp {STICK}/*.deb .", seconds=120)  # in place of scp
        install, *_ = boxes(INSTALL)
        self._type(install, seconds=600)
        free = self._type("df --output=avail -m / | tail -1").output.strip()
        return f"offline; {free} MB free on the card"

    def look(self) -> str:
        """Do what the manual says after that: the daemon runs, and answers on the board."""
        _, status, ask = boxes(INSTALL)
        began = time.monotonic()
        require("active (running)" in self._type(status).output, "the unit does not run")
        answer = self._type(ask, seconds=2 * ANSWER_SECONDS).output.strip()
        require(len(answer.split()) > 5, f"the answer is {answer!r}")
        return f"{len(answer.split())} words in {time.monotonic() - began:.0f} s; {self._status()}"

    def ask_doctor(self) -> str:
        """Let the daemon's own diagnosis find no problem; an emulated board has reasons for warnings."""
        found = self._type(*boxes(TROUBLE), seconds=ANSWER_SECONDS).output
        # A finding begins its line with what it is; a remedy stands below, indented.
        levels = Counter(line.split()[0] for line in found.splitlines() if line and not line.startswith(" "))
        require(levels["good"] > 0 and not levels["problem"], f"it finds {dict(levels)}")
        return ", ".join(f"{number} {level}" for level, number in levels.items())

    def examine_sandbox(self) -> str:
        """See in the running process that systemd did what the unit asks."""
        self._type("systemd-analyze security --no-pager --threshold=11 hearthd")
        exposure = self._type("systemd-analyze security --no-pager hearthd | tail -1").output
        found = re.search(r": ([\d.]+) ", exposure)
        require(found is not None, f"no exposure in {exposure!r}")
        lines = self._type(f"cat /proc/{self._main_pid()}/status", user="root").output
        status = dict(line.split(":\t", 1) for line in lines.splitlines() if ":\t" in line)
        wanted = {"Seccomp": "2", "NoNewPrivs": "1", "CapEff": "0" * 16, "CapBnd": "0" * 16}
        wrong = {key: status[key] for key, value in wanted.items() if status[key].strip() != value}
        require(not wrong, f"the process has {wrong}")
        uids = set(status["Uid"].split())
        require("0" not in uids, "the process is root's")
        assert found is not None
        return f"exposure {found[1]}, seccomp filter on, no capability, uid {uids.pop()}"

    def open_to_the_house(self) -> str:
        """Let other machines in, as the manual says."""
        self._type(boxes(PAIR)[0], seconds=START_SECONDS)
        # That code names the board's own addresses, which nobody can reach through a forwarded port.
        self._type("sudo hearthd pair --cancel phone")
        where = self._type("ss -Hltn 'sport = :50051'").output.split()[3]
        require("127.0.0.1" not in where, f"the daemon listens on {where} alone")
        refused = self._board.run("hearth ask --wait 1 Hello?")
        require(refused.exit_code != 0, f"who has no token was answered on the board: {refused.output}")
        self._type(boxes(PAIR)[1])
        self._type("hearth ask --max-tokens 4 Hello", seconds=ANSWER_SECONDS)  # each command logs in anew
        return f"listens on {where}, with TLS and tokens; on the board the group may ask"

    def install_client(self) -> str:
        """Install the client on the device, as the manual says."""
        outcome = self._device.install(boxes(PAIR, "device")[0])
        require(outcome.exit_code == 0, f"exit code {outcome.exit_code}: {outcome.output.strip()[-400:]}")
        return outcome.output.strip().splitlines()[-1]

    def pair(self) -> str:
        """Pair the device: one command on the board, one on the device."""
        where = f"127.0.0.1:{self._board.port}"
        stranger = self._device.run("ask", "--address", where, "--wait", "1", "Hello?")
        require(stranger.exit_code != 0, f"a stranger was answered: {stranger.output}")
        shown = self._type(f"sudo hearthd pair phone --address {where}")
        (code,) = (line for line in shown.output.splitlines() if line.startswith("hearth://"))
        _, pair, _ = boxes(PAIR, "device")
        paired = self._device.run(*pair.replace("CODE", code).split()[1:])
        require(paired.exit_code == 0, f"exit code {paired.exit_code}: {paired.output}")
        again = self._device.run("pair", code)
        require(again.exit_code == 1, f"the same code again: exit code {again.exit_code}: {again.output}")
        return paired.output.strip().splitlines()[-1]

    def chat(self) -> str:
        """Ask from outside, over TLS, and see the answer come piece by piece."""
        with self._device.begin("ask", *GREEDY, "--max-tokens", "40", QUESTION) as answering:
            began = time.monotonic()
            _wait_for_text(answering)
            first = time.monotonic() - began
            streamed = answering.is_running
            outcome = answering.finish(ANSWER_SECONDS)
        require(outcome.exit_code == 0, f"exit code {outcome.exit_code}: {outcome.output}")
        require(EXPECTED in outcome.output, f"the answer is {outcome.output!r}")
        require(streamed, "the answer came in one piece")
        self._answer = outcome.output
        return f"{' '.join(outcome.output.split())!r}, first words after {first:.1f} s"

    def memory(self) -> str:
        """See what is in use, of the board and of the daemon."""
        lines = self._type(f"cat /proc/{self._main_pid()}/status", user="root").output
        peak, resident = (int(re.findall(rf"{key}:\s+(\d+) kB", lines)[0]) // 1024 for key in ("VmHWM", "VmRSS"))
        return f"{self._memory_used()} MB in use; the daemon {resident} MB resident, {peak} MB at most"

    def freeze_thread(self) -> str:
        """Freeze the thread that decodes, the event loop running on: the watchdog must see it."""
        self._mount_tools()
        return self._freeze("sudo python3 /run/freeze_thread.py {pid}")

    def freeze_process(self) -> str:
        """Stop the whole process."""
        return self._freeze(
            "sudo kill -STOP {pid} && began=$(cut -d' ' -f1 /proc/uptime) && "
            "sudo timeout 120 tail -s 0.2 --pid={pid} -f /dev/null && "
            "awk -v began=$began '{{printf \"ended after %.1f s\\n\", $1 - began}}' /proc/uptime"
        )

    def drain(self) -> str:
        """Stop the unit in mid-answer: that answer must end well, and nobody else be let in."""
        words = ("ask", *GREEDY, "--max-tokens", "24", QUESTION)
        with self._device.begin(*words) as answering:
            _wait_for_text(answering)
            began = time.monotonic()
            self._type("sudo systemctl stop hearthd", seconds=60)
            seconds = time.monotonic() - began
            outcome = answering.finish(ANSWER_SECONDS)
        require(outcome.exit_code == 0, f"exit code {outcome.exit_code}: {outcome.output}")
        result = self._property("Result")
        require(result == "success", f"the unit's result is {result}")
        refused = self._device.run("ask", "--wait", "1", "Hello?")
        require(refused.exit_code == 1, f"a stopped daemon: exit code {refused.exit_code}: {refused.output}")
        self._type("sudo systemctl start hearthd", seconds=START_SECONDS)
        return f"the answer was finished, the unit stopped after {seconds:.1f} s"

    def pull_plug(self) -> str:
        """Take the power away in mid-answer: the client must hear of it."""
        self._files = self._checksums()
        with self._device.begin("ask", *GREEDY, "--max-tokens", "400", LONG_QUESTION) as answering:
            _wait_for_text(answering)
            self._board.pull_plug()
            began = time.monotonic()
            outcome = answering.finish(60)
        require(outcome.exit_code == 1, f"exit code {outcome.exit_code}: {outcome.output}")
        return f"after {time.monotonic() - began:.1f} s the client says: {outcome.output.strip().splitlines()[-1]}"

    def boot_again(self) -> str:
        """Boot from the disk as it was left: nobody does anything, and everything is there."""
        self.boot()
        self._type("systemctl is-enabled hearthd")
        self._type("sudo systemctl start hearthd", seconds=START_SECONDS)  # waits for the start that is under way
        files = self._checksums()
        changed = set(self._files.splitlines()) ^ set(files.splitlines())
        require(not changed, f"files differ: {changed}")
        return f"{len(files.splitlines())} files of model, tokens and configuration are the same"

    def chat_again(self) -> str:
        """Ask the same: the device still knows the board, and the board the answer."""
        before = self._answer
        found = self.chat()
        require(self._answer == before, f"before it was {before!r}")
        return f"the same answer; {found}"

    def read_journal(self) -> str:
        """Find no error that nobody caused, and no word of what was said."""
        errors = self._type("sudo journalctl -o cat -p err _SYSTEMD_UNIT=hearthd.service").output.splitlines()
        unexpected = [line for line in errors if line.strip() and "-- No entries --" not in line]
        require(not unexpected, f"the daemon's errors: {unexpected}")
        # Seccomp's audit records are of type 1326 (linux/audit.h).
        trouble = "type=1326|segfault|Out of memory|EXT4-fs error"
        told = self._type(f"sudo journalctl -o cat -k --grep '{trouble}' || true").output
        told = told.replace("-- No entries --", "").strip()
        require(not told, f"the kernel says {told!r}")
        spoken = self._type(f"sudo journalctl -o cat | grep -v COMMAND= | grep -c -i {CANARY} || true").output.strip()
        require(spoken == "0", f"{spoken} lines of the journal hold what was said")
        return "no errors, nothing of what was said"

    def restore(self) -> str:
        """Back up, shut the device out, and restore: each as the manual says."""
        pack, own, stop, unpack, start = boxes(BACKUP)
        for command in (pack, own, boxes(PAIR)[-1]):
            self._type(command)
        owner = self._type("stat -c '%U %a' hearth-backup.tar.gz").output.strip()
        require(owner == "pi 600", f"the backup is {owner}")
        held = self._type("tar -tzf hearth-backup.tar.gz").output
        require("hearth/tokens\n" in held and "prefixes" not in held, f"the backup holds {held}")
        refused = self._device.run("ask", "--max-tokens", "4", QUESTION)
        require(refused.exit_code == 1, f"a revoked token: exit code {refused.exit_code}: {refused.output}")
        for command in (stop, unpack, start):
            self._type(command, seconds=START_SECONDS)
        self._ask_briefly()
        return f"revoked: {refused.output.strip().splitlines()[-1]}; restored: answers"

    def upgrade(self) -> str:
        """Install a newer package over the running daemon, as the manual says."""
        self._type(f"sudo mount -o ro LABEL=stick {STICK}")
        make_room, install, *_ = boxes(UPDATE)
        version = self._replace(make_room, f"{STICK}/newer", install)
        require(version.endswith(NEWER), f"{version} is installed")
        return f"{version} runs and answers the same device"

    def go_back(self) -> str:
        """Install the older package again, as the manual says."""
        *_, make_room, install = boxes(UPDATE)
        version = self._replace(make_room, STICK, install)
        require(not version.endswith(NEWER), f"{version} is installed")
        return f"{version} runs and answers the same device"

    def purge(self) -> str:
        """Remove, then remove everything, as the manual says, and find nothing of it."""
        for command in boxes(REMOVE):
            self._type(command, seconds=300)
        # What an owner has, what apt and the journal remember, and the wire of this test in /dev.
        others = "/dev /proc /sys /run /media /home /var/log /var/lib/apt /var/cache/apt"
        pruned = " -o ".join(f"-path {path}" for path in others.split())
        left = self._type(f"find / \\( {pruned} \\) -prune -o -iname '*hearth*' -print", user="root").output
        require(not left, f"left behind: {left}")
        units = self._type("systemctl list-units --all --no-legend 'hearthd*'").output.strip()
        require(not units, f"systemd still knows {units}")
        return "nothing of it is left"

    # What they share.

    def explain(self) -> None:
        """Put into the transcript what helps to understand a failure, if the board still answers."""
        try:
            self._board.run("systemctl status --no-pager -l hearthd", user="root")
            self._board.run("journalctl --no-pager -b -n 100", user="root")
        except BoardError as error:
            self._transcript.note(f"nothing more can be learnt: {error}")

    def _type(self, command: str, *, user: str = "pi", seconds: float = 60.0) -> Outcome:
        if command.startswith("sudo apt"):
            command = f"yes '' | {command}"  # a person presses Enter
        outcome = self._board.run(command, user=user, seconds=seconds)
        require(outcome.exit_code == 0, f"{command!r} ends with {outcome.exit_code}: {outcome.output.strip()[-400:]}")
        return outcome

    def _replace(self, make_room: str, place: str, install: str) -> str:
        """Put the package that is in a place over the one that runs, and return its version."""
        files, pid = self._checksums(), self._main_pid()
        self._type(make_room)
        self._type(f"cp {place}/hearth_*.deb .", seconds=120)
        self._type(install, seconds=600)
        require(self._type("systemctl is-active hearthd").output.strip() == "active", "the daemon does not run")
        require(self._main_pid() != pid, "the daemon from before still runs")
        require(self._checksums() == files, "files of model, tokens and configuration differ")
        self._ask_briefly()
        return self._type("dpkg-query -W -f '${Version}' hearth").output.strip()

    def _ask_briefly(self) -> None:
        found = self._device.run("ask", *GREEDY, "--max-tokens", "12", QUESTION, seconds=ANSWER_SECONDS)
        require(EXPECTED in found.output, f"the answer is {found.output!r}")

    def _freeze(self, command: str) -> str:
        limit = int(self._property("WatchdogUSec", raw=True)) / 1e6 + 5
        restarts, pid = int(self._property("NRestarts")), self._main_pid()
        with self._device.begin("ask", *GREEDY, "--max-tokens", "400", LONG_QUESTION) as answering:
            _wait_for_text(answering)
            said = self._type(command.format(pid=pid), seconds=150).output
            # By the board's own clock: to start a program takes an emulated processor a second.
            measured = re.search(r"ended after ([\d.]+) s", said)
            require(measured is not None, f"nothing was measured: {said!r}")
            assert measured is not None
            seconds = float(measured[1])
            outcome = answering.finish(60)
        require(outcome.exit_code == 1, f"the client's exit code is {outcome.exit_code}: {outcome.output}")
        require(seconds <= limit, f"the process was ended after {seconds:.1f} s, not within {limit:g}")
        self._type("sudo systemctl start hearthd", seconds=START_SECONDS)  # waits for the restart that is under way
        now = int(self._property("NRestarts"))
        require(now == restarts + 1, f"{now - restarts} restarts")
        require(
            "watchdog" in self._type("sudo journalctl -o cat -b -u hearthd | tail -40").output.lower(), "no watchdog"
        )
        self._ask_briefly()
        return f"ended after {seconds:.1f} s, restarted, answers; the client heard: {outcome.output.splitlines()[-1]}"

    def _property(self, name: str, *, raw: bool = False) -> str:
        if not raw:
            return self._type(f"systemctl show -P {name} hearthd").output.strip()
        path = "/org/freedesktop/systemd1/unit/hearthd_2eservice"
        return self._type(
            f"busctl get-property org.freedesktop.systemd1 {path} org.freedesktop.systemd1.Service {name}"
        ).output.split()[-1]

    def _status(self) -> str:
        return self._property("StatusText")

    def _main_pid(self) -> int:
        return int(self._property("MainPID"))

    def _memory_used(self) -> int:
        return int(self._type("free -m").output.splitlines()[1].split()[2])

    def _checksums(self) -> str:
        return self._type(
            "find -L /var/lib/hearth /etc/hearth -type f -print0 | sort -z | xargs -0 sha256sum",
            user="root",
            seconds=120,
        ).output

    def _mount_tools(self) -> None:
        script = (HERE / "freeze_thread.py").read_text(encoding="utf-8")
        self._type(f"cat > /run/freeze_thread.py <<'EOF'\n{script}\nEOF", user="root")


LIFE: Final[tuple[tuple[str, Callable[[Life], str]], ...]] = (
    ("boots", Life.boot),
    ("installs the packages, offline", Life.install),
    ("runs, and answers on the board", Life.look),
    ("hearthd doctor finds no problem", Life.ask_doctor),
    ("has the sandbox that the unit asks for", Life.examine_sandbox),
    ("is opened to the house", Life.open_to_the_house),
    ("installs the client on a device", Life.install_client),
    ("pairs a device", Life.pair),
    ("streams a chat over TLS", Life.chat),
    ("memory", Life.memory),
    ("restarts when the decode thread is frozen", Life.freeze_thread),
    ("restarts when the process is stopped (SIGSTOP)", Life.freeze_process),
    ("finishes the answer on systemctl stop", Life.drain),
    ("loses power in mid-answer", Life.pull_plug),
    ("boots again with everything in place", Life.boot_again),
    ("gives the same answer", Life.chat_again),
    ("shuts a device out, and restores a backup", Life.restore),
    ("takes a newer package over the running daemon", Life.upgrade),
    ("goes back to the older one", Life.go_back),
    ("has a clean journal", Life.read_journal),
    ("purges to nothing", Life.purge),
)
