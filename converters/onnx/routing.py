"""The router's weights of every kept expert, [T, E] with zeros where an expert was not chosen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_moe.converters.onnx.operations import Operations
from edge_moe.router_spec import RouterSpec


@dataclass(frozen=True)
class Routing:
    """How one layer's kept experts are chosen."""

    router: RouterSpec
    top_k: int
    num_experts: int
    """Of the source: its groups are equal runs of them."""
    kept: tuple[int, ...]
    added_sum: float = 1e-20
    """What transformers adds before it divides by the sum of sigmoids."""
    least_sum: float = 0.0
    """The sum of softmax weights counts as this where it is smaller."""

    @property
    def is_plain(self) -> bool:
        """Softmax over all experts and the best top_k: what MoE and QMoE do themselves."""
        router = self.router
        return (
            router.score_function == "softmax"
            and not router.has_selection_bias
            and router.num_groups == 1
            and router.scale == 1.0
        )


def dense_weights(operations: Operations, logits: str, bias: str, routing: Routing) -> str:
    """What a token's router gives every kept expert of a layer.

    Args:
        logits: [T, E] of kept experts.
        bias: [E] selection bias of kept experts, or "".

    Returns: [T, E] float32. As in a router that masks dropped experts out before it chooses.
    """
    graph, router = operations.graph, routing.router
    op, constant = graph.op, graph.constant
    if router.score_function == "sparsemixer":
        return _sparse_mixer(operations, logits, routing)
    if router.score_function == "softmax":
        scores = op("Softmax", [logits], axis=-1)
    else:
        scores = op("Sigmoid", [logits])
    choice = op("Add", [scores, bias]) if bias else scores
    if router.num_groups > 1:
        choice = _limit_to_groups(operations, choice, routing)
    _, chosen = graph.ops("TopK", [choice, constant([routing.top_k])], 2, axis=-1)
    weights = op("GatherElements", [scores, chosen], axis=-1)
    if router.renormalises:
        total = op("ReduceSum", [weights, constant([-1])], keepdims=1)
        if router.score_function == "sigmoid":
            total = op("Add", [total, constant(routing.added_sum, np.float32)])
        elif routing.least_sum:
            total = op("Max", [total, constant(routing.least_sum, np.float32)])
        weights = op("Div", [weights, total])
    if router.scale != 1.0:
        weights = op("Mul", [weights, constant(router.scale, np.float32)])
    zeros = op("Mul", [scores, constant(0.0, np.float32)])
    return op("ScatterElements", [zeros, chosen, weights], axis=-1)


def _sparse_mixer(operations: Operations, logits: str, routing: Routing) -> str:
    """Phi's two experts (arXiv:2409.12136), each weighted by a softmax of its own.

    The second's leaves the first expert out.
    """
    op, constant = operations.graph.op, operations.graph.constant
    first, is_first = _leader(operations, logits, logits, routing)
    others = op("Where", [is_first, constant(-np.inf, np.float32), logits])
    second, _ = _leader(operations, logits, others, routing)
    return op("Add", [first, second])


def _leader(operations: Operations, logits: str, choice: str, routing: Routing) -> tuple[str, str]:
    """(the weight of the best of `choice`, zeros elsewhere; where that is), [T, E] both.

    Its softmax is over those that are at most twice the router's jitter below it, relatively.
    """
    op, constant = operations.graph.op, operations.graph.constant
    best = op("ReduceMax", [choice, constant([-1])], keepdims=1)
    distance = op("Div", [op("Sub", [best, logits]), op("Max", [op("Abs", [logits]), best])])
    is_far = op("Greater", [distance, constant(2 * routing.router.jitter, np.float32)])
    near = op("Where", [is_far, constant(-np.inf, np.float32), choice])
    chosen = op("ArgMax", [choice], axis=-1, keepdims=1)  # [T, 1]
    is_chosen = op("Equal", [chosen, constant(range(len(routing.kept)))])
    shares = op("Softmax", [near], axis=-1)
    return op("Where", [is_chosen, shares, constant(0.0, np.float32)]), is_chosen


def _limit_to_groups(operations: Operations, choice: str, routing: Routing) -> str:
    """`choice` [T, E] with -inf outside the best groups, ranked as the router says.

    A layer may have lost any expert, so groups are padded to one size with a column of -inf.
    """
    graph, router = operations.graph, routing.router
    op, constant = graph.op, graph.constant
    columns, group_of_row = group_columns(routing)
    lowest = constant(-np.inf, np.float32)
    padded = op("Pad", [choice, constant([0, 0, 0, 1]), lowest])  # [T, E + 1]
    grouped = op("Gather", [padded, constant(columns.reshape(-1))], axis=1)
    grouped = operations.reshape(grouped, -1, *columns.shape)
    best, _ = graph.ops("TopK", [grouped, constant([_ranked(router)])], 2, axis=-1)
    rank = op("ReduceSum", [best, constant([-1])], keepdims=0)  # [T, G]
    _, groups = graph.ops("TopK", [rank, constant([router.top_groups])], 2, axis=-1)
    closed = op("Expand", [lowest, op("Shape", [rank])])
    zeros = op("Expand", [constant(0.0, np.float32), op("Shape", [groups])])
    mask = op("ScatterElements", [closed, groups, zeros], axis=-1)  # 0 in the best groups
    return op("Add", [choice, op("Gather", [mask, constant(group_of_row)], axis=1)])


def _ranked(router: RouterSpec) -> int:
    """How many of its best scores a group is ranked by."""
    return 1 if router.group_score == "best" else 2


def fewest_open_experts(routing: Routing) -> int:
    """How many kept experts the open groups hold where they are those with the fewest.

    A group that is too small to be ranked is open only where there are too few others.
    """
    router = routing.router
    _, counts = _groups(routing)
    ranked = counts[counts >= _ranked(router)]
    if len(ranked) < router.top_groups:
        ranked = counts
    return int(np.sort(ranked)[: router.top_groups].sum())


def group_columns(routing: Routing) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """([G, size] rows of each group's kept experts, [E] the group of each row).

    Missing members are row E, which is no expert; size is at least what groups are ranked by.
    """
    group_of_row, counts = _groups(routing)
    size = max(_ranked(routing.router), int(counts.max()))
    columns = np.full((len(counts), size), len(routing.kept), np.int64)
    for group in range(len(counts)):
        members = np.flatnonzero(group_of_row == group)
        columns[group, : len(members)] = members
    return columns, group_of_row


def _groups(routing: Routing) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """([E] the group of each row, [G] how many kept experts each group has)."""
    num_groups = routing.router.num_groups
    group_of_row = np.array(routing.kept, np.int64) // (routing.num_experts // num_groups)
    return group_of_row, np.bincount(group_of_row, minlength=num_groups)
