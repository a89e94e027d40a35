"""Recording a trace on real text: a prompt at once, then the text itself token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from edge_moe.errors import InputError
from edge_moe.runtime.generate import TokenLoop
from edge_moe.tasks import task_windows


class Traceable(Protocol):
    """The part of a session that is needed here."""

    tokenizer: Any

    def new_loop(self) -> TokenLoop:
        """A new sequence."""


def text_windows(
    session: Traceable, tasks: Sequence[str], window_tokens: int, max_windows: int
) -> list[list[int]]:
    """Held-out text as windows of token ids, at most `max_windows` of each task after another.

    Raises:
        InputError: a task without held-out text, or a limit that leaves nothing.
    """
    return [
        window
        for task in tasks
        for window in task_windows([task], "heldout", session.tokenizer, window_tokens, max_windows)
    ]


def feed(
    session: Traceable,
    windows: Sequence[Sequence[int]],
    prompt_tokens: int,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Run each window as a sequence of its own: `prompt_tokens` at once, the others one by one.

    The text goes on whatever the model would have said (teacher forcing), so that every model sees
    the same. What the routers choose is for whoever watches: `session.tracing()`.

    Raises:
        InputError: no token at all in the prompt.
    """
    if prompt_tokens < 1:
        raise InputError(f"--prompt-tokens is {prompt_tokens}: use at least 1")
    for window in windows:
        loop = session.new_loop()
        loop.prefill(window[:prompt_tokens])
        for token_id in window[prompt_tokens:]:
            loop.step([token_id])
        advance()
