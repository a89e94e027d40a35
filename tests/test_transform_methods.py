"""The methods on single layers: hand-computable cases, brute force, and identities they rest on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyCheckpoint, make_tiny_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transform_cases import layer_task

from edge_moe.converters.transforms import METHODS
from edge_moe.converters.transforms.base import LayerTask, LayerWeights
from edge_moe.converters.transforms.dern import Received, assign, recombine
from edge_moe.converters.transforms.heapr import slice_units
from edge_moe.converters.transforms.m_smoe import column_cosines
from edge_moe.converters.transforms.merging import hidden_units, merge_groups, weight_cost
from edge_moe.converters.transforms.naee import OutputLoss, best_of_all, eliminate
from edge_moe.converters.transforms.ream import absorb, principal_components, routed_sums
from edge_moe.converters.transforms.sub_moe import (
    kernel_kmeans,
    leading_projection,
    output_cosines,
    sub_moe,
)
from edge_moe.errors import InputError


def sliced_block(block: Any, kept: list[int]) -> Any:
    """A copy of transformers' block that has only the kept experts."""
    import copy

    part = copy.deepcopy(block)
    for module, name in (
        (part.experts, "gate_up_proj"),
        (part.experts, "down_proj"),
        (part.gate, "weight"),
    ):
        setattr(module, name, nn.Parameter(getattr(module, name)[kept]))
    if hasattr(part.gate, "e_score_correction_bias"):
        part.gate.e_score_correction_bias = part.gate.e_score_correction_bias[kept]
    part.experts.num_experts = part.gate.num_experts = len(kept)
    return part


def brute_force(task: LayerTask, kept: tuple[int, ...]) -> float:
    """NAEE's loss, by running the real layer with and without the dropped experts."""
    samples = task.sampled()
    whole = samples.block.module
    part = sliced_block(whole, list(kept))
    total = 0.0
    with torch.no_grad():
        for window in torch.split(samples.inputs, list(samples.window_tokens)):
            change = part(window[None]).double() - whole(window[None]).double()
            total += float(change.norm())
    return total


def block_outputs(task: LayerTask) -> list[Tensor]:
    """[T, H] float64 of every window, by the real layer as it is now."""
    samples = task.sampled()
    with torch.no_grad():
        windows = torch.split(samples.inputs, list(samples.window_tokens))
        return [samples.block.module(window[None])[0].double() for window in windows]


def naee_task(family: str, tiny_checkpoint: TinyCheckpoint, num_experts: int) -> LayerTask:
    folder = tiny_checkpoint(family)
    return layer_task(folder, 1, num_experts)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "olmoe", "mixtral", "deepseek_v3"])
def test_naee_agrees_with_brute_force(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    task = naee_task(family, tiny_checkpoint, 4)
    num_groups = task.spec.router.num_groups
    sets = [
        kept
        for kept in itertools.combinations(range(8), 4)
        if num_groups == 1 or sum(i < 4 for i in kept) == 2
    ]
    loss = OutputLoss(task.sampled())
    expected = [brute_force(task, kept) for kept in sets]
    np.testing.assert_allclose(loss.losses(sets, 4), expected, rtol=1e-5)
    kept, least = best_of_all(task, loss)
    assert kept == sets[int(np.argmin(expected))]
    assert least == pytest.approx(min(expected), rel=1e-5)


def test_dropping_one_by_one_starts_like_enumeration(tiny_checkpoint: TinyCheckpoint) -> None:
    task = naee_task("olmoe", tiny_checkpoint, 7)
    loss = OutputLoss(task.sampled())
    assert eliminate(task, loss) == best_of_all(task, loss)


def test_dropping_one_by_one_takes_the_least_missed(tiny_checkpoint: TinyCheckpoint) -> None:
    task = naee_task("qwen3_moe", tiny_checkpoint, 5)
    loss = OutputLoss(task.sampled())
    kept = tuple(range(8))
    while len(kept) > 5:
        rest = [tuple(i for i in kept if i != gone) for gone in kept]
        kept = rest[int(np.argmin([brute_force(task, each) for each in rest]))]
    found, least = eliminate(task, loss)
    assert found == kept
    assert least == pytest.approx(brute_force(task, kept), rel=1e-5)


def test_dropping_one_by_one_where_groups_are_compared(tiny_checkpoint: TinyCheckpoint) -> None:
    """The reference forbids an expert by its selection bias in the whole layer's own router."""
    task = naee_task("deepseek_v3", tiny_checkpoint, 6)
    loss = OutputLoss(task.sampled())
    bias, whole = task.sampled().block.router.e_score_correction_bias, block_outputs(task)
    expected = []
    for expert_id in range(8):
        before, bias[expert_id] = bias[expert_id].clone(), -torch.inf
        changed = zip(block_outputs(task), whole, strict=True)
        expected.append(float(sum((part - full).norm() for part, full in changed)))
        bias[expert_id] = before
    np.testing.assert_allclose(loss.losses_without(range(8), range(8)), expected, rtol=1e-5)
    kept, least = eliminate(task, loss)
    gone = {int(np.argmin(expected[:4])), 4 + int(np.argmin(expected[4:]))}
    assert set(kept) == set(range(8)) - gone
    assert least == pytest.approx(brute_force(task, kept), rel=1e-5)


def test_naee_keeps_super_experts(tiny_checkpoint: TinyCheckpoint) -> None:
    protected = np.zeros(8, np.bool_)
    protected[[1, 6]] = True
    task = layer_task(tiny_checkpoint("mixtral"), 1, 3, protected=protected)
    loss = OutputLoss(task.sampled())
    for kept, _ in (best_of_all(task, loss), eliminate(task, loss)):
        assert {1, 6} <= set(kept)
    too_few = layer_task(tiny_checkpoint("mixtral"), 1, 2, protected=np.ones(8, np.bool_))
    with pytest.raises(InputError, match="has 8 super experts in a group that may keep 2"):
        best_of_all(too_few, loss)
    with pytest.raises(InputError, match="only super experts are left"):
        eliminate(too_few, loss)


def weights_of(units: Sequence[Sequence[Sequence[float]]]) -> LayerWeights:
    """Experts given as [E][I][(gate, up, down)] with H = 1 or pairs flattened to 3H numbers."""
    values = torch.tensor(units)
    gate, up, down = values.chunk(3, dim=2)
    router = {"gate.weight": torch.arange(float(len(units)))[:, None]}
    return LayerWeights(torch.cat([gate, up], dim=1), down.transpose(1, 2).contiguous(), router)


def test_dern_gives_segments_to_the_owner_of_the_most_similar() -> None:
    """H = 2; a segment is (gate, up, down), compared by up and down."""
    dropped = [
        [9, 9, 1, 0, 1, 0],  # exactly expert 1's first segment
        [9, 9, 0, 3, 0, 1],  # expert 2's second, after up and down are scaled to equal length
        [9, 9, 1, 0, 0, 1],  # half of expert 1's first: cosine 0.5
        [9, 9, -1, 0, -1, 0],  # opposite to expert 1's first
    ]
    first = [[0.0, 0, 1, 0, 1, 0]] * 4
    second = [[0.0, 0, 1, -1, 1, -1], [0.0, 0, 0, 1, 0, 5], [0.0, 0, -1, -1, 1, 1], [0.0] * 6]
    weights = weights_of([dropped, first, second])
    assert assign(weights, 0, [1, 2], 0.6).tolist() == [1, 2, -1, -1]
    assert assign(weights, 0, [1, 2], 0.4).tolist() == [1, 2, 1, -1]
    assert assign(weights, 0, [2], 0.6).tolist() == [2, 2, -1, -1]


def test_dern_averages_a_segment_with_its_like() -> None:
    """Own weights 3, received 1: the direction is 3:1 between them, the length their mean."""
    own = torch.tensor([[4.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    received = Received(torch.tensor([[0.0, 4.0, 0.0]]), torch.tensor([1.0], dtype=torch.float64))
    found = recombine(own, 3.0, received)
    # lengths 2 and 4, weights 3 and 1: mean length 2.5, and both point the same way
    assert found.tolist() == [[4.0, 0.0, 0.0], [0.0, 2.5, 0.0]]


def test_dern_keeps_its_own_when_given_copies() -> None:
    own = torch.tensor([[3.0, 1.0, 0.0], [0.1, 0.0, 2.0], [1.0, 0.0, -1.0]])
    copies = Received(own[[0, 0, 2]], torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(recombine(own, 0.5, copies).sort(0).values, own.sort(0).values)


def test_dern_gives_segments_that_nothing_chose_a_mean() -> None:
    own = torch.tensor([[4.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    unused = Received(torch.tensor([[0.0, 4.0, 0.0]]), torch.zeros(1, dtype=torch.float64))
    found = recombine(own, 3.0, unused)
    torch.testing.assert_close(found, own)
    silent = Received(torch.tensor([[0.0, 0.0, 3.0]] * 2), torch.zeros(2, dtype=torch.float64))
    assert bool(recombine(own[:1], 0.0, silent).isfinite().all())
    torch.manual_seed(0)
    for _ in range(100):
        copies = torch.randn(2, 9).repeat(3, 1)
        given = Received(copies, torch.zeros(6, dtype=torch.float64))
        assert bool(recombine(torch.randn(4, 9), 1.0, given).isfinite().all())


def test_heapr_cuts_gate_row_up_row_and_down_column_together() -> None:
    """Two experts with H = 1, I = 3: unit j of expert e is (e + j/10, ... + 10, ... + 20)."""
    units = [[[e + j / 10, e + j / 10 + 10, e + j / 10 + 20] for j in range(3)] for e in (1, 2)]
    found = slice_units(weights_of(units), torch.tensor([[0, 2], [1, 2]]))
    torch.testing.assert_close(
        found.gate_up[:, :, 0], torch.tensor([[1.0, 1.2, 11.0, 11.2], [2.1, 2.2, 12.1, 12.2]])
    )
    torch.testing.assert_close(found.down[:, 0], torch.tensor([[21.0, 21.2], [22.1, 22.2]]))


def test_heapr_keeps_the_best_of_every_expert(tiny_checkpoint: TinyCheckpoint) -> None:
    scores = np.random.default_rng(0).random((8, 64))
    scores[3] = -1  # never routed: no unit is better than another, the first stay
    task = layer_task(
        tiny_checkpoint("olmoe"), 1, 8, expert_width=32, neuron_scores=scores, samples=None
    )
    result = METHODS["heapr"].run(task).weights
    for expert_id in (0, 3):
        kept = sorted(np.argsort(-scores[expert_id], kind="stable")[:32].tolist())
        expected = hidden_units(task.weights, expert_id)[kept]
        assert torch.equal(hidden_units(result, expert_id), expected)
    assert sorted(np.argsort(-scores[3], kind="stable")[:32].tolist()) == list(range(32))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_alignment_finds_reordered_units(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    units = torch.randn(1, 6, 9, generator=generator)
    shuffled = units[:, torch.randperm(6, generator=generator)]
    weights = weights_of(torch.cat([units, shuffled]).tolist())
    merged = merge_groups(weights, [[0, 1]], np.array([3.0, 1.0]), weight_cost(weights)).weights
    torch.testing.assert_close(hidden_units(merged, 0), units[0])


def test_merged_experts_are_weighted_means() -> None:
    weights = weights_of([[[1.0, 2, 3]], [[5.0, 6, 7]], [[0.0, 0, 1]]])
    importance = np.array([3.0, 1.0, 0.0])
    kept_row = merge_groups(weights, [[0, 1], [2]], importance, None)
    assert hidden_units(kept_row.weights, 0).tolist() == [[2.0, 3.0, 4.0]]
    assert kept_row.weights.router["gate.weight"].tolist() == [[0.0], [2.0]]
    mean_row = merge_groups(weights, [[0, 1], [2]], importance, None, "mean")
    assert mean_row.weights.router["gate.weight"].tolist() == [[0.25], [2.0]]
    unused = merge_groups(weights, [[0, 1]], np.zeros(3), None)
    assert hidden_units(unused.weights, 0).tolist() == [[3.0, 4.0, 5.0]]


def test_router_similarity_is_the_cosine_of_logit_columns() -> None:
    logits = torch.tensor([[3.0, 6.0, -4.0], [4.0, 8.0, 3.0]])
    np.testing.assert_allclose(column_cosines(logits)[0], [1, 1, 0], atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), num_clusters=st.integers(1, 6))
def test_kmeans_in_kernel_form_is_kmeans(seed: int, num_clusters: int) -> None:
    """Converged: every point is nearest to its own cluster's mean, computed from coordinates."""
    points = np.random.default_rng(seed).normal(size=(9, 4))
    clusters = kernel_kmeans(points @ points.T, num_clusters, seed)
    assert sorted(sum(clusters, [])) == list(range(9)) and all(clusters)
    means = np.stack([points[cluster].mean(axis=0) for cluster in clusters])
    distances = ((points[:, None] - means) ** 2).sum(axis=2)
    for index, cluster in enumerate(clusters):
        for point in cluster:
            alone = len(cluster) == 1  # a cluster may not give away its last point
            assert alone or distances[point, index] <= distances[point].min() + 1e-9


def test_kmeans_finds_plain_clusters() -> None:
    points = np.array([[0, 0], [10, 0], [0.1, 0], [10, 0.1], [0, 9], [0.1, 9]])
    clusters = kernel_kmeans(points @ points.T, 3, seed=0)
    assert sorted(map(sorted, clusters)) == [[0, 2], [1, 3], [4, 5]]
    copies = np.ones((4, 4))
    assert sorted(sum(kernel_kmeans(copies, 3, seed=0), [])) == [0, 1, 2, 3]


def test_output_cosines(tiny_checkpoint: TinyCheckpoint) -> None:
    samples = layer_task(tiny_checkpoint("olmoe"), 1, 4).sampled()
    found = output_cosines(samples)
    left, right = samples.output(2), samples.output(5)
    expected = torch.nn.functional.cosine_similarity(left, right, dim=1).double().mean()
    assert found[2, 5] == pytest.approx(float(expected), abs=1e-6)
    np.testing.assert_allclose(np.diag(found), 1, atol=1e-6)


def test_sub_moe_without_truncation_is_a_weighted_mean() -> None:
    """The paper's way: one SVD of all matrices side by side, the right factors averaged."""
    torch.manual_seed(0)
    matrices = [torch.randn(5, 7, dtype=torch.float64) for _ in range(3)]
    shares = [0.5, 0.3, 0.2]
    left, values, right = torch.linalg.svd(torch.cat(matrices, dim=1), full_matrices=False)
    mixed = sum(share * part for share, part in zip(shares, right.split(7, dim=1), strict=True))
    assert isinstance(mixed, Tensor)
    mean = sum(share * part for share, part in zip(shares, matrices, strict=True))
    torch.testing.assert_close(left @ values.diag() @ mixed, mean)


def test_sub_moe_truncated_is_a_projection() -> None:
    """The paper's way: whiten by C_i, one SVD, drop values, average, take the whitening back."""
    torch.manual_seed(0)
    matrices = [torch.randn(5, 7, dtype=torch.float64) for _ in range(2)]
    inputs = [torch.randn(30, 7, dtype=torch.float64) for _ in range(2)]
    shares = [0.75, 0.25]
    whiten = [torch.linalg.cholesky(each.T @ each) for each in inputs]
    pairs = list(zip(matrices, whiten, strict=True))
    left, values, right = torch.linalg.svd(
        torch.cat([matrix @ factor for matrix, factor in pairs], dim=1), full_matrices=False
    )
    parts = right[:4].split(7, dim=1)
    expected = sum(
        share * left[:, :4] @ values[:4].diag() @ part @ torch.linalg.inv(factor)
        for share, part, factor in zip(shares, parts, whiten, strict=True)
    )
    outputs = [each @ matrix.T for each, matrix in zip(inputs, matrices, strict=True)]
    moment = torch.stack([each.T @ each for each in outputs]).sum(dim=0)
    mean = shares[0] * matrices[0] + shares[1] * matrices[1]
    torch.testing.assert_close(leading_projection(moment, 0.8) @ mean, expected)


def test_nothing_is_truncated_where_no_token_was_routed() -> None:
    moment = torch.zeros(5, 5, dtype=torch.float64)
    torch.testing.assert_close(leading_projection(moment, 0.8), torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("align", ["no", "yes"])
def test_sub_moe_truncation_shrinks_rank(align: str, tmp_path: Path) -> None:
    from fake_stats import fake_stats

    from edge_moe.checkpoint import Checkpoint

    folder = make_tiny_checkpoint(tmp_path / "model", "olmoe")
    settings_ = {"router": "dominant", "align": align, "truncate": 0.25, "seed": 0}
    stats = fake_stats(Checkpoint(folder), forms=("drop",))
    task = layer_task(folder, 1, 4, settings=settings_, stats=stats)
    result = sub_moe(task)
    ranks = [int(torch.linalg.matrix_rank(each)) for each in result.weights.down]
    for rank, members in zip(ranks, result.members, strict=True):
        assert rank == (64 if len(members) == 1 else 48)


def test_ream_absorbs_from_the_most_salient_down(tiny_checkpoint: TinyCheckpoint) -> None:
    """Centroids 0, 1, 2 with saliency 3, 2, 1; the most salient takes its nearest first."""
    similarity = np.zeros((8, 8))
    similarity[0] = [1, 0, 0, 0.9, 0.8, 0.7, 0.6, 0.5]
    similarity[1] = [0, 1, 0, 0, 0, 0, 0.2, 0.9]
    scores = np.array([3.0, 2, 1, 0, 0, 0, 0, 0])

    def groups(size: int, **changes: Any) -> list[list[int]]:
        task = layer_task(tiny_checkpoint("olmoe"), 1, 3, settings={"group_size": size}, **changes)
        return absorb(task, [0, 1, 2], scores, similarity)

    assert groups(16) == [[0, 3, 4, 5, 6, 7], [1], [2]]
    assert groups(3) == [[0, 3, 4], [1, 7, 6], [2, 5]]
    assert groups(1) == [[0, 3, 5], [1, 7, 6], [2, 4]]
    protected = np.arange(8) == 0
    assert groups(3, protected=protected) == [[0], [1, 7, 6, 5], [2, 3, 4]]


def test_ream_scores_are_reap_scores(tiny_checkpoint: TinyCheckpoint) -> None:
    samples = layer_task(tiny_checkpoint("qwen2_moe"), 1, 4).sampled()
    scores, means = routed_sums(samples)
    products = []
    for token in range(samples.num_tokens):
        for slot in range(2):
            if samples.expert_ids[token, slot] == 5:
                output = samples.output(5)[token].double()
                products.append(samples.gates[token, slot] * output)
    stacked = torch.stack(products)
    assert scores[5] == pytest.approx(float(stacked.norm(dim=1).mean()), rel=1e-5)
    torch.testing.assert_close(means[5], stacked.mean(dim=0), rtol=1e-4, atol=1e-6)


def test_principal_components_keep_distances() -> None:
    """All components of few rows: distances are those of the rows themselves."""
    torch.manual_seed(0)
    left, right = torch.randn(7, 30), torch.randn(9, 30)
    parts = principal_components(left, right)
    torch.testing.assert_close(
        torch.cdist(*parts), torch.cdist(left.double(), right.double()), rtol=1e-6, atol=1e-6
    )
