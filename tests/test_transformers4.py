"""Pruned Hugging Face folders mean the same to transformers 4.57: as committed, and measured anew.

Measuring needs another Python with that version; its path is given in the environment.
"""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest
import transformers4

from edge_moe.families import FAMILIES

PYTHON = "EDGE_MOE_TRANSFORMERS4_PYTHON"
COMMITTED = transformers4.Comparison.model_validate_json(
    transformers4.RESULTS.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_both_versions_gave_the_same_logits(family: str) -> None:
    rows = [row for row in COMMITTED.rows if row.family == family]
    if "does not know" in rows[0].reason:
        return
    assert {row.written_by for row in rows} == {COMMITTED.older, COMMITTED.newer}
    assert all(row.holds for row in rows)


@pytest.mark.slow
def test_both_versions_give_the_same_logits(tmp_path: Path) -> None:
    python = os.environ.get(PYTHON)
    if not python:
        pytest.skip(f"{PYTHON} names no Python with transformers 4.57")
    with closing(transformers4.Older(Path(python), tmp_path)) as older:
        for family in ("qwen3_moe", "glm4_moe"):
            rows = transformers4.compare(family, older, tmp_path / family)
            assert [row.holds for row in rows] == [True, True]


def test_two_thirds_of_the_families_exist_there() -> None:
    assert len({row.family for row in COMMITTED.rows if row.holds}) == 12
