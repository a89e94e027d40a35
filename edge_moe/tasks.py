"""Task text: shipped tasks by name or the user's own files, and the token windows cut from them.

A `.jsonl` file holds one document per line, in one of three spellings:

    {"text": "..."}    {"prompt": "...", "completion": "..."}    {"messages": [{"role", "content"}]}

A `.txt` file is one document. No torch here: a tokenizer is anything that fits `Tokenizer`.

Shipped tasks come in two files, for calibration and held out. A user's file is split in the same
way every time: of five documents or more, every fifth is held out; of fewer, the last fifth of each
is, cut between paragraphs, or else lines, or else words.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from edge_moe.demo import task_dir, task_names
from edge_moe.errors import InputError
from edge_moe.files import os_problem

Split = Literal["calibration", "heldout"]

MIN_WINDOW_TOKENS = 2
"""A window of one token predicts nothing."""
HELD_OUT_EVERY = 5
"""One document of so many is held out."""
_BORDERS = (r"\n\s*\n", r"\n", r"\s+")
"""Where a document may be cut: between paragraphs, lines, words."""
_FILE_SUFFIXES = (".jsonl", ".txt")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is needed here."""

    @property
    def eos_token_id(self) -> Any: ...

    @property
    def chat_template(self) -> Any: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> Any: ...

    def apply_chat_template(self, conversation: Any, *, tokenize: bool) -> Any: ...


def load_task_texts(task: str, split: Split, tokenizer: Tokenizer | None = None) -> list[str]:
    """Documents of a task: a shipped name, or the path of a .jsonl or .txt file.

    No text of a user's file is in both splits. `tokenizer` renders chat messages with its own
    template; only they need it.

    Raises:
        InputError: unknown task, unreadable or empty file, one that is too short to be split, or a
            line that holds no document.
    """
    path = task_file(task, split)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"task file {path} cannot be read: {os_problem(error)}") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"task file {path} is not UTF-8 text ({error}): save it as UTF-8"
        ) from None
    documents = [text] if path.suffix == ".txt" else _jsonl_documents(path, text, tokenizer)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise InputError(f"task file {path} holds no text: put at least one document into it")
    if task in task_names():
        return documents
    calibration, heldout = split_documents(documents)
    if not calibration or not heldout:
        raise InputError(
            f"task file {path} is too short to hold out a fifth of it (a single document of "
            f"{sum(map(len, documents))} characters without a space): add text"
        )
    return calibration if split == "calibration" else heldout


def split_documents(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """(for calibration, held out), as the module describes; either may be empty."""
    if len(documents) >= HELD_OUT_EVERY:
        last = HELD_OUT_EVERY - 1
        kept = [text for index, text in enumerate(documents) if index % HELD_OUT_EVERY != last]
        return kept, list(documents[last::HELD_OUT_EVERY])
    parts = [_cut(document) for document in documents]
    calibration = [first for first, _ in parts if first]
    heldout = [last for _, last in parts if last]
    if not heldout:  # documents of one word each
        return calibration[:-1], calibration[-1:]
    return calibration, heldout


def _cut(document: str) -> tuple[str, str]:
    """The first four fifths and the last one, at the nearest border; ("...", "") without any.

    A finer border is taken where the coarser ones would hold out less than a tenth or more than
    three tenths.
    """
    text = document.strip()
    wanted = len(text) * (HELD_OUT_EVERY - 1) / HELD_OUT_EVERY
    best: re.Match[str] | None = None
    for border in _BORDERS:
        for match in re.finditer(border, text):
            if best is None or abs(match.end() - wanted) < abs(best.end() - wanted):
                best = match
        if best is not None and abs(best.end() - wanted) <= len(text) / 10:
            break
    return (text[: best.start()], text[best.end() :]) if best else (text, "")


def task_file(task: str, split: Split) -> Path:
    """The file that `task` names.

    Raises:
        InputError: neither a shipped task nor an existing .jsonl or .txt file.
    """
    if task in task_names():
        return task_dir(task) / f"{split}.jsonl"
    path = Path(task)
    known = ", ".join(task_names()) or "none"
    if not path.is_file():
        raise InputError(
            f"task {task!r} is neither a shipped task ({known}) nor an existing file: "
            "give one of these names, or the path of a .jsonl or .txt file"
        )
    if path.suffix not in _FILE_SUFFIXES:
        raise InputError(f"task file {path} must end in {' or '.join(_FILE_SUFFIXES)}: rename it")
    return path


def is_plain_text(task: str) -> bool:
    """Whether the first document of `task` is text, not chat messages. False without a file."""
    try:
        path = task_file(task, "calibration")
        if path.suffix == ".txt":
            return True
        with path.open(encoding="utf-8") as lines:
            row = json.loads(next((line for line in lines if line.strip()), "null"))
    except (InputError, OSError, ValueError):
        return False
    return isinstance(row, dict) and "messages" not in row


def task_label(task: str) -> str:
    """How statistics name a task: a shipped name, or a file's name without its folder."""
    return task if task in task_names() else Path(task).name


def task_argument(task: str) -> str:
    """`--task` as it means the same from every folder: a shipped name, or a file's whole path."""
    return task if task in task_names() else str(Path(task).resolve())


def token_windows(
    texts: Iterable[str], tokenizer: Tokenizer, window_tokens: int
) -> list[list[int]]:
    """Documents joined by the end-of-text token, cut into windows of `window_tokens` token ids.

    A last, shorter window is kept when it has at least two tokens. Nothing is ever padded.

    Raises:
        InputError: `window_tokens` below two, or texts of fewer than two tokens.
    """
    if window_tokens < MIN_WINDOW_TOKENS:
        raise InputError(f"--window-tokens is {window_tokens}: use at least 2")
    token_ids: list[int] = []
    for text in texts:
        if token_ids and tokenizer.eos_token_id is not None:
            token_ids.append(int(tokenizer.eos_token_id))
        token_ids.extend(tokenizer.encode(text, add_special_tokens=False))
    starts = range(0, len(token_ids), window_tokens)
    windows = [token_ids[start : start + window_tokens] for start in starts]
    windows = [window for window in windows if len(window) >= MIN_WINDOW_TOKENS]
    if not windows:
        raise InputError(f"the task text has {len(token_ids)} tokens, at least 2 are needed")
    return windows


def task_windows(
    tasks: Sequence[str],
    split: Split,
    tokenizer: Tokenizer,
    window_tokens: int,
    max_windows: int | None = None,
) -> list[list[int]]:
    """Windows of several tasks, one task after another by turns, at most `max_windows` in all.

    No window spans two tasks; a limit cuts all tasks alike until the shortest is used up.

    Raises:
        InputError: no task, or a task that gives no window.
    """
    if not tasks:
        raise InputError("no task is given: name at least one with --task")
    if max_windows is not None and max_windows < 1:
        raise InputError(f"--max-windows is {max_windows}: use at least 1")
    per_task = [
        token_windows(load_task_texts(task, split, tokenizer), tokenizer, window_tokens)
        for task in tasks
    ]
    longest = max(len(windows) for windows in per_task)
    turns = [
        windows[turn] for turn in range(longest) for windows in per_task if turn < len(windows)
    ]
    return turns[:max_windows]


def windows_fingerprint(windows: Sequence[Sequence[int]]) -> str:
    """sha256 over every window: its length and its token ids, as little-endian int64."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(np.array([len(window), *window], dtype="<i8").tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(folder: Path) -> str:
    """sha256 over the tokenizer files of a model folder, with their names."""
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            digest.update(name.encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _jsonl_documents(path: Path, text: str, tokenizer: Tokenizer | None) -> list[str]:
    lines = enumerate(text.split("\n"), start=1)
    return [
        _document(f"{path} line {number}", line, tokenizer)
        for number, line in lines
        if line.strip()
    ]


def _document(where: str, line: str, tokenizer: Tokenizer | None) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error.msg}): fix or remove the line") from None
    if not isinstance(row, dict):
        raise InputError(f"{where} is not a JSON object: write for example {{'text': '...'}}")
    if "messages" in row:
        return _render_chat(where, row["messages"], tokenizer)
    keys = ("prompt", "completion") if "prompt" in row else ("text",)
    parts = [row.get(key) for key in keys]
    for key, part in zip(keys, parts, strict=True):
        if not isinstance(part, str):
            raise InputError(
                f"{where} has no string under {key!r} (keys: {', '.join(row) or 'none'}): give "
                "each line a 'text', a 'prompt' and a 'completion', or 'messages'"
            )
    return "".join(str(part) for part in parts)


def _render_chat(where: str, messages: object, tokenizer: Tokenizer | None) -> str:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: 'messages' is not a list of chat messages")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f"{where}: a chat message needs 'role' and 'content'")
    if tokenizer is None or not tokenizer.chat_template:
        raise InputError(
            f"{where} holds chat messages, but the model's tokenizer has no chat template: "
            "write the lines as 'text' instead"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates are programs and raise whatever they like
        raise InputError(f"{where}: the chat template refuses the messages ({error})") from None
