"""The part of `run` between the command line and the session: timing, chat, Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest

from edge_moe.commands import chat as chat_module
from edge_moe.commands.generation import Answer, Sampling, answer, as_prompt, ignore
from edge_moe.errors import InputError

GREEDY = Sampling(max_new_tokens=4, temperature=0.0, top_p=1.0, seed=0, stop=())


class WordTokenizer:
    """One token per word."""

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(range(len(text.split())))

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool) -> dict[str, Any]:
        return {"input_ids": self.encode(" ".join(message["content"] for message in messages))}


class EchoSession:
    """Says the same words whatever it is asked; remembers what it was asked."""

    def __init__(self, words: list[str], chat_template: str | None = None) -> None:
        self.tokenizer = WordTokenizer(chat_template)
        self.words = words
        self.prompts: list[Any] = []

    def generate(self, prompt: Any, **options: Any) -> Iterator[str]:
        self.prompts.append([*prompt] if isinstance(prompt, list) else prompt)
        for word in self.words[: options["max_new_tokens"]]:
            if word == "^C":
                raise KeyboardInterrupt
            yield word + " "


def ask(session: EchoSession, prompt: Any, show: Any = ignore) -> Answer:
    return answer(cast(Any, session), prompt, GREEDY, show)


def test_answer_counts_tokens_and_streams() -> None:
    shown: list[str] = []
    found = ask(EchoSession(["one", "two", "three"]), "say it now", shown.append)
    assert shown == ["one ", "two ", "three "]
    assert (found.text, found.prompt_tokens, found.generated_tokens) == ("one two three ", 3, 3)
    assert found.tokens_per_second > 0 and not found.was_interrupted


def test_interrupted_answer_keeps_what_there_was() -> None:
    found = ask(EchoSession(["one", "^C", "three"]), "go")
    assert found.was_interrupted and found.text == "one "


def test_empty_answer_has_no_speed() -> None:
    found = ask(EchoSession([]), "go")
    assert (found.generated_tokens, found.tokens_per_second, found.decode_seconds) == (0, 0.0, 0.0)


def test_chat_template_is_used_unless_raw() -> None:
    session = cast(Any, EchoSession([], chat_template="{{ messages }}"))
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
    session = EchoSession(["fine"], chat_template="{{ messages }}")
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
