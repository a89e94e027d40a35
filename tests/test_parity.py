"""The committed table of families and targets still holds, and is the one that README.md shows."""

from __future__ import annotations

from pathlib import Path

import parity
import pytest
from conftest import TinyCheckpoint

from edge_moe.errors import MissingExtraError
from edge_moe.families import FAMILIES

COMMITTED = parity.Parity.model_validate_json(parity.RESULTS.read_text(encoding="utf-8"))
CELLS = {(cell.family, cell.target): cell for cell in COMMITTED.cells}
REMEDY = "run python benchmarks/parity.py and commit what it writes"
OTHER_MACHINES = 10
"""Another processor adds up in another order: so many times the committed error may be found."""
FLOAT32_NOISE = 1e-4
LARGEST_HERE = 2 * parity.LARGEST_ERROR
"""Gemma 4 in llama.cpp is near what may be committed."""
ROUNDED = ("gguf", "quantised")
"""llama.cpp rounds what packed experts are given to 8 bits: where a value lies between two codes,
another processor's sum takes the other one, which weighs more than any order of adding up."""


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_committed_cells_are_still_reached(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    subject, missing = parity.Subject(tiny_checkpoint(family), tmp_path), []
    for target in parity.TARGETS:
        committed = CELLS[family, target]
        try:
            found = subject.cell(target)
        except MissingExtraError as error:
            missing.append(error.package)
            continue
        assert (found.reason, found.remark) == (committed.reason, committed.remark), REMEDY
        for kind, value in found.errors.items():
            noise = LARGEST_HERE if (target, kind) == ROUNDED else FLOAT32_NOISE
            _check_error(value, committed.errors[kind], noise)
        _check_error(found.unmodified_median_error, committed.unmodified_median_error)
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def _check_error(
    found: float | None, committed: float | None, noise: float = FLOAT32_NOISE
) -> None:
    assert (found is None) == (committed is None), REMEDY
    if found is not None and committed is not None:
        assert found <= max(min(LARGEST_HERE, OTHER_MACHINES * committed), noise)


def test_every_family_and_target_has_a_cell_with_errors_or_a_reason() -> None:
    assert list(CELLS) == [(name, target) for name in sorted(FAMILIES) for target in parity.TARGETS]
    for cell in CELLS.values():
        assert bool(cell.reason) == (None in cell.errors.values())
        for error in cell.errors.values():
            assert error is None or error <= parity.LARGEST_ERROR
    for family in FAMILIES:
        assert not CELLS[family, "native"].reason
        assert not CELLS[family, "hf"].reason


def test_the_readme_shows_the_committed_table() -> None:
    readme = parity.README.read_text(encoding="utf-8")
    assert all(readme.count(mark) == 1 for mark in parity.MARKS)
    assert parity.with_table(readme, COMMITTED) == readme, REMEDY


def test_reasons_leave_out_what_the_cell_says() -> None:
    message = "target gguf cannot hold architecture 'mixtral' yet: use --target native"
    assert parity.shortened(message, "mixtral") == "cannot hold architecture yet"
    message = "target gguf: llama.cpp has no clip: use 'b'"
    assert parity.shortened(message, "mixtral") == "llama.cpp has no clip"


@pytest.mark.parametrize(
    ("error", "text"),
    [(0.0, "0"), (2e-6, "2e-6"), (2.01e-6, "3e-6"), (9.5e-5, "1e-4"), (1e-4, "1e-4")],
)
def test_errors_are_rounded_up(error: float, text: str) -> None:
    cell = parity.Cell(family="a", target="hf", keep_all_error=error, pruned_error=0.0)
    found = COMMITTED.model_copy(update={"cells": [cell], "largest_logit": {"a": 1.0}})
    assert f"| a | {text}, 0 |" in parity.table(found)
