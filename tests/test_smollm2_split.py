"""Splitting a dense FFN into experts, on hand-made neurons."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from edge_moe.converters.upcycle.split_layer import SplitLayer, choose, split_layer
from edge_moe.converters.upcycle.split_neurons import (
    DenseFfn,
    NeuronSplit,
    balanced_clusters,
    split_neurons,
)
from edge_moe.converters.upcycle.split_router import NormalEquations, router_rows
from smollm2.block import block_tensors
from smollm2.layer import refit_down, running
from smollm2.source import halves_first

HIDDEN, WIDTH, SHARED, EXPERTS, EACH = 12, 32, 8, 4, 6


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _ffn(seed: int = 0) -> DenseFfn:
    generator = _generator(seed)
    gate, up, down = (torch.randn(WIDTH, HIDDEN, generator=generator) for _ in range(3))
    return DenseFfn(gate, up, down.T.contiguous())


def _inputs(num_tokens: int, seed: int = 1) -> Tensor:
    return torch.randn(num_tokens, HIDDEN, generator=_generator(seed))


def _random_split(seed: int = 2) -> NeuronSplit:
    order = torch.randperm(WIDTH, generator=_generator(seed))
    return NeuronSplit(order[:SHARED], order[SHARED:].view(EXPERTS, EACH))


def _dense_output(ffn: DenseFfn, inputs: Tensor) -> Tensor:
    hidden = functional.silu(functional.linear(inputs, ffn.gate)) * (inputs @ ffn.up.T)
    return functional.linear(hidden, ffn.down)


def _block(ffn: DenseFfn, split: NeuronSplit, router: Tensor, top_k: int) -> Qwen2MoeSparseMoeBlock:
    """The stored tensors in transformers' own block."""
    tensors = block_tensors(ffn, split, router, _generator())
    config = Qwen2MoeConfig(
        hidden_size=HIDDEN,
        num_experts=EXPERTS,
        num_experts_per_tok=top_k,
        moe_intermediate_size=EACH,
        shared_expert_intermediate_size=SHARED,
        norm_topk_prob=False,
    )
    config._experts_implementation = "eager"
    block = Qwen2MoeSparseMoeBlock(config)
    state = {name: tensor for name, tensor in tensors.items() if "experts." not in name}
    gate_up = [
        torch.cat([tensors[f"experts.{e}.{name}_proj.weight"] for name in ("gate", "up")])
        for e in range(EXPERTS)
    ]
    state["experts.gate_up_proj"] = torch.stack(gate_up)
    state["experts.down_proj"] = torch.stack(
        [tensors[f"experts.{e}.down_proj.weight"] for e in range(EXPERTS)]
    )
    block.load_state_dict(state)
    return block.eval()


# ---------------------------------------------------------------------------- clusters


@settings(max_examples=25, deadline=None)
@given(
    num_clusters=st.integers(1, 6),
    size=st.integers(1, 5),
    num_tokens=st.integers(1, 9),
    seed=st.integers(0, 999),
)
def test_every_neuron_has_one_place_in_equal_clusters(
    num_clusters: int, size: int, num_tokens: int, seed: int
) -> None:
    vectors = (
        torch.rand(num_clusters * size, num_tokens, generator=_generator(seed)) > 0.7
    ).float()
    members = balanced_clusters(vectors, num_clusters, _generator(seed))
    assert members.shape == (num_clusters, size)
    assert members.flatten().sort().values.tolist() == list(range(num_clusters * size))


def test_neurons_that_fire_together_share_an_expert() -> None:
    """Two groups fire on different tokens; the interleaved neurons are told apart."""
    even, odd = torch.tensor([1.0, 1, 0, 0]), torch.tensor([0.0, 0, 1, 1])
    vectors = torch.stack([even, odd] * 3)
    members = balanced_clusters(vectors, 2, _generator(0))
    assert sorted(row.tolist() for row in members) == [[0, 2, 4], [1, 3, 5]]


def test_neurons_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="7 neurons do not divide into 2"):
        balanced_clusters(torch.ones(7, 3), 2, _generator())


def test_the_strongest_neurons_are_always_on() -> None:
    strengths = torch.tensor([[1.0, 5, 0, 2, 4, 3], [1, 4, 2, 0, 5, 3]])
    split = split_neurons(strengths, 2, 2, _generator())
    assert split.shared.tolist() == [1, 4]  # mean squares 1, 20.5, 2, 2, 20.5, 9
    assert sorted(split.experts.flatten().tolist()) == [0, 2, 3, 5]


def test_mask_and_energy_by_hand() -> None:
    split = NeuronSplit(torch.tensor([3]), torch.tensor([[0, 4], [2, 1]]))
    assert running(split, torch.tensor([[1], [0]])).tolist() == [[0, 1, 1, 1, 0], [1, 0, 0, 1, 1]]
    energy = split.energy(torch.tensor([[3.0, 5, 12, 9, 4]]))
    assert energy.tolist() == [[5, 13]]


# ---------------------------------------------------------------------------- the whole block


def test_all_experts_together_are_the_dense_network() -> None:
    ffn, inputs = _ffn(), _inputs(20)
    block = _block(ffn, _random_split(), torch.zeros(EXPERTS, HIDDEN), top_k=EXPERTS)
    expected = _dense_output(ffn, inputs)
    with torch.no_grad():
        found = block(inputs[None])[0]
    assert (found - expected).norm() < 2e-5 * expected.norm()  # the random shared gate: 1e-5


def test_some_experts_are_the_masked_dense_network() -> None:
    ffn, inputs, split = _ffn(), _inputs(20), _random_split()
    router = 1e-4 * torch.randn(EXPERTS, HIDDEN, generator=_generator(3))
    block = _block(ffn, split, router, top_k=2)
    mask = running(split, choose(router, inputs, 2))
    expected = (ffn.activations(inputs) * mask) @ ffn.down.T
    with torch.no_grad():
        found = block(inputs[None])[0]
    assert (mask.sum(1) == SHARED + 2 * EACH).all()
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_shared_gate_is_never_exactly_zero() -> None:
    """llama.cpp computes it as silu(x) / x."""
    tensors = block_tensors(_ffn(), _random_split(), torch.zeros(EXPERTS, HIDDEN), _generator())
    assert (tensors["shared_expert_gate.weight"] != 0).all()


# ---------------------------------------------------------------------------- fits


def test_ridge_agrees_with_least_squares() -> None:
    inputs, outputs = _inputs(30), _inputs(30, seed=5)[:, :3]
    equations = NormalEquations.zeros(HIDDEN, 3)
    equations.add(inputs[:11], outputs[:11])
    equations.add(inputs[11:], outputs[11:])
    strength = (0.1 * inputs.square().sum(0).mean()).sqrt() * torch.eye(HIDDEN)
    rows = torch.cat([inputs, strength])
    wanted = torch.cat([outputs, torch.zeros(HIDDEN, 3)])
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    assert torch.allclose(equations.solve(0.1), expected, atol=1e-4)


def test_router_orders_experts_by_energy() -> None:
    inputs = _inputs(200)
    true_rows = torch.randn(EXPERTS, HIDDEN, generator=_generator(7))
    energy = inputs @ true_rows.T
    equations = NormalEquations.zeros(HIDDEN, EXPERTS)
    equations.add(inputs, energy)
    router = router_rows(equations, ridge=1e-6, spread=1e-3)
    scores = inputs @ router.T
    assert router.mean(0).abs().max() < 1e-9
    assert float(scores.square().mean().sqrt()) == pytest.approx(1e-3, rel=1e-3)
    assert torch.equal(scores.argsort(dim=1), energy.argsort(dim=1))


def test_refit_lowers_the_error_and_needs_nothing_when_all_experts_run() -> None:
    ffn, inputs = _ffn(), _inputs(400)
    router = torch.randn(EXPERTS, HIDDEN, generator=_generator(8))
    layer = SplitLayer(_random_split(), router, recall=1.0)
    refit = refit_down(ffn, layer, inputs, top_k=2, ridge=1e-3)
    assert refit.error_after < 0.9 * refit.error_before
    assert (refit.outputs - _dense_output(ffn, inputs)).norm() ** 2 == pytest.approx(
        refit.error_after * float(_dense_output(ffn, inputs).norm() ** 2), rel=1e-3
    )
    stiff = refit_down(ffn, layer, inputs, top_k=2, ridge=1e6)
    assert torch.allclose(stiff.down, ffn.down, atol=1e-3)  # drawn towards what it was
    everything = refit_down(ffn, layer, inputs, top_k=EXPERTS, ridge=1e-3)
    assert torch.allclose(everything.down, ffn.down, atol=1e-4)
    untouched = refit_down(ffn, layer, inputs, top_k=2, ridge=None)
    assert untouched.down is ffn.down and untouched.error_after == refit.error_before


def test_router_finds_experts_that_depend_on_the_input() -> None:
    """Neurons of group g see only input g, so the energy can be read off the inputs."""
    gate = torch.zeros(WIDTH, HIDDEN)
    group = torch.arange(WIDTH) % EXPERTS
    gate[torch.arange(WIDTH), group] = 1.0
    ffn = DenseFfn(gate, gate.clone(), torch.eye(WIDTH)[:HIDDEN] + 0.1)
    inputs = _inputs(600).abs()
    layer = split_layer(
        ffn,
        inputs,
        ffn.activations(inputs),
        num_experts=EXPERTS,
        expert_width=EACH,
        top_k=1,
        ridge=1e-4,
        spread=1e-3,
        generator=_generator(),
    )
    assert layer.recall > 0.7  # chance is 0.25
    assert torch.equal(layer.router, layer.router.bfloat16().float())


def test_rows_of_llama_cpp_get_their_order_back() -> None:
    """llama.cpp stores (0, n/2), (1, n/2 + 1), ... of every head."""
    stored = torch.tensor([0, 2, 1, 3, 10, 12, 11, 13])[:, None]
    assert halves_first(stored, num_heads=2)[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
