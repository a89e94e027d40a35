"""The text that recovery learns from, and the text that only judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_moe.errors import InputError
from edge_moe.tasks import Tokenizer, load_task_texts, token_windows, windows_fingerprint

_HELDOUT_EVERY = 8  # one document in so many judges


@dataclass(frozen=True)
class TrainText:
    """Windows and which of them are learned from; the others judge."""

    windows: Sequence[Sequence[int]]
    is_training: Sequence[bool]

    @property
    def identity(self) -> str:
        """Differs where another text is learned from, or judges."""
        return windows_fingerprint(self.windows) + "\n" + "".join("01"[x] for x in self.is_training)

    def indices(self, training: bool) -> list[int]:
        return [i for i, is_training in enumerate(self.is_training) if is_training == training]


def split_text(
    tasks: Sequence[str],
    tokenizer: Tokenizer,
    context_tokens: int,
    window_tokens: int,
    max_windows: int | None,
    window_option: str = "--window-tokens",
) -> TrainText:
    """Windows of every task's calibration text; an eighth of each judges.

    `context_tokens` is what the model can read. `max_windows` is shared out among the tasks; each
    gets two at least. `window_option` is what the command at hand calls `window_tokens`.

    Raises:
        InputError: no task, text that is too short, or windows that the model cannot read.
    """
    if window_tokens > context_tokens:
        raise InputError(
            f"windows of {window_tokens} tokens exceed the model's context of {context_tokens}: "
            f"use a smaller {window_option}"
        )
    if not tasks:
        raise InputError("no task is given: name at least one with --task")
    share = None if max_windows is None else -(-max_windows // len(tasks))
    windows: list[list[int]] = []
    is_training: list[bool] = []
    for task in tasks:
        learned, judged = _split_task(task, tokenizer, window_tokens)
        if share is not None:
            num_judged = max(1, share // _HELDOUT_EVERY)
            learned, judged = learned[: max(1, share - num_judged)], judged[:num_judged]
        found = [(window, True) for window in learned]
        found += [(window, False) for window in judged]
        windows += [window for window, _ in found]
        is_training += [flag for _, flag in found]
    if all(is_training) or not any(is_training):
        raise InputError(
            f"the task text gives {len(windows)} window of {window_tokens} tokens, but one must "
            f"be learned from and another judge: use a smaller {window_option} or more text"
        )
    return TrainText(windows, is_training)


def _split_task(
    task: str, tokenizer: Tokenizer, window_tokens: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Windows to learn from, and windows that judge: an eighth of the documents.

    Windows of one document know too much of each other. A text of one document gives its end.
    """
    texts = load_task_texts(task, "calibration", tokenizer)
    if len(texts) == 1:
        windows = _whole_windows(texts, tokenizer, window_tokens)
        end = len(windows) - max(1, len(windows) // _HELDOUT_EVERY)
        return windows[:end], windows[end:]
    judge = min(_HELDOUT_EVERY // 2, len(texts) - 1)
    is_judge = [index % _HELDOUT_EVERY == judge for index in range(len(texts))]
    parts = [
        [text for text, flag in zip(texts, is_judge, strict=True) if flag == wanted]
        for wanted in (False, True)
    ]
    learned, judged = (_whole_windows(part, tokenizer, window_tokens) for part in parts)
    return learned, judged


def _whole_windows(
    texts: Sequence[str], tokenizer: Tokenizer, window_tokens: int
) -> list[list[int]]:
    """Windows; without a short rest, which would weigh as much as a whole one."""
    windows = token_windows(texts, tokenizer, window_tokens)
    if len(windows) > 1 and len(windows[-1]) < window_tokens // 4:
        windows.pop()
    return windows
