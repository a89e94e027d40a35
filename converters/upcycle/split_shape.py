"""How wide the experts of a split FFN are: what is left to them is always on."""

from __future__ import annotations

from edge_moe.converters.upcycle.dense_config import DenseConfig
from edge_moe.converters.upcycle.target import MoeShape, Target
from edge_moe.errors import InputError

_SHARED_SHARE = 0.25
"""Of the neurons, at least, where nobody says."""
_PREFERRED = (256, 64, 32, 8, 1)
"""Expert widths that are multiples of these: rows that K-quants, then older blocks, fit."""


def split_shape(
    config: DenseConfig, target: Target, num_experts: int, top_k: int, expert_width: int | None
) -> MoeShape:
    """Experts of `expert_width` neurons, or as wide as leaves a quarter to the shared expert.

    Raises:
        InputError: numbers that the FFN does not divide into, or that would lose bits.
    """
    width = config.ffn_width
    if num_experts < 2:
        raise InputError(f"--experts is {num_experts}: a split needs at least 2")
    factor = 1 / target.equal_weight(num_experts)
    if factor != int(factor) or int(factor) & (int(factor) - 1):
        raise InputError(
            f"--experts is {num_experts}: {target.architecture} weighs each by 1/{num_experts}, "
            "which only a power of two makes up for without losing bits; use 4, 8, 16, ..."
        )
    found = _width(config, target, num_experts) if expert_width is None else expert_width
    if found < 1 or num_experts * found >= width:
        raise InputError(
            f"{num_experts} experts of {found} neurons leave none of {width} always on: use fewer "
            "--experts or a smaller --expert-width"
        )
    shape = MoeShape(num_experts, top_k, found, width - num_experts * found)
    target.check(shape)
    return shape


def _width(config: DenseConfig, target: Target, num_experts: int) -> int:
    """The widest that leave the shared expert its share, in the largest step that fits."""
    width = config.ffn_width
    most = int((1 - _SHARED_SHARE) * width / num_experts)
    for step in _PREFERRED:
        for found in range(most - most % step, most // 2, -step):
            if not target.needs_whole_shared or (width - num_experts * found) % found == 0:
                return found
    return most
