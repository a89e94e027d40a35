"""A killed GGUF build goes on behind its last tensor on the disk, and ends in the same bytes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyCheckpoint
from gguf_files import write_moe
from hand_plan import hand_plan, tree, uniform_forms

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters import growing_file
from edge_moe.converters.build import build
from edge_moe.converters.growing_file import GrowingFile
from edge_moe.errors import CheckpointError, DiskSpaceError
from edge_moe.formats import DROP
from edge_moe.gguf_model import GgufModel
from edge_moe.offer import stored_forms
from edge_moe.plan import Plan

HEADER = b"head"
PARTS = [b"aa", b"bbb", b"c"]
WHOLE = HEADER + b"".join(PARTS)


@pytest.fixture(autouse=True)
def every_part_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing_file, "_FLUSH_BYTES", 1)


def write(output: Path, header: bytes = HEADER, error: BaseException | None = None) -> list[int]:
    """Write all parts, or two and then fail; which ones were written."""
    written = []
    with growing_file.growing_file(output, header, len(WHOLE)) as file:
        at = len(HEADER)
        for index, part in enumerate(PARTS):
            if index >= file.num_done:
                if index == 2 and error is not None:
                    raise error
                written.append(index)
                os.pwrite(file.fd, part, at)
                file.finished(index + 1, at + len(part))
            at += len(part)
    return written


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_goes_on_behind_the_last_part(tmp_path: Path, error: BaseException) -> None:
    output = tmp_path / "out.gguf"
    with pytest.raises(type(error)):
        write(output, error=error)
    assert not output.exists() and growing_file.unfinished_bytes(tmp_path) == len(WHOLE) - 1
    assert write(output) == [2]
    assert tree(tmp_path) == {"out.gguf": WHOLE}


@pytest.mark.parametrize("damage", ["header", "truncated", "progress", "other file"])
def test_starts_anew_where_nothing_can_be_trusted(tmp_path: Path, damage: str) -> None:
    output, header = tmp_path / "out.gguf", HEADER
    with pytest.raises(KeyboardInterrupt):
        write(output, error=KeyboardInterrupt())
    partial, progress = tmp_path / ".out.gguf.partial", tmp_path / ".out.gguf.progress"
    if damage == "header":
        header = b"HEAD"
    elif damage == "truncated":
        partial.write_bytes(partial.read_bytes()[:-1])
    elif damage == "progress":
        progress.write_text('{"header": 3}')
    else:
        partial.write_bytes(b"x" * len(WHOLE))
    assert write(output, header) == [0, 1, 2]
    assert tree(tmp_path) == {"out.gguf": header + WHOLE[4:]}


def test_a_bad_source_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        write(tmp_path / "out.gguf", error=CheckpointError("damaged"))
    assert not tree(tmp_path)


def test_too_small_a_disk_is_refused_first(tmp_path: Path) -> None:
    with (
        pytest.raises(DiskSpaceError, match="GGUF file out.gguf needs"),
        growing_file.growing_file(tmp_path / "out.gguf", HEADER, 2**60),
    ):
        raise AssertionError
    assert not tree(tmp_path)


def _converted(folder: Path, tiny_checkpoint: TinyCheckpoint) -> tuple[Plan, Path]:
    checkpoint = Checkpoint(tiny_checkpoint("qwen2_moe"))
    return hand_plan(checkpoint, uniform_forms(checkpoint, 4, "q8_0"), "gguf"), checkpoint.folder


def _sliced(folder: Path, tiny_checkpoint: TinyCheckpoint) -> tuple[Plan, Path]:
    path = folder / "model.gguf"
    write_moe(path)
    model = GgufModel(path)
    forms = [
        [form] * model.spec.top_k + [DROP] * (model.spec.num_experts - model.spec.top_k)
        for form in stored_forms(model)
    ]
    return hand_plan(model, forms, "gguf"), path


@pytest.mark.parametrize("source", [_converted, _sliced])
def test_a_killed_build_resumes_to_the_same_bytes(
    source: Callable[[Path, TinyCheckpoint], tuple[Plan, Path]],
    tiny_checkpoint: TinyCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("gguf")
    plan, model = source(tmp_path, tiny_checkpoint)
    expected = tree(build(plan, tmp_path / "a" / "out", model=model))
    real, calls = GrowingFile.finished, [0]

    def counted(file: GrowingFile, *arguments: Any) -> None:
        calls[0] += 1
        real(file, *arguments)

    def killed(file: GrowingFile, *arguments: Any) -> None:
        counted(file, *arguments)
        if calls[0] == 10:
            raise KeyboardInterrupt

    output = tmp_path / "b" / "out"
    monkeypatch.setattr(GrowingFile, "finished", killed)
    with pytest.raises(KeyboardInterrupt):
        build(plan, output, model=model)
    assert not output.exists()
    monkeypatch.setattr(GrowingFile, "finished", counted)
    assert tree(build(plan, output, model=model)) == expected
    assert calls[0] == len(GgufModel(output / "model.gguf").header.tensors)
    assert [path.name for path in output.parent.iterdir()] == ["out"]
