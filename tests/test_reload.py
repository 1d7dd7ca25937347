"""SIGHUP: all of a new configuration that can change live, or nothing of it; and somebody hears which."""

import asyncio
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from daemon_process import DaemonProcess, scripted
from hearth.v1 import chat_pb2, chat_pb2_grpc, model_pb2, model_pb2_grpc, status_pb2, status_pb2_grpc
from hearthd.access.tokens import create_token
from hearthd.configuration.config import Config
from hearthd.errors import ConfigError
from hearthd.life.beside import beside
from hearthd.life.reload import Outcome, Reload
from serving import (
    PROMPT_FORWARDS,
    PROOF_FORWARDS,
    answer,
    asynchronous,
    chat_request,
    make_config,
    serving,
    tcp_target,
    unix_target,
)
from several_models import Shelf, entry, several_config
from tls_files import make_tls_files

# All or nothing, by itself.


class Part:
    """A part that writes down what is asked of it, and cannot use a certain level."""

    def __init__(self, *keys: str, refuses: str = "") -> None:
        self.keys = frozenset(keys)
        self._refuses = refuses
        self.applied: list[Config] = []
        self.num_prepared = 0

    def prepare(self, config: Config) -> Callable[[], None]:
        self.num_prepared += 1
        if config.log.level == self._refuses:
            raise ConfigError(f"log.level is {self._refuses}")
        return lambda: self.applied.append(config)


def change(config: Config, **sections: dict[str, object]) -> Config:
    return replace(config, **{name: replace(getattr(config, name), **keys) for name, keys in sections.items()})


@asynchronous
async def test_every_part_gets_the_new_values_of_live_keys_and_the_old_ones_of_the_others(tmp_path: Path) -> None:
    old = make_config(tmp_path)
    new = change(old, limits={"max_queued": 7}, log={"level": "debug"}, engine={"slots": 9})
    parts = Part("limits.max_queued"), Part("log.level")
    reload = Reload(old, lambda: new, parts)
    outcome = await reload.run()
    assert outcome == Outcome(changed=("limits.max_queued", "log.level"), need_restart=("engine.slots",))
    in_force = change(old, limits={"max_queued": 7}, log={"level": "debug"})
    assert [part.applied for part in parts] == [[in_force], [in_force]]
    assert reload.config == in_force


@asynchronous
async def test_what_one_part_cannot_use_changes_no_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = make_config(tmp_path)
    first, last = Part("limits.max_queued"), Part("log.level", refuses="debug")
    reload = Reload(old, lambda: change(old, limits={"max_queued": 7}, log={"level": "debug"}), (first, last))
    assert (await reload.run()).error == "log.level is debug"
    assert first.num_prepared == 1
    assert (first.applied, last.applied, reload.config) == ([], [], old)
    assert "the old one stays in force: log.level is debug" in caplog.text


@asynchronous
async def test_a_file_that_cannot_be_read_prepares_nothing(tmp_path: Path) -> None:
    def load() -> Config:
        raise ConfigError("x.toml is not TOML")

    part = Part("log.level")
    assert (await Reload(make_config(tmp_path), load, (part,)).run()).error == "x.toml is not TOML"
    assert part.num_prepared == 0


@asynchronous
async def test_a_fault_of_ours_changes_nothing_and_quotes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def load() -> Config:
        raise RuntimeError("canary")

    old = make_config(tmp_path)
    reload = Reload(old, load, (Part("log.level"),))
    assert "incident" in str((await reload.run()).error)
    assert reload.config == old
    assert "canary" not in caplog.text


@asynchronous
async def test_a_part_that_cannot_take_over_keeps_neither_the_others_nor_the_next_reload(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Faulty(Part):
        def prepare(self, config: Config) -> Callable[[], None]:
            taking = super().prepare(config)

            def apply() -> None:
                if self.num_prepared == 1:
                    raise RuntimeError("canary")
                taking()

            return apply

    old = make_config(tmp_path)
    new = change(old, limits={"max_queued": 7}, log={"level": "debug"})
    first, last = Faulty("limits.max_queued"), Part("log.level")
    reload = Reload(old, lambda: new, (first, last))
    outcome = await reload.run()
    assert outcome.is_partial
    assert outcome.error is not None
    assert outcome.error.partition("incident ")[2].split(",")[0] in caplog.text
    assert "canary" not in caplog.text
    assert (first.applied, last.applied) == ([], [new])
    assert "a part of the new configuration is not in force" in str(reload.find_problem())
    assert (await reload.run()).error is None
    assert (first.applied, last.applied, reload.config) == ([new], [new, new], new)
    assert reload.find_problem() is None


@asynchronous
async def test_what_ends_beside_the_daemon_is_told_at_once(caplog: pytest.LogCaptureFixture) -> None:
    async def feed() -> None:
        raise RuntimeError("canary")

    async def go_on() -> None:
        await asyncio.Event().wait()

    async with beside(feed(), go_on()):
        for _ in range(3):  # to begin, to end, to tell
            await asyncio.sleep(0)
        assert "feed has ended before its time, incident " in caplog.text
    assert "canary" not in caplog.text
    assert "go_on" not in caplog.text


@asynchronous
async def test_what_needs_a_restart_is_said_each_time_until_it_is_taken_back(tmp_path: Path) -> None:
    old = make_config(tmp_path)
    files = [change(old, engine={"slots": 9}), change(old, engine={"slots": 9}), old]
    reload = Reload(old, lambda: files.pop(0), (Part("log.level"),))
    assert [(await reload.run()).need_restart for _ in range(3)] == [("engine.slots",), ("engine.slots",), ()]


@asynchronous
async def test_roles_are_one_key(tmp_path: Path) -> None:
    old = make_config(tmp_path)
    new = replace(old, roles={**old.roles, "guest": replace(old.roles["user"], tokens_per_day=5)})
    assert await Reload(old, lambda: new, (Part("roles"),)).run() == Outcome(changed=("roles",))
    assert await Reload(old, lambda: new, (Part("log.level"),)).run() == Outcome(need_restart=("roles",))


# In a daemon.


async def limits_of(channel: grpc.aio.Channel) -> model_pb2.Limits:
    listed = await model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest())
    return listed.models[0].limits


@asynchronous
async def test_limits_hold_for_the_next_request(tmp_path: Path) -> None:
    old = make_config(tmp_path)
    new = change(old, limits={"max_messages": 1, "default_max_tokens": 3, "max_queued": 0})
    async with serving(old, load_again=lambda: new) as server, grpc.aio.insecure_channel(unix_target(old)) as channel:
        _, before = await answer(channel, chat_request())
        assert (await server._parts.reload.run()).need_restart == ()
        limits = await limits_of(channel)
        assert (limits.max_messages, limits.default_max_tokens, limits.max_queued) == (1, 3, 0)
        _, after = await answer(channel, chat_request())
        assert (before.usage.completion_tokens, after.usage.completion_tokens) == (8, 3)
        two = chat_pb2.ChatRequest(messages=[*chat_request().messages] * 2)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer(channel, two)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@asynchronous
async def test_roles_hold_for_the_next_call_on_the_same_connection(tmp_path: Path) -> None:
    old = make_config(tmp_path)
    new = change(old, auth={"open_role": "monitor"})
    async with serving(old, load_again=lambda: new) as server, grpc.aio.insecure_channel(unix_target(old)) as channel:
        await answer(channel, chat_request())
        await server._parts.reload.run()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer(channel, chat_request())
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


@asynchronous
async def test_no_mixture_of_old_addresses_and_new_keys_opens_the_network(tmp_path: Path) -> None:
    """The file alone would be right: open, and on loopback. But the network's address stays until the next start."""
    files = make_tls_files(tmp_path)
    tls = {"certificate": files.certificate, "key": files.key}
    old = make_config(
        tmp_path, server={"tcp": ("0.0.0.0:0",)}, tls=tls, auth={"certificates": (("phone.lan", "user"),)}
    )
    old = change(old, tls={"clients": files.certificate})
    new = change(old, server={"tcp": ("127.0.0.1:0",)}, auth={"certificates": ()})
    async with serving(old, load_again=lambda: new) as server:
        outcome = await server._parts.reload.run()
        assert outcome.error
        assert "which other machines can reach" in outcome.error
        assert server._parts.reload.config == old


@pytest.mark.parametrize("broken", ["tokens", "certificate", "policy"])
@asynchronous
async def test_a_broken_file_beside_the_configuration_leaves_all_as_it_was(tmp_path: Path, broken: str) -> None:
    files = make_tls_files(tmp_path)
    tokens, policy = tmp_path / "tokens", tmp_path / "policy.toml"
    create_token(tokens, "kitchen")
    policy.write_text("")
    old = make_config(
        tmp_path,
        tls={"certificate": files.certificate, "key": files.key},
        auth={"token_file": tokens},
        policy={"file": policy},
    )
    new = change(old, limits={"max_messages": 1})
    async with serving(old, load_again=lambda: new) as server, grpc.aio.insecure_channel(unix_target(old)) as channel:
        assert tcp_target(server)
        {"tokens": tokens, "certificate": files.certificate, "policy": policy}[broken].write_text("[[broken\n")
        assert (await server._parts.reload.run()).error
        assert (await limits_of(channel)).max_messages == old.limits.max_messages
        await answer(channel, chat_request())


@asynchronous
async def test_a_reload_under_load_fails_no_call(tmp_path: Path) -> None:
    old = make_config(tmp_path, limits={"max_queued": 64})
    configs = [change(old, limits={"max_messages": 1 + number}) for number in range(20)]
    async with (
        serving(old, load_again=lambda: configs.pop()) as server,
        grpc.aio.insecure_channel(unix_target(old)) as channel,
    ):
        # Fewer than the 32 that a connection may have: gRPC refuses others at random, reload or not.
        chats = [asyncio.create_task(answer(channel, chat_request())) for _ in range(24)]
        while configs:
            assert (await server._parts.reload.run()).error is None
        texts = {text for text, _ in await asyncio.gather(*chats)}
    assert len(texts) == 1


@pytest.mark.parametrize("leaves_after_checks", [False, True])
@asynchronous
async def test_a_reload_while_a_model_gives_its_memory_back_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaves_after_checks: bool
) -> None:
    collecting, go_on = threading.Event(), threading.Event()

    def collect() -> None:
        collecting.set()
        assert go_on.wait(30)

    def read_slowly(_: Config) -> None:
        assert collecting.wait(30)

    monkeypatch.setattr("hearthd.models.heap.let_go", collect)
    if leaves_after_checks:
        monkeypatch.setattr("hearthd.life.live_parts.read_shared_prompts", read_slowly)
    old = several_config(tmp_path, "other", idle_seconds=600.0)
    configs = [change(old, limits={"max_queued": number}) for number in (7, 9)]
    shelf = Shelf()
    async with (
        serving(old, shelf.load, survey=shelf.survey, load_again=lambda: configs.pop(0)) as server,
        grpc.aio.insecure_channel(unix_target(old)) as channel,
    ):
        await answer(channel, chat_request(model="other"))
        pool, reload = server._parts.models, server._parts.reload
        if leaves_after_checks:
            reloading = asyncio.create_task(reload.run())
        pool._residents.part_with(entry(pool, "other"))
        assert await asyncio.to_thread(collecting.wait, 30)
        assert entry(pool, "other").worker is not None
        outcome = await (reloading if leaves_after_checks else reload.run())
        assert (outcome.error, pool.max_queued, reload.config.limits.max_queued) == (None, 7, 7)
        go_on.set()
        assert (await reload.run()).error is None
        assert (pool.max_queued, reload.config.limits.max_queued) == (9, 9)


# SIGHUP, to a process.

TOML = """
[server]
unix_socket = "{directory}/hearthd.sock"
tcp = []
[model]
name = "test-model"
directory = "{directory}"
[limits]
max_messages = {max_messages}
[engine]
slots = {slots}
"""


def write(directory: Path, *, max_messages: int = 4, slots: int = 2) -> None:
    new = directory / "new"
    new.write_text(TOML.format(directory=directory, max_messages=max_messages, slots=slots))
    new.replace(directory / "hearthd.toml")


def hang_up(daemon: DaemonProcess) -> str:
    """Send SIGHUP; return systemd's READY after it."""
    daemon.process.send_signal(signal.SIGHUP)
    told = daemon.wait_for("RELOADING=1")
    assert "\nMONOTONIC_USEC=" in told
    return daemon.wait_for("READY=1")


def max_messages(daemon: DaemonProcess) -> int:
    with daemon.channel() as channel:
        listed = model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest())
        return int(listed.models[0].limits.max_messages)


def test_a_hangup_reads_the_file_again_and_systemd_hears_what_came_of_it(tmp_path: Path) -> None:
    write(tmp_path)
    with scripted(tmp_path) as daemon:
        serving_now = daemon.wait_for("READY=1")
        assert max_messages(daemon) == 4

        write(tmp_path, max_messages=9)
        assert hang_up(daemon) == serving_now
        assert max_messages(daemon) == 9
        assert "configuration read again; changed: limits.max_messages" in daemon.log

        write(tmp_path, max_messages=8, slots=3)
        assert hang_up(daemon) == f"{serving_now}; needs a restart: engine.slots"
        assert max_messages(daemon) == 8
        assert "other values of engine.slots, which need a restart" in daemon.log

        (tmp_path / "hearthd.toml").write_text("[limits]\nmax_messages = 0\n")
        said = hang_up(daemon)
        assert said.startswith(f"{serving_now}; the new configuration cannot be used, the old one stays: ")
        assert "limits.max_messages is 0; give a whole number from 1 to 4096" in said
        assert max_messages(daemon) == 8

        write(tmp_path)
        assert hang_up(daemon) == serving_now
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(30) == 0


def test_a_hangup_while_the_model_loads_waits_and_ends_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    with scripted(tmp_path, "gated") as daemon:
        daemon.wait_for("STATUS=loading")
        with daemon.channel() as channel:  # which is answered only once signals are listened for
            stub = status_pb2_grpc.StatusServiceStub(channel)
            state = stub.GetStatus(status_pb2.GetStatusRequest(), wait_for_ready=True, timeout=30).state
            assert state == status_pb2.DAEMON_STATE_LOADING
        write(tmp_path, max_messages=9)
        daemon.process.send_signal(signal.SIGHUP)
        assert daemon.process.stdin
        daemon.process.stdin.close()  # which opens the gate
        daemon.process.stdin = None
        daemon.wait_for("READY=1")
        assert [message for _, message in daemon.messages if "RELOADING" in message] == []
        daemon.wait_for("RELOADING=1")
        daemon.wait_for("READY=1")
        assert max_messages(daemon) == 9


def test_a_hangup_during_an_answer_leaves_it_whole(tmp_path: Path) -> None:
    write(tmp_path)
    with scripted(tmp_path, "gated") as daemon:
        assert daemon.process.stdin
        daemon.process.stdin.write(f"{PROOF_FORWARDS + PROMPT_FORWARDS + 1}\n")
        daemon.process.stdin.flush()
        daemon.wait_for("READY=1")
        with daemon.channel() as channel:
            responses = iter(chat_pb2_grpc.ChatServiceStub(channel).Chat(chat_request(max_tokens=20)))
            received = [next(responses)]
            write(tmp_path, max_messages=9)
            hang_up(daemon)
            daemon.process.stdin.close()
            daemon.process.stdin = None
            received.extend(responses)
        assert received[-1].final.usage.completion_tokens == 20
