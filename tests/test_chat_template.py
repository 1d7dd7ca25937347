"""Chat templates: set up as transformers does it, in a sandbox, and every refusal is the caller's to read."""

from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny_tokenizers as tiny
from hearthd.errors import MAX_PROBLEMS, BundleError, InvalidRequestError
from hearthd.text.chat_template import ChatTemplate, Message, validate_messages

HELLO = [{"role": "user", "content": "Hello"}]


def render(source: str, messages: list[dict[str, str]] | None = None, *, prompt: bool = True, **variables: Any) -> str:
    template = ChatTemplate(source, **({"bos_token": "<s>", "eos_token": "</s>"} | variables))
    return template.render(HELLO if messages is None else messages, add_generation_prompt=prompt)


class TestRendering:
    def test_chatml(self) -> None:
        messages = [{"role": "system", "content": "Be brief."}, *HELLO]
        assert render(tiny.CHATML, messages) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        )
        assert render(tiny.CHATML, prompt=False) == "<|im_start|>user\nHello<|im_end|>\n"

    def test_blocks_leave_no_lines_and_no_indent(self) -> None:
        source = "{% for m in messages %}\n    {% if m %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\nend\n"
        assert render(source) == "Hello\nend"

    def test_variables(self) -> None:
        assert render("{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}") == "<s></s>True"
        assert render("{{ tools is none }}{{ documents is none }}{{ enable_thinking is defined }}") == "TrueTrueFalse"

    def test_loop_controls(self) -> None:
        assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"

    def test_generation_block_is_read_as_its_content(self) -> None:
        source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}!{% endfor %}"
        assert render(source) == "Hello!"

    def test_json_is_not_escaped_for_html(self) -> None:
        assert render("{{ {'a': '<é&\\''} | tojson }}") == """{"a": "<é&'"}"""
        assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": 2,\n "b": 1\n}'

    def test_date_is_that_of_the_clock(self) -> None:
        source = "{{ strftime_now('%d %b %Y') }}"
        assert render(source, now=lambda: datetime(2024, 7, 26)) == "26 Jul 2024"

    @given(st.text(), st.text())
    def test_content_reaches_the_template_unchanged(self, first: str, second: str) -> None:
        messages = [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
        assert render("{% for m in messages %}{{ m.content }}\x00{% endfor %}", messages) == f"{first}\0{second}\0"

    def test_content_is_no_template(self) -> None:
        assert render("{{ messages[0].content }}", [{"role": "user", "content": "{{ 7 * 7 }}"}]) == "{{ 7 * 7 }}"


class TestRefusals:
    def test_reason_is_the_templates_own(self) -> None:
        with pytest.raises(
            InvalidRequestError, match=r"^messages: do not fit .* template: Roles must alternate$"
        ) as caught:
            render("{{ raise_exception('Roles must alternate') }}")
        assert caught.value.field == "messages"

    def test_reason_with_text_of_the_caller_is_left_out(self) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            render("{{ raise_exception('Cannot use ' + messages[0].content) }}")
        assert "Hello" not in str(caught.value)

    @pytest.mark.parametrize(
        "source",
        [
            "{{ messages[5].content }}",
            "{{ missing.attribute }}",
            "{{ 1 / 0 }}",
            "{{ messages + 1 }}",
            "{{ [1, 2] | sum('a') }}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{{ range(10**9) }}",
        ],
    )
    def test_whatever_goes_wrong_is_an_invalid_request(self, source: str) -> None:
        with pytest.raises(InvalidRequestError, match=r"^messages: do not fit the model's chat template: ") as caught:
            render(source)
        assert "Hello" not in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "source",
        [
            "{{ messages.append(1) }}",
            "{{ messages[0].update({'role': 'system'}) }}",
            "{{ ''.__class__.__mro__ }}",
            "{{ cycler.__init__.__globals__ }}",
            "{{ raise_exception.__globals__.x }}",
            "{{ '{0.__class__.__mro__}'.format('') }}",
        ],
    )
    def test_sandbox_holds(self, source: str) -> None:
        with pytest.raises(InvalidRequestError, match="SecurityError"):
            render(source)

    @pytest.mark.parametrize("source", ["{% if %}", "{{ unclosed", "{% for x in y %}", "{{ 'a' | nosuchfilter }}"])
    def test_source_that_is_no_template_is_an_error_of_the_bundle(self, source: str) -> None:
        with pytest.raises(BundleError, match=r"^chat_template.jinja is not a template"):
            render(source)


def user(content: str = "Hi") -> Message:
    return Message("user", content)


class TestValidateMessages:
    def test_conversations_pass(self) -> None:
        validate_messages([user()])
        validate_messages([Message("system", "x"), user(), Message("assistant", "y"), user(), user()])
        validate_messages([user(), Message("assistant", " ")], must_end_with_user=False)

    def test_an_answer_may_have_been_empty(self) -> None:
        validate_messages([user(), Message("assistant", ""), user()])
        validate_messages([user(), Message("assistant", "")], must_end_with_user=False)

    def test_all_that_is_wrong_is_told_a_field_at_a_time(self) -> None:
        messages = [Message("system", ""), user("\ud83d"), user(""), Message("system", "")]
        with pytest.raises(InvalidRequestError) as caught:
            validate_messages(messages)
        assert [problem.field for problem in caught.value.problems] == [
            "messages[0].content",
            "messages[1].content",
            "messages[2].content",
            "messages[3].role",
            "messages[3].content",
        ]

    def test_no_more_is_told_than_a_caller_can_receive(self) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            validate_messages([user("")] * 4096)
        assert len(caught.value.problems) == MAX_PROBLEMS

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ([], "messages: is empty; give at least 1 message"),
            ([user(), Message("system", "x"), user()], "messages[1].role: is system; give at most 1 system message"),
            ([Message("system", "x")] * 2 + [user()], "messages[1].role: is system; give at most 1 system message"),
            (
                [user(), Message("assistant", "x")],
                "messages[1].role: is assistant; the last message must be the user's",
            ),
            ([Message("system", ""), user()], "messages[0].content: is empty; give text, or leave"),
            ([user("")], "messages[0].content: is empty"),
            ([user("a\ud83d")], "messages[0].content: has a lone surrogate at character 2"),
            ([Message("tool", "x"), user()], "messages[0].role: is not one of system, user, assistant"),  # type: ignore[arg-type]
        ],
    )
    def test_others_are_refused(self, messages: list[Message], message: str) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            validate_messages(messages)
        assert str(caught.value).startswith(message)
