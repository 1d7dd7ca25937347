"""System prompts that the owner shares: as the model gets them, whoever asks; and from configuration to cache."""

import asyncio
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

import tiny_tokenizers as tiny
from hearth.v1 import chat_pb2
from hearthd.access.tokens import create_token
from hearthd.configuration.config import Config, ModelOptions, ModelsConfig
from hearthd.errors import ConfigError
from hearthd.inference.model import Model
from hearthd.inference.shared_prompts import encode_shared_prompts, read_shared_prompts
from hearthd.kv.budget import KVBudget
from hearthd.kv.shared import SharedPrompts
from hearthd.policy.policy_file import PolicyFile
from hearthd.text.chat_template import Message
from hearthd.text.tokenizer import ChatTokenizer
from serving import (
    answer,
    asynchronous,
    chat_request,
    make_config,
    make_model,
    make_runner,
    make_tokenizer,
    serving,
    tcp_target,
)

TEXT = "You run a house with a kitchen, two bedrooms and a garden. Answer in one sentence. " * 3


def config(directory: Path, *texts: str, policy: str = "") -> Config:
    names = []
    for number, text in enumerate(texts):
        path = directory / f"prompt{number}.txt"
        path.write_text(text)
        names.append(str(path))
    (directory / "policy.toml").write_text(policy)
    return make_config(directory, cache={"shared_prompts": tuple(names)}, policy={"file": directory / "policy.toml"})


def begins_with_one(shared: SharedPrompts, *messages: Message, audience: str = "") -> int:
    return shared.num_shared(make_tokenizer().encode_chat(messages), audience)


def test_every_chat_with_this_system_prompt_begins_with_it(tmp_path: Path) -> None:
    shared = encode_shared_prompts(config(tmp_path, TEXT, "Other."), make_tokenizer())
    assert len(shared.all()) == 2
    for question in ("Hello", "A", "0", " space"):
        assert begins_with_one(shared, Message("system", TEXT.strip()), Message("user", question)) > 100
    assert begins_with_one(shared, Message("system", "Third."), Message("user", "Hello")) == 0


def test_the_policys_instructions_come_first_and_are_shared_themselves(tmp_path: Path) -> None:
    policy = '[[system]]\nprompt = "Be polite."\n\n[[system]]\nprompt = "Only for guests."\nroles = ["guest"]\n'
    made = config(tmp_path, TEXT, policy=policy)
    object.__setattr__(made, "roles", {**made.roles, "guest": made.roles["user"]})
    shared = encode_shared_prompts(made, make_tokenizer())
    assert len(shared.all()) == 4
    rules = PolicyFile(made.policy.file, made.roles).current
    for role in ("guest", "user"):
        for messages in ([Message("user", "Hi")], [Message("system", TEXT.strip()), Message("user", "Hi")]):
            assert begins_with_one(shared, *rules.for_role(role).add_prompt(messages), audience=role) > 10


def test_what_only_guests_are_told_is_found_by_nobody_else_who_guesses_it(tmp_path: Path) -> None:
    """Instructions and callers' own message become one text: whoever may send one can send what others are told."""
    policy = '[[system]]\nprompt = "Be polite."\n\n[[system]]\nprompt = "Only for guests."\nroles = ["guest"]\n'
    made = config(tmp_path, TEXT, policy=policy)
    object.__setattr__(made, "roles", {**made.roles, "guest": made.roles["user"]})
    shared = encode_shared_prompts(made, make_tokenizer())
    rules = PolicyFile(made.policy.file, made.roles).current.for_role("user")
    hello = Message("user", "Hello")
    for guess in ("Only for guests.", f"Only for guests.\n\n{TEXT.strip()}"):
        guessed = rules.add_prompt([Message("system", guess), hello])
        assert begins_with_one(shared, *guessed, audience="guest") > 30
        assert begins_with_one(shared, *guessed, audience="user") == 0
        assert begins_with_one(shared, *guessed, audience="a role that the policy does not name") == 0


def test_a_shared_prompt_is_as_the_policy_lets_it_through(tmp_path: Path) -> None:
    policy = """
[[blocked]]
name = "garden"
on = "input"
phrases = ["garden"]
action = "replace"
text = "yard"

[[blocked]]
name = "bedrooms"
on = "input"
roles = ["guest"]
phrases = ["bedrooms"]
"""
    made = config(tmp_path, TEXT, policy=policy)
    object.__setattr__(made, "roles", {**made.roles, "guest": made.roles["user"]})
    shared = encode_shared_prompts(made, make_tokenizer())
    rules = PolicyFile(made.policy.file, made.roles).current.for_role("user")
    sent = rules.apply([Message("system", TEXT.strip()), Message("user", "Hello")], set())
    assert "yard" in sent[0].content
    assert begins_with_one(shared, *sent) > 100
    assert list(shared.by_audience["guest"]) == []


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "cannot be read: No such file"), (b"\xff", "is not UTF-8"), (b" \n", "is empty")]
)
def test_a_file_that_is_no_prompt_is_one_clear_line(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        read_shared_prompts(make_config(tmp_path, cache={"shared_prompts": (str(path),)}))


class TestBeginnings:
    def test_end_before_the_users_words(self) -> None:
        tokenizer = make_tokenizer()
        system = Message("system", TEXT)
        prompts = [tokenizer.encode_chat([system, Message("user", text)]) for text in ("Hello", "What?", "hello there")]
        counts = {tokenizer.count_beginning([system, Message("user", "Hello")], prompt) for prompt in prompts}
        assert len(counts) == 1
        count = counts.pop()
        assert len({tuple(prompt[:count]) for prompt in prompts}) == 1
        assert count < min(map(len, prompts))

    def test_without_a_system_message_there_is_none(self) -> None:
        tokenizer = make_tokenizer()
        for messages in ([Message("user", TEXT)], [Message("system", "short"), Message("user", "Hello")]):
            assert tokenizer.count_beginning(messages, tokenizer.encode_chat(messages)) == 0

    def test_a_template_that_tells_the_time_is_asked_again(self) -> None:
        moment = [datetime(2026, 11, 22)]
        tokenizer = ChatTokenizer(
            tiny.byte_level(),
            "{{ strftime_now('%A') }}" + tiny.CHATML,
            eos_ids=[tiny.id_of("<|im_end|>")],
            now=lambda: moment[0],
        )
        messages = [Message("system", TEXT), Message("user", "Hello")]
        first = tokenizer.count_beginning(messages, tokenizer.encode_chat(messages))
        moment[0] = datetime(2026, 11, 25)
        prompt = tokenizer.encode_chat(messages)
        second = tokenizer.count_beginning(messages, prompt)
        assert first > 100
        assert second > 100
        assert prompt[:second] == tokenizer.encode_beginning(messages[0])


@pytest.mark.parametrize(
    ("options", "num_told"),
    [
        ({"num_slots": 1}, 0),
        ({"num_slots": 3, "kv_budget": KVBudget(64, 4, 1)}, 6),  # 128 tokens: less than one of them
        ({"num_slots": 1, "kv_budget": KVBudget(64, 10, 1)}, 0),  # 320 tokens: one of them
    ],
)
@asynchronous
async def test_a_daemon_is_ready_whatever_room_they_have(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], num_told: int
) -> None:
    shared = config(tmp_path, *(f"{number} {TEXT[:150]}" for number in range(6)))

    def load(own: Config) -> Model:
        model = make_model(make_runner(context_length=512, **options))
        model.engine.share_prompts(encode_shared_prompts(own, model.tokenizer))
        return model

    async with (
        asyncio.timeout(30),
        serving(shared, load) as server,
        grpc.aio.insecure_channel(tcp_target(server)) as channel,
    ):
        text, _ = await answer(channel, chat_request("?"))
    assert text
    told = [record.message for record in caplog.records if "shared prompt" in record.message]
    assert len(told) == num_told
    assert all("raise engine.kv_bytes" in message for message in told)


@asynchronous
async def test_a_caller_is_not_told_that_others_instructions_are_cached(tmp_path: Path) -> None:
    """Over gRPC. What is not counted as cached has been run, so that time tells nothing either."""
    policy = '[[system]]\nprompt = "Be polite."\n\n[[system]]\nprompt = "The alarm is off."\nroles = ["guest"]\n'
    plain = config(tmp_path, policy=policy)
    own = replace(
        plain,
        roles={**plain.roles, "guest": plain.roles["user"]},
        auth=replace(plain.auth, token_file=tmp_path / "tokens"),
    )
    callers = {
        name: (("authorization", f"Bearer {create_token(tmp_path / 'tokens', name, role=role)}"),)
        for name, role in {"anna": "guest", "ben": "guest", "cleo": "user"}.items()
    }

    def load(config: Config) -> Model:
        model = make_model(make_runner(context_length=512, num_slots=4))
        model.engine.share_prompts(encode_shared_prompts(config, model.tokenizer))
        return model

    async with serving(own, load) as server, grpc.aio.insecure_channel(tcp_target(server)) as channel:

        async def num_cached(name: str, system: str = "") -> int:
            request = chat_request("?", max_tokens=1)
            if system:
                request.messages.insert(0, chat_pb2.Message(role=chat_pb2.ROLE_SYSTEM, content=system))
            _, final = await answer(channel, request, metadata=callers[name])
            return int(final.usage.cached_prompt_tokens)

        await num_cached("anna")
        assert await num_cached("cleo", "The alarm is off.") == 0
        assert await num_cached("ben") > 30


@asynchronous
async def test_they_follow_the_policy_at_a_reload_whenever_a_model_was_loaded(tmp_path: Path) -> None:
    """Two callers, who share nothing but what the owner shares."""

    def policy_of(word: str) -> str:
        return f'[[system]]\nprompt = "{word} is the word. Be kind."\n'

    old = config(tmp_path, policy=policy_of("Yes"))
    create = {name: create_token(tmp_path / "tokens", name) for name in ("anna", "ben")}
    callers = {name: (("authorization", f"Bearer {token}"),) for name, token in create.items()}
    old = replace(
        old,
        auth=replace(old.auth, token_file=tmp_path / "tokens"),
        model_options={"other": ModelOptions()},
        models=ModelsConfig(),
    )
    told: asyncio.Queue[SharedPrompts] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def load(own: Config) -> Model:
        model = make_model(make_runner(context_length=512, num_slots=4))
        model.engine.share_prompts(encode_shared_prompts(own, model.tokenizer))
        share = model.engine.share_prompts

        def tell(shared: SharedPrompts) -> None:
            share(shared)
            loop.call_soon_threadsafe(told.put_nowait, shared)

        model.engine.share_prompts = tell  # type: ignore[method-assign]
        return replace(model, name=own.model.name)

    async with serving(old, load) as server, grpc.aio.insecure_channel(tcp_target(server)) as channel:

        async def num_cached(name: str, **options: str) -> int:
            _, final = await answer(channel, chat_request("?", max_tokens=1, **options), metadata=callers[name])
            return int(final.usage.cached_prompt_tokens)

        await num_cached("anna")
        assert await num_cached("ben") > 30
        (tmp_path / "policy.toml").write_text(policy_of("No"))
        server.reload()
        assert await asyncio.wait_for(told.get(), 30) == encode_shared_prompts(old, make_tokenizer())
        await num_cached("anna")
        assert await num_cached("ben") > 30
        # One that is loaded later has them from the start.
        await num_cached("anna", model="other")
        assert await num_cached("ben", model="other") > 30
        # A file that cannot be used changes nothing, and is told.
        changed = replace(old, cache=replace(old.cache, shared_prompts=(str(tmp_path / "none.txt"),)))
        server._parts.reload._load = lambda: changed
        outcome = await server._parts.reload.run()
        assert "none.txt cannot be read" in str(outcome.error)
