"""An interactive chat on the terminal: one line in, one streamed answer out."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from edge_moe.commands.generation import Prompt, Sampling, answer, as_prompt
from edge_moe.commands.options import stderr

if TYPE_CHECKING:
    from edge_moe.commands.generation import Runnable

_HINT = "one line is one message; Ctrl-C stops an answer, Ctrl-D ends the chat"


def chat(session: Runnable, sampling: Sampling, *, is_raw: bool) -> None:
    """Answer lines from stdin until it ends. Without a chat template every line stands alone."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        stderr().print(_HINT, style="dim")
    messages: list[dict[str, str]] = []
    while (line := _read_line("> " if is_terminal else "")) is not None:
        if not line.strip():
            continue
        prompt: Prompt = as_prompt(session, line, is_raw)
        if isinstance(prompt, list):
            messages += prompt
            prompt = messages
        text, _ = answer(session, prompt, sampling, show)
        print(flush=True)
        messages.append({"role": "assistant", "content": text})
        if is_terminal:
            stderr().print(f"{session.timing.tokens_per_second:.1f} tokens/s", style="dim")


def show(piece: str) -> None:
    """Print a piece of an answer at once."""
    print(piece, end="", flush=True)


def _read_line(invitation: str) -> str | None:
    """The next line, or None at the end of the input or on Ctrl-C."""
    try:
        return input(invitation)
    except (EOFError, KeyboardInterrupt):
        print()
        return None
