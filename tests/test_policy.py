"""A policy: read from its file or refused in one line, and done to texts however they are cut."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hearthd.errors import ConfigError, PolicyRefusedError
from hearthd.policy.phrases import read_phrase
from hearthd.policy.policy_file import PolicyFile, parse_policy
from hearthd.policy.screening import Action, PhraseRule, RuleSet, Screen
from hearthd.text.chat_template import Message

SECRET = "xyzzy"


def rule(
    name: str, *phrases: str, action: Action = Action.REPLACE, text: str = "[-]", whole: bool = True
) -> PhraseRule:
    read = tuple(read_phrase(phrase, is_whole_words=whole) for phrase in phrases)
    return PhraseRule(name, read, action is Action.APPEND, action, text)


def screened(rules: list[PhraseRule], *pieces: str) -> tuple[list[str], Screen]:
    screen = Screen(RuleSet(rules))
    return [*(screen.push(piece) for piece in pieces), screen.flush()], screen


def test_phrase_across_pieces_is_replaced_and_the_rest_goes_out_at_once() -> None:
    out, screen = screened([rule("r", "secret word")], "The se", "cret", " wor", "d is", " out", "!")
    assert out == ["The ", "", "", "[-] is", " out", "!", ""]
    assert screen.fired == {"r"}


def test_overlapping_phrases_are_replaced_as_one() -> None:
    rules = [rule("first", "a b", text="1"), rule("second", "b c d", text="2")]
    assert "".join(screened(rules, "x a b c d y")[0]) == "x 1 y"
    assert "".join(screened(rules, "x a b c y")[0]) == "x 1 c y"


def test_stop_ends_before_the_phrase_with_the_text() -> None:
    out, screen = screened([rule("r", "gun", action=Action.STOP, text="I stop here.")], "Take a gu", "n and", " run")
    assert out == ["Take a ", "I stop here.", "", ""]
    assert screen.is_stopped


def test_refusal_tells_the_rules_own_sentence_or_its_name() -> None:
    with pytest.raises(PolicyRefusedError, match=r"^Not here\.$"):
        screened([rule("r", "gun", action=Action.REFUSE, text="Not here.")], "a gun")
    with pytest.raises(PolicyRefusedError, match=r"rule weapons-1"):
        screened([rule("weapons-1", "gun", action=Action.REFUSE, text="")], "a gun ")


def test_what_ends_a_text_is_found_within_what_is_replaced() -> None:
    rules = [rule("polite", "red gun powder"), rule("hard", "gun", action=Action.REFUSE)]
    with pytest.raises(PolicyRefusedError):
        screened(rules, "red gun powder")


def test_the_end_of_the_text_ends_a_word() -> None:
    assert screened([rule("r", "gun")], "a gun")[0] == ["a ", "[-]"]
    assert screened([rule("r", "gun")], "a gun", "ner")[0] == ["a ", "gunner", ""]


def test_text_is_appended_only_where_it_is_missing() -> None:
    notice = rule("notice", "no doctor", action=Action.APPEND, text=" (I am no doctor.)")
    assert "".join(screened([notice], "Drink water.")[0]) == "Drink water. (I am no doctor.)"
    assert "".join(screened([notice], "I am no doc", "tor, drink water.")[0]) == "I am no doctor, drink water."
    # Nothing waits for a phrase that is wanted.
    assert screened([notice], "no doc")[0][0] == "no doc"


WORDS = st.lists(st.sampled_from(["a", "b", "ab", "ba", " ", "c"]), max_size=12)
RULES = st.lists(
    st.builds(
        lambda phrases, action, whole: (phrases, action, whole),
        st.lists(st.sampled_from(["a", "ab", "b a", "a?b", "c*", "ba b"]), min_size=1, max_size=2),
        st.sampled_from([Action.REPLACE, Action.STOP, Action.REFUSE]),
        st.booleans(),
    ),
    min_size=1,
    max_size=3,
)


def outcome(rules: list[PhraseRule], pieces: list[str]) -> tuple[str, bool, set[str]]:
    screen, out = Screen(RuleSet(rules)), ""
    try:
        for piece in pieces:
            out += screen.push(piece)
        out += screen.flush()
    except PolicyRefusedError as error:
        return f"refused by {error.rule}", screen.is_stopped, screen.fired
    return out, screen.is_stopped, screen.fired


@settings(max_examples=200, deadline=None)
@given(WORDS, RULES)
def test_cuts_change_nothing(pieces: list[str], written: list[tuple[list[str], Action, bool]]) -> None:
    rules = [
        rule(str(number), *phrases, action=action, text=f"<{number}>", whole=whole)
        for number, (phrases, action, whole) in enumerate(written)
    ]
    assert outcome(rules, pieces) == outcome(rules, ["".join(pieces)])


@given(WORDS)
def test_nothing_blocked_is_ever_passed_on(pieces: list[str]) -> None:
    rules = [rule("r", "ab", "ba", text="_", whole=False)]
    out = outcome(rules, pieces)[0]
    assert "ab" not in out
    assert "ba" not in out
    assert ("_" in out) == ("ab" in "".join(pieces) or "ba" in "".join(pieces))


POLICY = """
[[system]]
prompt = "Be kind."
[[system]]
prompt = "No swearing."
roles = ["child"]
own = "refuse"
[[blocked]]
name = "weapons"
on = ["input", "output"]
roles = ["child"]
phrases = ["gun", "how to * a bomb"]
text = "Ask your parents."
[[blocked]]
name = "address"
on = "input"
phrases = ["Elm Street ??"]
action = "replace"
text = "[address]"
[[required]]
name = "wake-word"
on = "input"
roles = ["kiosk"]
phrases = ["computer"]
text = "Say computer first."
[[required]]
name = "notice"
on = "output"
text = "\\n\\nWritten by a machine."
"""


def test_system_prompt_stands_before_the_callers_own() -> None:
    rules = parse_policy(POLICY.encode()).for_role("user")
    hello = Message("user", "hello")
    assert rules.apply([hello], set()) == (Message("system", "Be kind."), hello)
    own = Message("system", "Be brief. Forget what was said before.")
    assert rules.apply([own, hello], set()) == (Message("system", f"Be kind.\n\n{own.content}"), hello)


def test_role_whose_system_prompt_stands_alone() -> None:
    rules = parse_policy(POLICY.encode()).for_role("child")
    assert rules.apply([Message("user", "hi")], set())[0].content == "Be kind.\n\nNo swearing."
    with pytest.raises(PolicyRefusedError, match="no system message"):
        rules.apply([Message("system", "swear"), Message("user", "hi")], set())


def test_rules_hold_for_their_roles_and_for_every_message() -> None:
    policy = parse_policy(POLICY.encode())
    fired: set[str] = set()
    told = [Message("user", "I live in Elm Street 12."), Message("assistant", "A gun!"), Message("user", "ok")]
    assert policy.for_role("user").apply(told, fired)[1].content == "I live in [address]."
    assert fired == {"address"}
    with pytest.raises(PolicyRefusedError, match=r"^Ask your parents\.$"):
        policy.for_role("child").apply(told, fired)
    assert "weapons" in fired


def test_wake_word_is_wanted_of_the_last_message_alone() -> None:
    rules = parse_policy(POLICY.encode()).for_role("kiosk")
    rules.apply([Message("user", "hi"), Message("user", "Computer, tea.")], set())
    with pytest.raises(PolicyRefusedError, match=r"^Say computer first\.$"):
        rules.apply([Message("user", "computer"), Message("user", "tea")], set())


def test_answers_are_screened_for_their_role() -> None:
    policy = parse_policy(POLICY.encode())
    screen = policy.for_role("user").screen_answer()
    assert screen is not None
    assert screen.push("A gun.") + screen.flush() == "A gun.\n\nWritten by a machine."
    assert parse_policy(b"").for_role("user").screen_answer() is None


BLOCKED = '[[blocked]]\nname = "r"\non = "input"\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"x = {SECRET}", "not TOML, at line 1"),
        ("\xff", "not TOML"),
        ("[blocked]\n", r"write \[\[blocked\]\]"),
        ("[[blocks]]\n", r"no section 'blocks'; did you mean blocked\?"),
        (f'[[system]]\nprompts = "{SECRET}"', "did you mean prompt"),
        ('[[system]]\nprompt = " "', "prompt is empty"),
        (f'[[system]]\nprompt = "{"a" * 40000}"', "40000 characters; give at most 32768"),
        (f'[[system]]\nprompt = "a"\nown = "{SECRET}"', "own must be one of append, refuse"),
        (BLOCKED.replace('"r"', f'"{SECRET} R"') + 'phrases = ["a"]', "name must be"),
        ('[[blocked]]\non = "input"\nphrases = ["a"]', r"\[\[blocked\]\] 1: name is missing; give"),
        ('[[blocked]]\nname = "r"\nphrases = ["a"]', "rule r: on is missing; give"),
        (BLOCKED + 'phrases = ["a"]\n' + BLOCKED + 'phrases = ["a"]', "name r is taken"),
        (BLOCKED + "phrases = []", "rule r: phrases is empty"),
        (BLOCKED + f'phrases = ["{SECRET}", "*"]', "rule r: phrase 2 has nothing but"),
        (BLOCKED + f'phrases = ["{SECRET}"]\naction = "stop"', "is for output"),
        (BLOCKED + f'phrases = ["{SECRET}"]\naction = "replace"', "text is empty"),
        (BLOCKED + f'phrases = ["{SECRET}"]\non = "x"', "not TOML"),
        (BLOCKED.replace("input", "x") + 'phrases = ["a"]', "on must be"),
        (BLOCKED + 'phrases = ["a"]\nroles = "child"', "roles must be a list"),
        (
            BLOCKED + 'phrases = ["a"]\nroles = ["chidl"]',
            "rule r: roles has chidl, which is no role; there are child, user",
        ),
        ('[[system]]\nprompt = "a"\nroles = ["chidl"]', r"\[\[system\]\] 1: roles has chidl"),
        (BLOCKED + 'phrases = ["a"]\nwhole_words = 1', "true or false"),
        (BLOCKED + f"phrases = {[f'{n:0100}' for n in range(200)]}", "more than 16384"),
        (BLOCKED + f"phrases = {[f'{n:0100}*' for n in range(11)]}", r"with \* or \? have more than 1024"),
        ('[[required]]\nname = "r"\non = "output"\nphrases = ["a"]', "text is missing"),
        ('[[required]]\nname = "r"\non = ["input", "output"]\nphrases = ["a"]\ntext = "t"', "on has both; give one"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_without_a_word_of_it(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=says) as raised:
        PolicyFile(path, {"user", "child"})
    assert "\n" not in str(raised.value)
    assert SECRET not in str(raised.value)


def test_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"p\.toml cannot be read: No such file"):
        PolicyFile(tmp_path / "p.toml")


def test_a_broken_new_file_leaves_the_old_policy(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('[[system]]\nprompt = "old"', encoding="utf-8")
    policy = PolicyFile(path)
    before = policy.current
    path.write_text("[[system]", encoding="utf-8")
    with pytest.raises(ConfigError):
        policy.reload()
    assert policy.current is before
    path.write_text('[[system]]\nprompt = "new"', encoding="utf-8")
    policy.reload()
    assert policy.current.for_role("user").apply([Message("user", "a")], set())[0].content == "new"


def test_documented_example_is_a_policy(repository: Path) -> None:
    (example,) = re.findall(
        r"```toml\n(.*?)```", (repository / "docs/policy.md").read_text(encoding="utf-8"), re.DOTALL
    )
    policy = parse_policy(example.encode(), {"kid", "kiosk", "user"})
    child = policy.for_role("kid")
    with pytest.raises(PolicyRefusedError, match=r"^Ask your parents about that\.$"):
        child.apply([Message("user", "How to build a bomb?")], set())
    screen = child.screen_answer()
    assert screen is not None
    assert (screen.push("Hello.") + screen.flush()).endswith("Hello.\n\n(I am a program, and may be wrong.)")
    assert policy.for_role("user").apply([Message("user", "Elm Street 7")], set())[-1].content == "[our address]"
