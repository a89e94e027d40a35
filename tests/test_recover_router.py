"""Router calibration on cases whose answer is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from edge_moe.converters.recover_router import (
    RouterInputs,
    fit_router,
    fit_rows,
    overlap,
    router_divergence,
)

NUM_TOKENS, NUM_ROWS, WIDTH, TOP_K = 2000, 6, 8, 2


class Gate:
    """The interface of transformers' routers."""

    def __init__(self, rows: Tensor) -> None:
        self.weight = rows.clone()

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = inputs @ self.weight.T
        found = logits.softmax(dim=1).topk(TOP_K, dim=1)
        return logits, found.values, found.indices


@pytest.fixture
def case() -> Any:
    """Inputs that shrinking mixed up linearly: rows R M**-T undo it exactly."""
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(NUM_TOKENS, WIDTH, generator=generator)
    mixing = torch.eye(WIDTH) + 0.15 * torch.randn(WIDTH, WIDTH, generator=generator)
    rows = torch.randn(NUM_ROWS, WIDTH, generator=generator)
    is_training = torch.arange(NUM_TOKENS) % 4 != 0
    return SimpleNamespace(
        rows=rows,
        mixing=mixing,
        inputs=RouterInputs(original, original @ mixing, is_training),
        exact=RouterInputs(original, original, is_training),
    )


@pytest.mark.parametrize("is_sigmoid", [False, True])
def test_a_linear_change_is_undone(case: Any, is_sigmoid: bool) -> None:
    gate = Gate(case.rows)
    rows, fit = fit_router(gate, case.inputs, 3, is_sigmoid=is_sigmoid)
    assert fit.layer_id == 3
    assert fit.is_kept
    assert fit.overlap_before < 0.9
    assert fit.overlap_after > 0.97
    assert fit.divergence_after < fit.divergence_before / 20
    torch.testing.assert_close(gate.weight, case.rows, rtol=0, atol=0)
    if is_sigmoid:  # softmax knows rows only up to a common shift
        undone = case.rows @ torch.linalg.inv(case.mixing).T
        assert (rows - undone).norm() < 0.3 * (case.rows - undone).norm()


@pytest.mark.parametrize("is_sigmoid", [False, True])
def test_an_exact_student_is_left_alone(case: Any, is_sigmoid: bool) -> None:
    rows, fit = fit_router(Gate(case.rows), case.exact, 0, is_sigmoid=is_sigmoid)
    torch.testing.assert_close(rows, case.rows, rtol=0, atol=0)
    assert (fit.divergence_before, fit.overlap_before, fit.is_kept) == (0.0, 1.0, False)


def test_rows_that_fail_on_held_out_text_are_not_kept(case: Any) -> None:
    shrunken = torch.where(
        case.inputs.is_training[:, None], case.inputs.shrunken, case.inputs.original
    )
    inputs = RouterInputs(case.inputs.original, shrunken, case.inputs.is_training)
    _, fit = fit_router(Gate(case.rows), inputs, 0, is_sigmoid=False)
    assert not fit.is_kept
    assert fit.divergence_after > fit.divergence_before


def test_fitting_lowers_its_objective(case: Any) -> None:
    wanted = case.inputs.original @ case.rows.T
    fitted = fit_rows(case.rows, case.inputs.shrunken, wanted, is_sigmoid=False)
    before = router_divergence(case.inputs.shrunken @ case.rows.T, wanted, False)
    after = router_divergence(case.inputs.shrunken @ fitted.T, wanted, False)
    assert after < before / 20


def test_divergence_by_hand() -> None:
    wanted = torch.tensor([[0.0, 0.0]])
    found = torch.tensor([[torch.log(torch.tensor(3.0)), 0.0]])
    half = torch.tensor(0.5)
    expected = half * torch.log(half / 0.75) + half * torch.log(half / 0.25)
    assert float(router_divergence(found, wanted, False)) == pytest.approx(float(expected))
    # sigmoid: the first expert goes from 1/2 to 3/4, the second stays
    assert float(router_divergence(found, wanted, True)) == pytest.approx(float(expected))


def test_overlap_by_hand() -> None:
    found = torch.tensor([[0, 1], [2, 3], [4, 5]])
    wanted = torch.tensor([[1, 0], [3, 4], [0, 1]])
    assert overlap(found, wanted) == pytest.approx(0.5)
