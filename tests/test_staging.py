"""What stays of a build that fails: by its reason, and by what it had done."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from edge_moe.converters.staging import BuildFolder, build_folder
from edge_moe.errors import CheckpointError, DiskSpaceError, InputError

FULL = OSError(errno.ENOSPC, "No space left on device")


def fail(output: Path, error: BaseException, *, file: bool = False, scratch: str = "") -> bool:
    """Whether the hidden folder is there after a build that ended with `error`."""
    with pytest.raises(Exception), build_folder(output, "one") as work:  # noqa: B017
        if file:
            (work.path / "weights").write_bytes(b"123")
            work.add("weights")
        if scratch:
            (work.scratch / scratch).parent.mkdir(exist_ok=True)
            (work.scratch / scratch).write_bytes(b"1")
        raise error
    assert not output.exists()
    return output.with_name(f".{output.name}.building").exists()


@pytest.mark.parametrize(
    "error", [FULL, DiskSpaceError("full"), MemoryError(), ValueError("a bug")]
)
def test_what_may_go_on_keeps_what_was_done(tmp_path: Path, error: Exception) -> None:
    assert fail(tmp_path / "file", error, file=True)
    assert fail(tmp_path / "scratch", error, scratch="original/1.safetensors")
    assert not fail(tmp_path / "nothing", error)


@pytest.mark.parametrize("error", [InputError("wrong"), CheckpointError("NaN")])
def test_wrong_input_leaves_nothing_but_a_training(tmp_path: Path, error: Exception) -> None:
    assert not fail(tmp_path / "file", error, file=True)
    assert not fail(tmp_path / "scratch", error, scratch="original/1.safetensors")
    assert fail(tmp_path / "state", error, scratch="training.safetensors")
    assert not fail(tmp_path / "nothing", error)


def test_half_written_scratch_is_nothing(tmp_path: Path) -> None:
    work = BuildFolder(tmp_path / "out", tmp_path, "one")
    (tmp_path / ".state.12.tmp").write_bytes(b"1")
    (work.path / "weights").write_bytes(b"1")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / ".1.12.tmp").write_bytes(b"1")
    assert not work.has_scratch()
    (tmp_path / "samples" / "1").write_bytes(b"1")
    assert work.has_scratch() and not work.has_state()
    (tmp_path / "state").write_bytes(b"1")
    assert work.has_state()


def test_scratch_is_gone_when_the_build_is_complete(tmp_path: Path) -> None:
    assert fail(tmp_path / "out", FULL, file=True, scratch="states/1")
    with build_folder(tmp_path / "out", "one") as work:
        assert work.finished("weights") and (work.scratch / "states").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["weights"]
