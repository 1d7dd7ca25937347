"""hearthd as a program: its words, its exit codes, and signals to a process of its own."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from bundles import write_bundle
from hearth.v1 import chat_pb2_grpc, status_pb2, status_pb2_grpc
from hearthd import __main__ as cli
from hearthd.access.tokens import TokenFile, create_token, list_tokens
from hearthd.errors import (
    AddressInUseError,
    BuildError,
    BundleError,
    ConfigError,
    EngineCrashedError,
    HearthdError,
    MissingPackageError,
    ModelNotFoundError,
)
from serving import NAME, PROMPT_FORWARDS, PROOF_FORWARDS, chat_request
from tls_files import make_tls_files

DAEMON = Path(__file__).with_name("serving.py")


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give hearthd places of the test's own, as systemd would."""
    for name in [name for name in os.environ if name.startswith("HEARTHD_")]:
        monkeypatch.delenv(name)
    for name in ("STATE", "RUNTIME", "CONFIGURATION"):
        monkeypatch.setenv(f"{name}_DIRECTORY", str(tmp_path / name.lower()))


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hearthd", *words], capture_output=True, text=True, check=False, timeout=60
    )


def one_line(done: subprocess.CompletedProcess[str], stdout: str = "") -> str:
    assert done.stdout == stdout
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


class Daemon:
    """A process, whose `FakeRunner` does as many forwards as it is allowed."""

    def __init__(self, directory: Path, notify: socket.socket, *flags: str) -> None:
        self._notify = notify
        self._directory = directory
        self.process = subprocess.Popen(
            [sys.executable, str(DAEMON), str(directory), *flags],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"NOTIFY_SOCKET": notify.getsockname()},
        )

    def allow(self, count: int) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()

    def wait_for(self, word: str) -> str:
        """Return systemd's next message with this word."""
        while True:
            message = self._notify.recv(4096).decode()
            if word in message:
                return message

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(f"unix:{self._directory}/hearthd.sock")

    def ended(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Start daemons that do not outlive the test."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(30)
        daemons: list[Daemon] = []

        def start_daemon(*flags: str) -> Daemon:
            daemons.append(Daemon(tmp_path, notify, *flags))
            return daemons[-1]

        yield start_daemon
        for daemon in daemons:
            daemon.process.kill()
            daemon.process.communicate()


# Words and exit codes.


def test_it_says_its_version() -> None:
    done = run("--version")
    assert re.fullmatch(r"hearthd \d+\.\d+\.\d+\S*\n", done.stdout)
    assert done.returncode == 0


@pytest.mark.parametrize("words", [[], ["nope"], ["serve", "--nope"], ["token"], ["token", "create"], ["model"]])
def test_wrong_usage_is_told_from_everything_else(words: list[str]) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 78),
        (BundleError("x"), 78),
        (ModelNotFoundError("x"), 78),
        (MissingPackageError("x"), 78),
        (AddressInUseError("x"), 69),
        (BuildError("x"), 1),
        (EngineCrashedError("x"), 70),
        (HearthdError("x"), 70),
    ],
)
def test_each_error_has_its_exit_code(error: HearthdError, code: int) -> None:
    assert cli.exit_code(error) == code


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("command", ["serve", "check-config"])
def test_a_bad_configuration_is_one_line_and_78(tmp_path: Path, command: str) -> None:
    (tmp_path / "bad.toml").write_text("[engine]\nslots = 99\n")
    done = run(command, "--config", str(tmp_path / "bad.toml"))
    assert done.returncode == 78
    assert one_line(done) == f"hearthd: {tmp_path}/bad.toml: engine.slots is 99; give a whole number from 1 to 64\n"


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("command", ["serve", "check-config"])
def test_an_open_lan_address_is_one_line_and_78(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("HEARTHD_SERVER_TCP", "0.0.0.0:0")
    done = run(command)
    assert done.returncode == 78
    read = "configuration: no file, the defaults\n" if command == "check-config" else ""
    assert "0.0.0.0:0, which other machines can reach" in one_line(done, read)


@pytest.mark.usefixtures("environment")
def test_a_model_that_is_not_installed_is_one_line_and_78(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state/models/.incoming-half").mkdir(parents=True)
    monkeypatch.setenv("HEARTHD_SERVER_TCP", "")
    monkeypatch.setenv("HEARTHD_LOG_LEVEL", "error")
    done = run("serve")
    assert done.returncode == 78
    assert "smollm2-135m" in one_line(done)
    assert "is not installed" in one_line(done)
    # What a power cut left of an installation is swept before the model is looked for.
    assert not (tmp_path / "state/models/.incoming-half").exists()


@pytest.mark.usefixtures("environment")
def test_check_config_prints_what_serve_would_use(tmp_path: Path) -> None:
    write_bundle(tmp_path / "state/models/smollm2-135m", name="smollm2-135m")
    (tmp_path / "good.toml").write_text('[server]\ntcp = ["127.0.0.1:50099"]\n')
    done = run("check-config", "--config", str(tmp_path / "good.toml"))
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0] == f"configuration: {tmp_path}/good.toml"
    assert "server.unix_socket_mode = 0660" in lines
    assert "server.tcp = ['127.0.0.1:50099']" in lines
    assert f"model.directory = {tmp_path}/state/models" in lines
    assert lines[-1] == f"good: would listen on unix://{tmp_path}/runtime/hearthd.sock, 127.0.0.1:50099"
    assert not (tmp_path / "runtime").exists()


@pytest.mark.usefixtures("environment")
def test_check_config_can_be_quiet_but_for_what_is_wrong(tmp_path: Path) -> None:
    """What the unit asks at each reload: the journal is for news."""
    assert "is not installed" in one_line(run("check-config", "--quiet"))
    write_bundle(tmp_path / "state/models/smollm2-135m", name="smollm2-135m")
    done = run("check-config", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.usefixtures("environment")
def test_check_config_reads_certificate_and_tokens_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEARTHD_AUTH_TOKEN_FILE", str(tmp_path / "none"))
    read = "configuration: no file, the defaults\n"
    assert "there is no token file" in one_line(run("check-config"), read)
    monkeypatch.delenv("HEARTHD_AUTH_TOKEN_FILE")
    monkeypatch.setenv("HEARTHD_TLS_CERTIFICATE", str(tmp_path / "none"))
    monkeypatch.setenv("HEARTHD_TLS_KEY", str(tmp_path / "none"))
    assert "tls.certificate" in one_line(run("check-config"), read)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("command", ["serve", "check-config"])
def test_check_config_refuses_an_audit_file_and_metrics_that_serve_refuses(tmp_path: Path, command: str) -> None:
    write_bundle(tmp_path / "state/models/smollm2-135m", name="smollm2-135m")
    file, read = tmp_path / "bad.toml", f"configuration: {tmp_path}/bad.toml\n" if command == "check-config" else ""
    (tmp_path / "log").mkdir()
    file.write_text(f'[audit]\nfile = "{tmp_path}/log"\n')
    done = run(command, "--config", str(file))
    assert done.returncode == 78
    assert f"audit file {tmp_path}/log cannot be written: it is there and no regular file" in one_line(done, read)
    file.write_text('[server]\ntcp = ["127.0.0.1:50099"]\n[metrics]\naddress = "localhost:50099"\n')
    done = run(command, "--config", str(file))
    assert done.returncode == 78
    assert "metrics.address is localhost:50099, and server.tcp has 127.0.0.1:50099" in one_line(done, read)


@pytest.mark.usefixtures("environment")
def test_check_config_makes_no_audit_file(tmp_path: Path) -> None:
    write_bundle(tmp_path / "state/models/smollm2-135m", name="smollm2-135m")
    (tmp_path / "good.toml").write_text(f'[audit]\nfile = "{tmp_path}/none/audit.jsonl"\n')
    assert run("check-config", "--config", str(tmp_path / "good.toml")).returncode == 0
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("environment")
def test_check_config_says_what_roles_may_and_whose_token_has_none(tmp_path: Path) -> None:
    write_bundle(tmp_path / "state/models/smollm2-135m", name="smollm2-135m")
    create_token(tmp_path / "state/tokens", "phone", role="guest")
    create_token(tmp_path / "state/tokens", "tablet", role="gone")
    (tmp_path / "good.toml").write_text(
        '[auth]\ntoken_file = "auto"\n[roles.guest]\nmethods = ["chat"]\ntokens_per_day = 20000\n'
    )
    done = run("check-config", "--config", str(tmp_path / "good.toml"))
    assert done.returncode == 0
    assert "hearthd: warning: token tablet has no rights: no role gone\n" in done.stderr
    assert "phone" not in done.stderr
    lines = done.stdout.splitlines()
    assert "roles.guest.methods = ['chat']" in lines
    assert "roles.guest.tokens_per_day = 20000" in lines
    assert not [line for line in lines if line.startswith(("roles.admin", "roles.user", "roles.monitor"))]


@pytest.mark.usefixtures("environment")
def test_check_config_says_which_file_it_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, named = tmp_path / "configuration/hearthd.toml", tmp_path / "named.toml"
    usual.parent.mkdir()
    assert run("check-config").stdout.splitlines()[0] == "configuration: no file, the defaults"
    for file in (usual, named):
        file.write_text("")
    assert run("check-config").stdout.splitlines()[0] == f"configuration: {usual}"
    monkeypatch.setenv("HEARTHD_CONFIG", str(named))
    assert run("check-config").stdout.splitlines()[0] == f"configuration: {named}"


@pytest.mark.usefixtures("environment")
def test_check_config_refuses_a_model_that_cannot_be_served(tmp_path: Path) -> None:
    read = "configuration: no file, the defaults\n"
    models = tmp_path / "state/models"
    done = run("check-config")
    assert done.returncode == 78
    assert one_line(done, read) == (
        f"hearthd: model 'smollm2-135m' is not installed in {models}; these are: none; see `hearthd model add`\n"
    )
    write_bundle(models / "smollm2-135m", name="smollm2-135m")
    assert run("check-config").returncode == 0
    (models / "smollm2-135m/manifest.json").write_text("{")
    done = run("check-config")
    assert done.returncode == 78
    assert "manifest.json is not JSON" in (line := one_line(done, read))
    assert line.endswith("; build the model again\n")


@pytest.mark.usefixtures("environment")
def test_check_config_warns_of_a_key_that_others_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bundle(tmp_path / "state/models/smollm2-135m", name="smollm2-135m")
    files = make_tls_files(tmp_path)
    monkeypatch.setenv("HEARTHD_TLS_CERTIFICATE", str(files.certificate))
    monkeypatch.setenv("HEARTHD_TLS_KEY", str(files.key))
    files.key.chmod(0o600)
    assert run("check-config").stderr == ""
    files.key.chmod(0o644)
    done = run("check-config")
    assert done.returncode == 0
    assert done.stderr == (
        f"hearthd: warning: tls.key: key file {files.key} has mode 0644; others may read it; "
        f"run: chmod 600 {files.key}\n"
    )


WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
from hearthd.__main__ import main
sys.exit(main({words!r}))
"""
# What a plain install leaves out: the modules of the extra `daemon`.
EXTRA = ("onnxruntime", "tokenizers", "numpy", "jinja2", "grpc_health", "grpc_reflection", "gguf", "onnx")


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("words", "packages", "told"),
    [
        (["--version"], EXTRA, "gguf|jinja2|numpy|onnx|tokenizers"),
        (["model", "list"], EXTRA, "gguf|jinja2|numpy|onnx|tokenizers"),
        (["serve"], EXTRA, "grpc_health|numpy"),
        (["serve"], ("onnxruntime",), "onnxruntime"),
        (["check-config"], ("numpy",), "numpy"),
    ],
    ids=" ".join,
)
def test_a_package_that_is_missing_is_one_line_and_78(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], packages: tuple[str, ...], told: str
) -> None:
    write_bundle(tmp_path / "state/models/smollm2-135m", name="smollm2-135m")
    monkeypatch.setenv("HEARTHD_SERVER_TCP", "")
    monkeypatch.setenv("HEARTHD_LOG_LEVEL", "error")
    program = WITHOUT.format(packages=packages, words=words)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 78
    assert re.search(
        f"the Python package ({told}) is not installed; pip install 'hearth-chat\\[daemon\\]' brings it\n$",
        one_line(done),
    )


@pytest.mark.usefixtures("environment")
def test_tokens_are_made_listed_and_revoked(tmp_path: Path) -> None:
    created = run("token", "create", "kitchen")
    assert created.returncode == 0
    secret = created.stdout.removesuffix("\n")
    file = TokenFile(tmp_path / "state/tokens")
    assert file.find(secret) is not None
    assert secret not in created.stderr

    assert "'kitchen' is taken" in one_line(run("token", "create", "kitchen"))
    listed = run("token", "list")
    assert re.fullmatch(r"kitchen\tuser\t\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\tnever\n", listed.stdout)

    assert run("token", "revoke", "kitchen").returncode == 0
    assert file.find(secret) is None
    assert run("token", "revoke", "kitchen").returncode == 78
    elsewhere = run("token", "create", "cellar", "--token-file", str(tmp_path / "elsewhere"))
    assert elsewhere.returncode == 0
    assert len(list_tokens(tmp_path / "elsewhere")) == 1


def test_serving_is_told_apart_before_anything_heavy_is_imported() -> None:
    """A second instance must hear within two seconds, on a board too, that it is one."""
    heavy = ("onnxruntime", "onnx", "huggingface_hub", "hearthd.build", "tokenizers", "jinja2", "numpy")
    program = (
        "import sys; from hearthd.__main__ import _parser; _parser(['token', 'list']);"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


# Signals.


def test_sigterm_lets_a_running_answer_finish(start: Callable[..., Daemon]) -> None:
    daemon = start("gated")
    daemon.allow(PROOF_FORWARDS + PROMPT_FORWARDS + 1)
    daemon.wait_for("READY=1")
    with daemon.channel() as channel:
        responses = iter(chat_pb2_grpc.ChatServiceStub(channel).Chat(chat_request(max_tokens=20)))
        received = [next(responses)]
        daemon.process.send_signal(signal.SIGTERM)
        assert "1 chats may finish" in daemon.wait_for("STOPPING=1")
        assert daemon.wait_for("EXTEND_TIMEOUT_USEC=") == "EXTEND_TIMEOUT_USEC=9000000"
        daemon.allow(1000)
        received.extend(responses)
    assert received[-1].final.usage.completion_tokens == 20
    code, errors = daemon.ended()
    assert code == 0, errors


def test_sigterm_ends_what_does_not_finish(start: Callable[..., Daemon]) -> None:
    daemon = start("gated", "hurried")
    daemon.allow(PROOF_FORWARDS + PROMPT_FORWARDS + 1)
    daemon.wait_for("READY=1")
    with daemon.channel() as channel:
        responses = iter(chat_pb2_grpc.ChatServiceStub(channel).Chat(chat_request(max_tokens=20)))
        next(responses)
        daemon.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:
            list(responses)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    code, errors = daemon.ended()
    assert code == 0, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_daemon_ends_within_a_second(start: Callable[..., Daemon], number: signal.Signals) -> None:
    daemon = start()
    daemon.wait_for("READY=1")
    with daemon.channel() as channel:
        status_pb2_grpc.StatusServiceStub(channel).GetStatus(status_pb2.GetStatusRequest())
        started = time.monotonic()
        daemon.process.send_signal(number)
        assert daemon.process.wait(30) == 0
        assert time.monotonic() - started < 1.0


def test_a_daemon_whose_loop_hangs_ends_all_the_same(start: Callable[..., Daemon]) -> None:
    daemon = start("hanging", "hurried")
    daemon.wait_for("READY=1")
    daemon.process.send_signal(signal.SIGTERM)
    code, errors = daemon.ended()
    assert code == 1
    # Where every thread stood, for whoever has to find out.
    assert "Timeout (0:00:04)!" in errors
    assert "in stop" in errors or "serving.py" in errors


def test_a_second_instance_ends_within_two_seconds_and_the_first_goes_on(start: Callable[..., Daemon]) -> None:
    first = start()
    first.wait_for("READY=1")
    started = time.monotonic()
    second = start()
    code, errors = second.ended()
    assert time.monotonic() - started < 2.0
    assert code == 69
    assert f"is served by another hearthd (process {first.process.pid})" in errors
    assert errors.count("\n") == 1
    with first.channel() as channel:
        *_, last = chat_pb2_grpc.ChatServiceStub(channel).Chat(chat_request())
        assert last.final.model == NAME


def test_a_killed_daemon_leaves_nothing_that_stops_the_next(start: Callable[..., Daemon]) -> None:
    first = start()
    first.wait_for("READY=1")
    first.process.kill()
    first.process.wait()
    second = start()
    second.wait_for("READY=1")
    with second.channel() as channel:
        *_, last = chat_pb2_grpc.ChatServiceStub(channel).Chat(chat_request())
        assert last.HasField("final")


def test_a_model_that_generates_nothing_ends_the_start_without_its_words(start: Callable[..., Daemon]) -> None:
    daemon = start("broken")
    code, errors = daemon.ended()
    assert code == 70
    assert re.search(r"critical|error", errors)
    assert "canary" not in errors
    assert "Traceback" not in errors
    assert "READY" not in errors


def test_the_log_of_a_life_is_readable_and_says_nothing_that_was_said(start: Callable[..., Daemon]) -> None:
    daemon = start()
    daemon.wait_for("READY=1")
    with daemon.channel() as channel:
        *_, last = chat_pb2_grpc.ChatServiceStub(channel).Chat(chat_request("canary", request_id="abc"))
        assert last.final.request_id == "abc"
        with pytest.raises(grpc.RpcError):
            list(chat_pb2_grpc.ChatServiceStub(channel).Chat(chat_request("canary", temperature=99)))
    daemon.process.send_signal(signal.SIGTERM)
    _, errors = daemon.ended()
    lines = errors.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d (info   |warning|error  ) ", line) for line in lines), errors
    assert any("chat abc of -: length, prompt" in line for line in lines)
    assert "canary" not in errors
