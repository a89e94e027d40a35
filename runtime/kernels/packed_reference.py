"""What the Triton kernels compute, in torch: matrices unpacked to float32, one pair at a time.

Letters: T inputs, R pairs of an input and a matrix, N outputs of a pair, W width of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from edge_moe.runtime.kernels.unpack import unpack

Tensor = torch.Tensor


def packed_products(
    inputs: Tensor, tokens: Tensor, matrices: Sequence[tuple[str, Tensor]], *, is_gated: bool
) -> Tensor:
    """Reference of `triton_decode.decode` and `triton_prefill.prefill`.

    Args:
        inputs: float [T, W].
        tokens: int64 [R], row of `inputs` of each pair.
        matrices: R pairs of a type's name and uint8 [N, row bytes], or [2N, row bytes] if gated.

    Returns: float32 [R, N]
    """
    width = inputs.shape[1]
    found = []
    for token, (form, packed) in zip(tokens.tolist(), matrices, strict=True):
        products = unpack(form, packed, width) @ inputs[token].float()
        if is_gated:
            gate, up = products.chunk(2)
            products = F.silu(gate) * up
        found.append(products)
    return torch.stack(found)


def add_weighted(
    outputs: Tensor, results: Tensor, places: Tensor, scales: Tensor, first: int
) -> None:
    """Reference of `triton_sum.add_weighted`, with its arguments."""
    for token, numbers in enumerate(places.tolist()):
        for number in numbers:
            if first <= number < first + len(results):
                outputs[token] += scales[number] * results[number - first].float()
