"""Locks between processes, and file systems that have none."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_moe.converters.search_folder import search_folder
from edge_moe.converters.staging import build_folder, locked
from edge_moe.errors import InputError
from edge_moe.file_lock import lock

MESSAGE = "cannot be locked, for its file system has no locks: going on without"


def failing(number: int) -> Callable[..., None]:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return flock


def test_a_lock_keeps_others_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path / "lock", "taken"):
        with pytest.raises(InputError, match="taken"), locked(tmp_path / "lock", "taken"):
            raise AssertionError("two hold it")
    with locked(tmp_path / "lock", "taken"):
        pass
    assert not capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_there_are_no_locks_work_goes_on_and_says_so(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with build_folder(tmp_path / "out", "fingerprint") as work:
        (work.path / "file").write_text("1")
    assert (tmp_path / "out" / "file").exists() and not (tmp_path / ".out.building").exists()
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(str(tmp_path / ".out.building" / "lock")) and MESSAGE in line


def test_other_problems_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    with pytest.raises(OSError) as caught, (tmp_path / "lock").open("w") as handle:
        lock(handle)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(tmp_path / "lock"))


def test_without_locks_no_search_is_taken_for_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    with search_folder(tmp_path / "plan.json") as living:
        with search_folder(tmp_path / "plan.json") as mine:
            assert living.is_dir() and mine != living
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err.count(MESSAGE) == 2
