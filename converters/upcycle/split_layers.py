"""A dense FFN's neurons in the places of a MoE block, read when they are written.

Experts' down_proj is stored times the inverse of what each is weighted by with equal scores: with
all of them chosen, and a router whose tilt is bounded, the block computes what the FFN does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
from torch import Tensor

from edge_moe.converters.safetensors_writer import TensorEntry
from edge_moe.converters.upcycle.dense_model import DenseModel
from edge_moe.converters.upcycle.split_layer import SplitLayer
from edge_moe.converters.upcycle.stored_tensor import StoredTensor, from_values
from edge_moe.converters.upcycle.target import Matrices, MoeLayer, MoeShape, Target
from edge_moe.tensor_info import FloatArray

FfnReader = Callable[[], tuple[FloatArray, FloatArray, FloatArray]]
"""gate_proj [F, H], up_proj [F, H], down_proj [H, F] of a dense layer, as float32."""


def split_layers(
    dense: DenseModel, target: Target, shape: MoeShape, layers: Sequence[SplitLayer]
) -> list[MoeLayer]:
    """Every MoE block. Memory: the FFN of one layer in float32."""

    @lru_cache(maxsize=1)
    def read(layer_id: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        gate, up, down = (matrix.read() for matrix in dense.ffn(layer_id))
        return gate, up, down

    factor = 1 / target.equal_weight(shape.num_experts)
    return [
        split_block(partial(read, layer_id), dense.ffn(layer_id), layer, factor)
        for layer_id, layer in enumerate(layers)
    ]


def split_block(read: FfnReader, ffn: Matrices, layer: SplitLayer, factor: float) -> MoeLayer:
    """One MoE block, whose matrices are stored in the dtypes of the `ffn` that `read` gives.

    `factor` is what experts' down_proj is multiplied by.
    """
    hidden_size = layer.router.shape[1]
    of_gate, of_up, of_down = (matrix.dtype for matrix in ffn)

    def matrices(neurons: Tensor, times: float) -> Matrices:
        rows = neurons.numpy()
        wide, tall = (len(rows), hidden_size), (hidden_size, len(rows))
        return (
            StoredTensor(TensorEntry("", of_gate, wide), lambda: read()[0][rows]),
            StoredTensor(TensorEntry("", of_up, wide), lambda: read()[1][rows]),
            StoredTensor(
                TensorEntry("", of_down, tall), lambda: read()[2][:, rows] * np.float32(times)
            ),
        )

    experts = [matrices(neurons, factor) for neurons in layer.split.experts]
    router = from_values("", "F32", layer.router.numpy())
    return MoeLayer(router, matrices(layer.split.shared, 1.0), experts)
