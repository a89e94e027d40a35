"""The original's predictions on disk: what is kept of them, and the divergence computed from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from edge_moe.converters.recover_teacher import TeacherCache, compress, divergence
from edge_moe.errors import CheckpointError, InputError

WINDOWS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


class FakeSession:
    """Logits that follow from the token ids; counts the windows it was asked for."""

    def __init__(self, vocabulary: int, bad: bool = False) -> None:
        self.vocabulary = vocabulary
        self.bad = bad
        self.asked: list[tuple[int, ...]] = []

    def logits(self, ids: Any) -> npt.NDArray[np.float32]:
        self.asked.append(tuple(ids))
        values = np.random.default_rng(list(ids)).normal(0, 2, (len(ids), self.vocabulary))
        if self.bad:
            values[0, 0] = np.nan
        return values.astype(np.float32)


def full_divergence(student: torch.Tensor, teacher: npt.NDArray[np.float32]) -> float:
    wanted = F.log_softmax(torch.from_numpy(teacher).double(), dim=1)
    found = F.log_softmax(student.double(), dim=1)
    return float((wanted.exp() * (wanted - found)).sum(dim=1).mean())


@pytest.mark.parametrize(("vocabulary", "is_whole"), [(50, True), (64, True), (500, False)])
def test_divergence_beside_the_whole_vocabulary(
    vocabulary: int, is_whole: bool, tmp_path: Path
) -> None:
    session: Any = FakeSession(vocabulary)
    cache = TeacherCache(tmp_path / "cache")
    cache.fill(session, WINDOWS)
    teacher = cache.read(2)
    original = session.logits(WINDOWS[2])
    student = torch.from_numpy(original) + torch.randn(
        original.shape, generator=torch.Generator().manual_seed(0)
    )
    whole, found = full_divergence(student, original), float(divergence(student, teacher))
    if is_whole:
        assert found == pytest.approx(whole, rel=2e-3)
    else:
        assert 0.3 * whole < found < whole
    assert abs(float(divergence(torch.from_numpy(original), teacher))) < 1e-5


def test_candidates_are_the_likeliest() -> None:
    logits = FakeSession(500).logits([1, 2, 3])
    kept = compress(logits)
    np.testing.assert_array_equal(kept["token_ids"], np.argsort(-logits, axis=1)[:, :64])
    mass = np.exp(kept["log_probs"].astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(mass, 1, atol=3e-3)


def test_the_gradient_is_that_of_a_divergence(tmp_path: Path) -> None:
    session: Any = FakeSession(50)
    cache = TeacherCache(tmp_path / "cache")
    cache.fill(session, WINDOWS[:1])
    student = torch.zeros(3, 50, requires_grad=True)
    divergence(student, cache.read(0)).backward()  # type: ignore[no-untyped-call]
    wanted = F.softmax(torch.from_numpy(session.logits(WINDOWS[0])), dim=1)
    assert student.grad is not None
    torch.testing.assert_close(student.grad * 3, 1 / 50 - wanted, atol=1e-3, rtol=0)


def test_filling_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first: Any = FakeSession(50)
    cache = TeacherCache(tmp_path / "cache")
    cache.fill(first, WINDOWS[:2])
    (tmp_path / "cache" / ".000002.safetensors.1.tmp").write_text("killed here")
    second: Any = FakeSession(50)
    cache = TeacherCache(tmp_path / "cache")
    assert cache.missing(range(3)) == [2]
    cache.fill(second, WINDOWS)
    assert second.asked == [tuple(WINDOWS[2])]
    assert cache.missing(range(3)) == []


def test_damage_is_named(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "cache")
    broken: Any = FakeSession(50, bad=True)
    with pytest.raises(CheckpointError, match="not finite"):
        cache.fill(broken, WINDOWS)
    session: Any = FakeSession(50)
    cache.fill(session, WINDOWS)
    (tmp_path / "cache" / "000001.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"000001\.safetensors is damaged"):
        cache.read(1)
