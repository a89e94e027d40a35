"""Second moments of experts: by hand, and as the loss they stand for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from edge_moe.converters.block_sums import WindowObservation  # noqa: E402
from edge_moe.converters.second_moments import (  # noqa: E402
    WEIGHTINGS,
    expert_moments,
    layer_moments,
)
from edge_moe.formats.gptq import output_loss  # noqa: E402

PLAIN = {"is_concatenated": True, "has_bias": False, "has_gate": True}
"""What transformers' experts modules say about their layout."""


def _window(inputs: Tensor, ids: list[list[int]], gates: list[list[float]]) -> WindowObservation:
    """The part of an observation that second moments are made of."""
    seen = SimpleNamespace(
        inputs=inputs,
        expert_ids=torch.tensor(ids),
        gates=torch.tensor(gates, dtype=torch.float64),
    )
    return cast(WindowObservation, seen)


def _experts(num_experts: int, width: int, hidden: int, seed: int = 0) -> Any:
    """As transformers' experts modules: gate_up_proj, down_proj and how the halves meet."""
    torch.manual_seed(seed)

    def apply_gate(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    return SimpleNamespace(
        **PLAIN,
        gate_up_proj=torch.randn(num_experts, 2 * width, hidden),
        down_proj=torch.randn(num_experts, hidden, width),
        _apply_gate=apply_gate,
    )


def _small() -> tuple[Any, list[WindowObservation]]:
    """One inner neuron that copies x_0 (the gate's silu is taken off): h = x_0."""
    experts = SimpleNamespace(
        **PLAIN,
        gate_up_proj=torch.tensor([[[0.0, 0.0], [1.0, 0.0]]] * 3),
        down_proj=torch.zeros(3, 2, 1),
        _apply_gate=lambda gate_up: gate_up[:, 1:],
    )
    first = _window(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), [[0], [1]], [[0.25], [0.5]])
    second = _window(torch.tensor([[2.0, -1.0]]), [[0]], [[0.5]])
    return experts, [first, second]


@pytest.mark.parametrize(
    ("weighting", "weights"),
    [("none", (1, 1)), ("gate", (0.25, 0.5)), ("gate_square", (0.0625, 0.25))],
)
def test_sums_by_hand(weighting: Any, weights: tuple[float, float]) -> None:
    a, b = weights
    found, other, unrouted = layer_moments(*_small(), weighting=weighting)
    assert (found.num_tokens, other.num_tokens, unrouted.num_tokens) == (2, 1, 0)
    assert found.input_squares == pytest.approx([a * 1 + b * 4, a * 4 + b * 1])
    assert found.inner_squares == pytest.approx([a * 1 + b * 4])
    assert found.hessians is not None
    outer, inner = found.hessians
    assert outer[0, 1] == outer[1, 0] == pytest.approx(a * 2 - b * 2)
    assert np.diagonal(outer) == pytest.approx(found.input_squares)
    assert inner == pytest.approx(found.inner_squares[None])
    assert not unrouted.input_squares.any() and unrouted.hessians is not None


def test_every_token_through_every_expert() -> None:
    """Expert 0 gets scores 0.5, 0.1 and 0.25: three tokens, worth 0.85^2 / 0.3225 of equal ones."""
    experts, windows = _small()
    scores = [torch.tensor([[0.5, 0.5, 0], [0.1, 0.9, 0]]), torch.tensor([[0.25, 0, 0.75]])]
    alike = list(layer_moments(experts, windows, weighting="none", token_scores=scores))
    for found in alike:
        assert found.num_tokens == 3
        assert found.input_squares.tolist() == [14, 5]
        assert found.inner_squares.tolist() == [14]
    first, _, third = layer_moments(experts, windows, token_scores=scores)
    assert first.input_squares == pytest.approx([0.5 * 1 + 0.1 * 9 + 0.25 * 4, 0.5 * 4 + 0.25])
    assert first.inner_squares == pytest.approx([2.4])
    assert first.num_tokens == round(0.85**2 / 0.3225) == 2
    assert third.num_tokens == 1 and third.input_squares == pytest.approx([3, 0.75])
    nothing = [torch.zeros(2, 3), torch.zeros(1, 3)]
    assert [each.num_tokens for each in layer_moments(*_small(), token_scores=nothing)] == [0] * 3


def test_squares_alone_take_no_matrices() -> None:
    experts, windows = _small()
    found = expert_moments(experts, 0, windows, with_hessians=False)
    assert found.hessians is None and found.input_squares.shape == (2,)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_hessians_give_the_output_error_of_changed_weights(weighting: Any) -> None:
    experts = _experts(4, 24, 16)
    generator = torch.Generator().manual_seed(3)
    windows = []
    for num_tokens in (9, 40):
        ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(num_tokens)])
        gates = torch.rand(num_tokens, 2, generator=generator)
        inputs = torch.randn(num_tokens, 16, generator=generator)
        windows.append(_window(inputs, ids.tolist(), gates.tolist()))
    found = expert_moments(experts, 2, windows, weighting=weighting)
    assert found.hessians is not None
    changes = torch.randn(7, 16, generator=generator), torch.randn(7, 24, generator=generator)
    expected = [0.0, 0.0]
    for window in windows:
        for token, slot in (window.expert_ids == 2).nonzero().tolist():
            x = window.inputs[token]
            h = experts._apply_gate(experts.gate_up_proj[2] @ x)
            weight = float(window.gates[token, slot]) ** WEIGHTINGS[weighting]
            for index, values in enumerate((x, h)):
                expected[index] += weight * float((changes[index] @ values).square().sum())
    for change, hessian, loss in zip(changes, found.hessians, expected, strict=True):
        assert output_loss(change.numpy(), hessian) == pytest.approx(loss, rel=1e-4)
