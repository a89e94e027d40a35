"""Which experts stay, and into which of them the others go. Router groups are never crossed.

A group-limited router (DeepSeek-V3) splits the experts into equal consecutive groups; every group
keeps the same number, and an expert joins only experts of its own group.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edge_moe.converters.transforms.base import BoolArray, FloatArray, LayerTask
from edge_moe.errors import InputError, TargetError
from edge_moe.saliency import keep_largest
from edge_moe.spec import ModelSpec

MIN_EXPERTS_PER_GROUP = 2  # a group's score is the sum of its best two


def check_num_experts(spec: ModelSpec, num_experts: int) -> None:
    """Refuse a number of experts that the router cannot work with.

    Raises:
        InputError: more than there are, or fewer than top_k.
        TargetError: the router's groups would become unequal or too small.
    """
    if not spec.top_k <= num_experts <= spec.num_experts:
        raise InputError(
            f"cannot keep {num_experts} experts per layer: the model has {spec.num_experts} and "
            f"chooses {spec.top_k} of them: use {spec.top_k} to {spec.num_experts}"
        )
    router = spec.router
    if router.num_groups == 1:
        return
    per_group, rest = divmod(num_experts, router.num_groups)
    if rest or per_group < MIN_EXPERTS_PER_GROUP or per_group * router.top_groups < spec.top_k:
        raise TargetError(
            f"cannot keep {num_experts} experts per layer: the router has {router.num_groups} "
            f"groups, which must stay equal, hold at least {MIN_EXPERTS_PER_GROUP} experts, and "
            f"{router.top_groups} of them at least top_k={spec.top_k}: use a larger multiple of "
            f"{router.num_groups}"
        )


def groups(task: LayerTask) -> Iterator[range]:
    """The expert ids of every router group."""
    num_groups = task.spec.router.num_groups
    width = task.weights.num_experts // num_groups
    for group in range(num_groups):
        yield range(group * width, (group + 1) * width)


def kept_by_score(task: LayerTask, scores: FloatArray) -> list[int]:
    """Ids of the N experts of largest score [E], super experts first, ascending.

    Raises:
        InputError: a layer, or a group of it, has more super experts than it may keep.
    """
    num_groups = task.spec.router.num_groups
    protected = task.is_protected()[None]
    mask = keep_largest(scores[None], task.num_experts, protected, num_groups)[0]
    return [int(index) for index in np.flatnonzero(mask)]


def receivers(task: LayerTask, kept: list[int]) -> BoolArray:
    """[E, E] whether expert row may go into expert column: kept, same group, not a super expert.

    Raises:
        InputError: an expert that goes has nowhere to go.
    """
    num_experts = task.weights.num_experts
    allowed = np.zeros((num_experts, num_experts), np.bool_)
    for group in groups(task):
        open_ids = [i for i in group if i in kept and not task.is_protected()[i]]
        allowed[np.ix_(list(group), open_ids)] = True
    gone = [i for i in range(num_experts) if i not in kept]
    if gone and not allowed[gone].any(axis=1).all():
        raise InputError(
            f"layer {task.layer_id}: all experts that stay are super experts, which nothing may "
            f"be merged into: keep more than {task.num_experts}"
        )
    return allowed


def join_most_similar(task: LayerTask, kept: list[int], similarity: FloatArray) -> list[list[int]]:
    """For every kept expert, itself and the experts most similar [E, E] to it, ascending."""
    allowed = receivers(task, kept)
    members = {expert_id: [expert_id] for expert_id in kept}
    for expert_id in range(task.weights.num_experts):
        if expert_id not in members:
            scores = np.where(allowed[expert_id], similarity[expert_id], -np.inf)
            members[int(scores.argmax())].append(expert_id)
    return list(members.values())
