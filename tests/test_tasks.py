"""Task text becomes token windows; every bad line is named with its file and number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_moe.demo import task_names
from edge_moe.errors import InputError
from edge_moe.tasks import (
    is_plain_text,
    load_task_texts,
    split_documents,
    task_label,
    task_windows,
    token_windows,
    tokenizer_fingerprint,
    windows_fingerprint,
)


class LetterTokenizer:
    """One token per character; id 0 ends a document."""

    eos_token_id = 0

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) for letter in text]

    def apply_chat_template(self, conversation: Any, *, tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"<{message['role']}>{message['content']}" for message in conversation)


def write(path: Path, *rows: object) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_windows_join_documents_by_the_end_token_and_keep_a_short_tail() -> None:
    windows = token_windows(["ab", "cde"], LetterTokenizer(), 4)
    assert windows == [[97, 98, 0, 99], [100, 101]]
    assert token_windows(["ab", "cd"], LetterTokenizer(), 4) == [[97, 98, 0, 99]]  # tail of one


@given(st.lists(st.text("abc", min_size=1), min_size=1), st.integers(2, 7))
def test_windows_lose_at_most_one_token(texts: list[str], window_tokens: int) -> None:
    total = sum(map(len, texts)) + len(texts) - 1
    if total < 2:
        with pytest.raises(InputError, match="at least 2"):
            token_windows(texts, LetterTokenizer(), window_tokens)
        return
    windows = token_windows(texts, LetterTokenizer(), window_tokens)
    assert all(len(window) == window_tokens for window in windows[:-1])
    assert 0 <= total - sum(map(len, windows)) <= 1


def test_all_three_spellings_of_a_document(tmp_path: Path) -> None:
    task = write(
        tmp_path / "mine.jsonl",
        {"text": "plain"},
        "",
        {"prompt": "1+1=", "completion": "2"},
        {"messages": [{"role": "user", "content": "hi"}]},
    )
    tokenizer = LetterTokenizer("template")
    assert load_task_texts(task, "calibration", tokenizer) == ["plain", "1+1=2"]
    assert load_task_texts(task, "heldout", tokenizer) == ["<user>hi"]


def test_every_fifth_document_is_held_out(tmp_path: Path) -> None:
    task = write(tmp_path / "mine.jsonl", *({"text": f"document {i}"} for i in range(11)))
    assert load_task_texts(task, "heldout") == ["document 4", "document 9"]
    calibration = load_task_texts(task, "calibration")
    assert calibration == [f"document {i}" for i in range(11) if i not in (4, 9)]


@pytest.mark.parametrize(
    ("text", "heldout"),
    [
        ("aaaa aaaa\n\nbbbb\nb bb\n\ncccc", "cccc"),  # a paragraph is about a fifth
        ("aa aa aa\nbb bb bb\ncc\ndd d", "dd d"),  # no paragraphs
        ("a b c d e f g h i j", "i j"),  # one line
        ("a b c d e f g h\n\ni j", "i j"),
        ("a\n\nb c d e f g h i j k l m n o", "l m n o"),  # the paragraphs' border is far off
    ],
)
def test_the_last_fifth_of_a_text_is_held_out(tmp_path: Path, text: str, heldout: str) -> None:
    task = write(tmp_path / "mine.txt", text)
    assert load_task_texts(task, "heldout") == [heldout]
    (calibration,) = load_task_texts(task, "calibration")
    assert calibration == text.removesuffix(heldout).rstrip()


def test_every_one_of_few_documents_holds_a_part_out(tmp_path: Path) -> None:
    task = write(tmp_path / "two.jsonl", {"text": "a b c d e"}, {"text": "v w x y z"})
    assert load_task_texts(task, "calibration") == ["a b c d", "v w x y"]
    assert load_task_texts(task, "heldout") == ["e", "z"]


@given(st.lists(st.text("ab \n", min_size=1).filter(str.strip), min_size=1, max_size=12))
def test_splits_lose_nothing_and_share_nothing(documents: list[str]) -> None:
    calibration, heldout = split_documents(documents)
    words = sorted(word for text in documents for word in text.split())
    assert sorted(word for text in [*calibration, *heldout] for word in text.split()) == words
    assert all(heldout)
    if len(documents) > 1:
        assert calibration and heldout


def test_a_file_that_cannot_be_split_is_refused(tmp_path: Path) -> None:
    task = write(tmp_path / "word.txt", "word")
    for split in ("calibration", "heldout"):
        with pytest.raises(InputError, match=r"word\.txt is too short to hold out a fifth"):
            load_task_texts(task, split)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], "line 1 is not JSON"),
        (["[1]"], "line 1 is not a JSON object"),
        ([{"text": "a"}, {"body": "b"}], r"line 2 has no string under 'text' \(keys: body\)"),
        ([{"text": 3}], "line 1 has no string under 'text'"),
        ([{"prompt": "a"}], "line 1 has no string under 'completion'"),
        ([{"messages": "hi"}], "line 1: 'messages' is not a list"),
        ([{"messages": [{"role": "user"}]}], "line 1: a chat message needs 'role' and 'content'"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "no chat template"),
        ([{"text": " "}, {"text": ""}], "holds no text"),
        ([], "holds no text"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, rows: list[object], message: str) -> None:
    task = write(tmp_path / "bad.jsonl", *rows)
    with pytest.raises(InputError, match=message) as caught:
        load_task_texts(task, "calibration", LetterTokenizer())
    assert "bad.jsonl" in str(caught.value)


def test_unknown_tasks_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'nonsense' is neither a shipped task"):
        load_task_texts("nonsense", "calibration")
    with pytest.raises(InputError, match=r"must end in \.jsonl or \.txt"):
        load_task_texts(write(tmp_path / "a.csv", "x"), "calibration")
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        load_task_texts(str(latin), "calibration")


def test_tasks_take_turns_under_a_limit(tmp_path: Path) -> None:
    tasks = [write(tmp_path / "a.txt", "aaaaaa a"), write(tmp_path / "b.txt", "bbbb b")]
    windows = task_windows(tasks, "calibration", LetterTokenizer(), 2, max_windows=3)
    assert windows == [[97, 97], [98, 98], [97, 97]]
    assert len(task_windows(tasks, "calibration", LetterTokenizer(), 2)) == 5
    with pytest.raises(InputError, match="no task"):
        task_windows([], "calibration", LetterTokenizer(), 2)
    with pytest.raises(InputError, match="--max-windows is 0"):
        task_windows(tasks, "calibration", LetterTokenizer(), 2, max_windows=0)
    with pytest.raises(InputError, match="at least 2"):
        token_windows(["abc"], LetterTokenizer(), 1)


def test_a_file_is_named_without_its_folder(tmp_path: Path) -> None:
    assert task_label(str(tmp_path / "mine.jsonl")) == "mine.jsonl"


def test_fingerprints_see_window_borders_and_file_contents(tmp_path: Path) -> None:
    assert windows_fingerprint([[1, 2], [3, 4]]) != windows_fingerprint([[1, 2, 3, 4]])
    assert windows_fingerprint([[1, 2]]) == windows_fingerprint([(1, 2)])
    empty = tokenizer_fingerprint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert tokenizer_fingerprint(tmp_path) != empty


def test_plain_text_is_told_from_chats(tmp_path: Path) -> None:
    assert all(map(is_plain_text, task_names()))
    lines = {
        "chat.jsonl": '\n{"messages": [{"role": "user", "content": "hi"}]}\n',
        "text.jsonl": '\n{"text": "say messages"}\n',
        "pairs.jsonl": '{"prompt": "2 + 2 =", "completion": " 4"}\n',
        "broken.jsonl": "{",
        "empty.jsonl": "",
        "notes.txt": '{"messages": []}',
    }
    for name, text in lines.items():
        (tmp_path / name).write_text(text)
    plain = {name for name in lines if is_plain_text(str(tmp_path / name))}
    assert plain == {"text.jsonl", "pairs.jsonl", "notes.txt"}
    assert not is_plain_text(str(tmp_path / "gone.txt"))
