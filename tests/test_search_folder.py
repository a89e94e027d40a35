"""What a killed search leaves is removed by the next one, and nothing else is."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_moe.converters.search_folder import search_folder

SEARCHING = """
import sys, time
from pathlib import Path
from edge_moe.converters.search_folder import search_folder
with search_folder(Path(sys.argv[1])) as folder:
    (folder / "trial.gguf").write_bytes(bytes(1000))
    print(folder, flush=True)
    time.sleep(600)
"""


def searching(output: Path) -> tuple[subprocess.Popen[str], Path]:
    """Another process in the middle of a search, and its folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", SEARCHING, str(output)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_search_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "new" / "plan.json"
    with search_folder(output) as folder:
        assert folder.parent == output.parent and folder.name.startswith(".plan-search-")
        (folder / "trial.gguf").write_bytes(b"1")
    assert not list(output.parent.iterdir())
    with pytest.raises(KeyboardInterrupt), search_folder(output) as folder:
        raise KeyboardInterrupt
    assert not folder.exists()


def test_a_killed_search_is_cleaned_up_after_and_a_living_one_is_not(tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    process, left = searching(output)
    try:
        with search_folder(output) as mine:
            assert mine != left and (left / "trial.gguf").stat().st_size == 1000, "it still runs"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (left / "trial.gguf").exists(), "a killed process removes nothing"
    with search_folder(output) as mine:
        assert list(tmp_path.iterdir()) == [mine]


def test_only_folders_of_searches_for_the_same_plan_are_removed(tmp_path: Path) -> None:
    for name in (".plan-search-notes", ".plan-search-12345678", ".other-search-abcdefgh"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("keep")
    (tmp_path / ".other-search-abcdefgh" / "lock").touch()
    (tmp_path / ".plan-search-notes" / "lock").touch()
    (tmp_path / ".plan-search-linked__").symlink_to(tmp_path / ".other-search-abcdefgh")
    (tmp_path / ".plan-search-abcdefgh").mkdir()
    (tmp_path / ".plan-search-abcdefgh" / "lock").touch()
    with search_folder(tmp_path / "plan.json"):
        pass
    found = {path.parent.name for path in tmp_path.glob("*/mine.txt")}
    assert found >= {".plan-search-notes", ".plan-search-12345678", ".other-search-abcdefgh"}
    assert not (tmp_path / ".plan-search-abcdefgh").exists()
