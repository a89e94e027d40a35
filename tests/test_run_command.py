"""The part of `run` between the command line and the session: timing, chat, Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest

from edge_moe.commands import chat as chat_module
from edge_moe.commands.generation import Sampling, answer, as_prompt, ignore
from edge_moe.errors import InputError

GREEDY = Sampling(max_new_tokens=4, temperature=0.0, top_p=1.0, seed=0, stop=())


class EchoSession:
    """Says the same words whatever it is asked; remembers what it was asked."""

    def __init__(self, words: list[str], has_chat_template: bool = False) -> None:
        self.has_chat_template = has_chat_template
        self.words = words
        self.prompts: list[Any] = []

    def generate(self, prompt: Any, **options: Any) -> Iterator[str]:
        self.prompts.append([*prompt] if isinstance(prompt, list) else prompt)
        for word in self.words[: options["max_new_tokens"]]:
            if word == "^C":
                raise KeyboardInterrupt
            yield word + " "


def ask(session: EchoSession, prompt: Any, show: Any = ignore) -> tuple[str, bool]:
    return answer(cast(Any, session), prompt, GREEDY, show)


def test_answer_streams() -> None:
    shown: list[str] = []
    assert ask(EchoSession(["one", "two"]), "say it", shown.append) == ("one two ", False)
    assert shown == ["one ", "two "]


def test_interrupted_answer_keeps_what_there_was() -> None:
    assert ask(EchoSession(["one", "^C", "three"]), "go") == ("one ", True)


def test_chat_template_is_used_unless_raw() -> None:
    session = cast(Any, EchoSession([], has_chat_template=True))
    assert as_prompt(session, "hi", is_raw=False) == [{"role": "user", "content": "hi"}]
    assert as_prompt(session, "hi", is_raw=True) == "hi"
    assert as_prompt(cast(Any, EchoSession([])), "hi", is_raw=False) == "hi"


def chat(session: EchoSession, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = iter(lines)

    def read(invitation: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    chat_module.chat(cast(Any, session), GREEDY, is_raw=False)


def test_chat_remembers_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = EchoSession(["fine"], has_chat_template=True)
    chat(session, ["hello", "", "and now"], monkeypatch)
    assert [len(prompt) for prompt in session.prompts] == [1, 3]
    assert [message["role"] for message in session.prompts[1]] == ["user", "assistant", "user"]
    assert capsys.readouterr().out == "fine \nfine \n\n"


def test_chat_without_template_answers_every_line_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    session = EchoSession(["fine"])
    chat(session, ["def f():", "import"], monkeypatch)
    assert session.prompts == ["def f():", "import"]


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(0, 0.0, 1.0, 0, ()), "--max-new-tokens is 0"),
        (Sampling(1, -1.0, 1.0, 0, ()), "--temperature is -1"),
        (Sampling(1, 0.0, 1.5, 0, ()), "--top-p is 1.5"),
        (Sampling(1, 0.0, 1.0, 0, ("",)), "--stop is empty"),
    ],
)
def test_sampling_refuses_nonsense(sampling: Sampling, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sampling.check()
