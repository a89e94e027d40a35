"""How a token's experts are chosen, as config.json says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edge_moe.arch import Family
from edge_moe.config_reader import ConfigReader
from edge_moe.errors import SpecError


@dataclass(frozen=True)
class RouterSpec:
    """How a token's experts are chosen and weighted."""

    score_function: str
    """`softmax` over all experts, `sigmoid` per expert, or Phi's `sparsemixer`."""
    renormalises: bool
    """The chosen weights are divided by their sum."""
    has_selection_bias: bool
    """A correction bias decides the choice, but not the weight."""
    num_groups: int
    """Experts lie in this many equal groups; 1 means no group limit."""
    top_groups: int
    """Only experts of the best `top_groups` groups can be chosen."""
    scale: float
    """Factor on the final weights."""
    group_score: str = "best two"
    """What groups are ranked by: the sum of their `best two` scores, or their `best`."""
    jitter: float = 0.0
    """sparsemixer: logits further than twice this share below the largest get no weight."""

    def describe(self) -> str:
        """One line for people: `softmax, top-2 renormalised`."""
        parts = [self.score_function]
        if self.has_selection_bias:
            parts.append("selection bias")
        if self.num_groups > 1:
            parts.append(f"{self.top_groups} of {self.num_groups} groups")
        parts.append("renormalised" if self.renormalises else "not renormalised")
        if self.scale != 1.0:
            parts.append(f"scaled by {self.scale:g}")
        return ", ".join(parts)


def read_router(
    read: ConfigReader, config: dict[str, Any], family: Family, num_experts: int, top_k: int
) -> RouterSpec:
    """The router that config.json describes.

    Raises:
        SpecError: values that contradict each other or the experts.
    """
    num_groups = top_groups = 1
    if not family.ungrouped_method or read.text("topk_method") != family.ungrouped_method:
        num_groups = read.count("n_group", default=1)
        top_groups = read.count("topk_group", default=1)
    scale = config.get("routed_scaling_factor")
    if scale is not None and (not isinstance(scale, int | float) or not scale > 0):
        raise SpecError(
            f"{read.source}: routed_scaling_factor is {scale!r}, expected a number above 0: "
            "correct the file or download it again"
        )
    if num_experts % num_groups:
        raise SpecError(
            f"{read.source}: {num_experts} experts do not divide into n_group={num_groups} groups: "
            "correct the file or download it again"
        )
    if top_groups * (num_experts // num_groups) < top_k:
        raise SpecError(
            f"{read.source}: topk_group={top_groups} groups hold fewer than top_k={top_k} experts: "
            "correct the file or download it again"
        )
    return RouterSpec(
        score_function=family.score_function,
        renormalises=_renormalises(read, family),
        has_selection_bias=_has_selection_bias(read, family),
        num_groups=num_groups,
        top_groups=top_groups,
        scale=1.0 if scale is None else float(scale),
        group_score=family.group_score,
        jitter=read.number("router_jitter_noise"),
    )


def _renormalises(read: ConfigReader, family: Family) -> bool:
    if family.always_renormalises or family.never_renormalises:
        return family.always_renormalises
    return read.flag("norm_topk_prob")


def _has_selection_bias(read: ConfigReader, family: Family) -> bool:
    if not family.selection_bias:
        return False
    return not family.selection_bias_flag or read.flag(family.selection_bias_flag)
