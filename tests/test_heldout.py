"""Text that chose a plan is not text that judges it."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TinyCheckpoint
from hand_plan import hand_plan, uniform_forms

from edge_moe.checkpoint import Checkpoint
from edge_moe.plan import SearchRecord
from edge_moe.runtime.heldout import (
    REPORT_PART,
    SEARCH_PART,
    WINDOW_TOKENS,
    heldout_windows,
    part_of_heldout,
    search_windows,
    text_to_score,
)
from edge_moe.runtime.tokenizer import load_tokenizer


@pytest.fixture
def tokenizer(demo_model: Path) -> object:
    return load_tokenizer(demo_model)


@pytest.fixture
def package(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    """A folder with a plan that was searched on code."""
    checkpoint = Checkpoint(tiny_checkpoint("qwen3_moe"))
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 4))
    record = SearchRecord(chosen="a", is_complete=True, seconds=1, trials=[], tasks=["code"])
    plan.model_copy(update={"search": record}).save(tmp_path / "plan.json")
    return tmp_path


def test_the_parts_share_no_window(tokenizer: object) -> None:
    search = part_of_heldout(["code"], tokenizer, SEARCH_PART, None)
    report = part_of_heldout(["code"], tokenizer, REPORT_PART, None)
    assert sorted([*search, *report]) == sorted(
        heldout_windows("code", tokenizer, WINDOW_TOKENS, None)
    )
    assert not {tuple(window) for window in search} & {tuple(window) for window in report}


@pytest.mark.parametrize("window_tokens", [100, 256, 512])
def test_a_searched_task_is_scored_on_the_other_half(
    package: Path, tokenizer: object, window_tokens: int
) -> None:
    text = text_to_score(package, "code", tokenizer, window_tokens, None)
    report = part_of_heldout(["code"], tokenizer, REPORT_PART, None)
    search = part_of_heldout(["code"], tokenizer, SEARCH_PART, None)
    assert text.num_search_windows == len(search)
    assert text.window_tokens == min(window_tokens, WINDOW_TOKENS)
    assert max(map(len, text.windows)) == text.window_tokens
    pieces = [token for window in text.windows for token in window]
    whole = [token for window in report for token in window]
    assert len(whole) - len(report) <= len(pieces) <= len(whole)  # single tokens predict nothing


def test_other_tasks_and_other_models_are_scored_on_all(package: Path, tokenizer: object) -> None:
    for model, task in ((package, "prose"), (package / "elsewhere", "code")):
        text = text_to_score(model, task, tokenizer, 256, 5)
        assert text.windows == heldout_windows(task, tokenizer, 256, 5)
        assert text.num_search_windows == 0


def test_at_most_so_many_windows(package: Path, tokenizer: object) -> None:
    assert len(text_to_score(package, "code", tokenizer, 256, 3).windows) == 3


@pytest.mark.parametrize(
    ("active_parameters", "num_windows"),
    [(1_000_000, 35), (200_000_000_000, 16), (40_000_000, 24)],
    ids=["all there are", "no fewer than 16", "as many as 5e11 operations pay for"],
)
def test_a_search_takes_more_text_of_a_smaller_model(
    tokenizer: object, active_parameters: int, num_windows: int
) -> None:
    half = part_of_heldout(["code"], tokenizer, SEARCH_PART, None)
    found = search_windows(["code"], tokenizer, active_parameters)
    assert len(found) == num_windows
    assert all(window in half for window in found)


def test_a_search_takes_no_more_than_48_windows(tokenizer: object, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("\n\n".join(f"the {n} of {n * n} is {n + 1}" for n in range(12_000)))
    assert len(part_of_heldout([str(path)], tokenizer, SEARCH_PART, None)) > 48
    assert len(search_windows([str(path)], tokenizer, 1)) == 48
