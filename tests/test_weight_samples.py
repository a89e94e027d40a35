"""Fingerprints from samples: which bytes are looked at, by hand, and that small tunes count."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import TinyCheckpoint
from hypothesis import given
from hypothesis import strategies as st
from tuned_models import tuned_copy

from edge_moe import weight_samples
from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import CheckpointError
from edge_moe.weight_samples import SAMPLE_BYTES, sampled_digest


class Stored(NamedTuple):
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


MATRIX = Stored((100, 10), 10, 1000)
STACK = Stored((3, 64, 64), 1010, 3 * 4096)
TAPS = Stored((8, 1, 4), 1010 + 3 * 4096, 32)
FILE_BYTES = 10 + 1000 + 3 * 4096 + 32


def differs(path: Path, place: int) -> bool:
    """Whether another byte at `place` makes another digest."""
    before = path.read_bytes()
    digest = sampled_digest(path, 10, [MATRIX, STACK, TAPS])
    path.write_bytes(before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :])
    found = sampled_digest(path, 10, [TAPS, MATRIX, STACK])
    path.write_bytes(before)
    return found != digest


def test_the_header_and_the_middle_of_every_matrix_count(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(FILE_BYTES))
    assert differs(path, 0) and differs(path, 9)
    middle = 10 + 500 - SAMPLE_BYTES // 2
    assert differs(path, middle) and differs(path, middle + SAMPLE_BYTES - 1)
    assert not differs(path, middle - 1) and not differs(path, middle + SAMPLE_BYTES)
    for expert_id in range(3):
        assert differs(path, 1010 + 4096 * expert_id + 2048)
        assert not differs(path, 1010 + 4096 * expert_id)
    assert differs(path, 1010 + 3 * 4096) and differs(path, FILE_BYTES - 1)  # taps count whole


def test_large_matrices_are_sampled_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_samples, "_PIECE_BYTES", 400)
    path = tmp_path / "weights"
    path.write_bytes(bytes(FILE_BYTES))
    for piece in range(3):  # 1000 bytes are three pieces of 333 or 334
        assert differs(path, 10 + 1000 * piece // 3 + 166)
        assert not differs(path, 10 + 1000 * piece // 3 + 20)


@given(shape=st.lists(st.integers(0, 9), max_size=4), item=st.integers(1, 4096))
def test_samples_lie_inside_their_tensor(shape: list[int], item: int) -> None:
    num_bytes = item
    for size in shape:
        num_bytes *= size
    places = list(weight_samples._samples(Stored(tuple(shape), 77, num_bytes)))
    assert all(77 <= start and start + size <= 77 + num_bytes for start, size in places)
    assert bool(places) == (num_bytes > 0) and all(0 < size <= SAMPLE_BYTES for _, size in places)


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(FILE_BYTES - 1))
    with pytest.raises(CheckpointError, match="weights ends before byte .* download it again"):
        sampled_digest(path, 10, [TAPS])


@pytest.mark.parametrize("only", ["gate.weight", "experts.5.up_proj", "input_layernorm"])
def test_a_model_tuned_in_one_kind_of_tensor_is_another(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, only: str
) -> None:
    def change(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return (
            0.1 * torch.ones_like(value)
            if f"layers.1.mlp.{only}" in name or (f"layers.1.{only}" in name)
            else torch.zeros_like(value)
        )

    folder = tiny_checkpoint("qwen3_moe")
    tuned = tuned_copy(folder, tmp_path / "tuned", change)
    assert Checkpoint(tuned).fingerprint != Checkpoint(folder).fingerprint
    same = tuned_copy(folder, tmp_path / "same", lambda name, value, _: torch.zeros_like(value))
    assert Checkpoint(same).fingerprint == Checkpoint(folder).fingerprint
