"""System prompts that the owner shares: as the model gets them, whoever asks; and from configuration to cache."""

import asyncio
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

import tiny_tokenizers as tiny
from hearthd.access.tokens import create_token
from hearthd.configuration.config import Config, ModelOptions, ModelsConfig
from hearthd.errors import ConfigError
from hearthd.inference.model import Model
from hearthd.inference.shared_prompts import encode_shared_prompts, read_shared_prompts
from hearthd.kv.budget import KVBudget
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


def begins_with_one(shared: list[list[int]], *messages: Message) -> int:
    prompt = make_tokenizer().encode_chat(messages)
    return max((len(each) for each in shared if prompt[: len(each)] == each), default=0)


def test_every_chat_with_this_system_prompt_begins_with_it(tmp_path: Path) -> None:
    shared = encode_shared_prompts(config(tmp_path, TEXT, "Other."), make_tokenizer())
    assert len(shared) == 2
    for question in ("Hello", "A", "0", " space"):
        assert begins_with_one(shared, Message("system", TEXT.strip()), Message("user", question)) > 100
    assert begins_with_one(shared, Message("system", "Third."), Message("user", "Hello")) == 0


def test_the_policys_instructions_come_first_and_are_shared_themselves(tmp_path: Path) -> None:
    policy = '[[system]]\nprompt = "Be polite."\n\n[[system]]\nprompt = "Only for guests."\nroles = ["guest"]\n'
    made = config(tmp_path, TEXT, policy=policy)
    object.__setattr__(made, "roles", {**made.roles, "guest": made.roles["user"]})
    shared = encode_shared_prompts(made, make_tokenizer())
    assert len(shared) == 4
    rules = PolicyFile(made.policy.file, made.roles).current
    for role in ("guest", "user"):
        for messages in ([Message("user", "Hi")], [Message("system", TEXT.strip()), Message("user", "Hi")]):
            assert begins_with_one(shared, *rules.for_role(role).add_prompt(messages)) > 10


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
    shared: asyncio.Queue[list[list[int]]] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def load(own: Config) -> Model:
        model = make_model(make_runner(context_length=512, num_slots=4))
        model.engine.share_prompts(encode_shared_prompts(own, model.tokenizer))
        share = model.engine.share_prompts

        def tell(prompts: Iterable[SequenceOf[int]]) -> None:
            share(prompts)
            loop.call_soon_threadsafe(shared.put_nowait, [list(prompt) for prompt in prompts])

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
        prompts = await asyncio.wait_for(shared.get(), 30)
        assert prompts == encode_shared_prompts(old, make_tokenizer())
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
