"""Which experts the next layer will probably choose: its router, asked about this layer's input.

llama.cpp names its nodes before it computes them, so their addresses are known when a router has
chosen: the input of this MoE block is still there, and the next router's matrix always is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edge_moe.gguf_model import GgufModel
from edge_moe.runtime.llama_api import LlamaApi
from edge_moe.runtime.llama_graph import ARCHITECTURES
from edge_moe.runtime.predictors import Predictor, largest_logits

_SHORT = 16
"""Characters of a node's name that tell it from nearly all others."""

FloatArray = npt.NDArray[np.float32]


@dataclass
class BlockInputs:
    """What every MoE block is given, and the routers. Letters: H hidden_size, E experts."""

    api: LlamaApi
    model: GgufModel
    _inputs: dict[int, int] = field(default_factory=dict)
    """By layer: the node that its MoE block is given."""
    _routers: dict[int, FloatArray | None] = field(default_factory=dict)
    """By layer: [E, H] in llama.cpp's own memory; None where it is not float32 there."""

    def __post_init__(self) -> None:
        names = ARCHITECTURES.get(self.model.header.architecture)
        self._layer_ids = sorted(self.model.layers)
        self._names: dict[str, tuple[bool, int]] = {}
        if names is None:
            return
        for layer, layer_id in enumerate(self._layer_ids):
            inputs = names.inputs.format(layer_id)
            self._names[f"{inputs}-{layer_id}"] = True, layer
            self._names[f"{names.logits}-{layer_id}"] = False, layer

    @property
    def beginnings(self) -> tuple[bytes, ...]:
        """How the names of the nodes that `see` wants begin."""
        return tuple({name.rpartition("-")[0][:_SHORT].encode() for name in self._names})

    def see(self, name: str, node: int) -> None:
        """llama.cpp is about to compute `node`."""
        found = self._names.get(name)
        if found is None:
            return
        is_input, layer = found
        if is_input:
            self._inputs[layer] = node
        elif layer not in self._routers:
            self._routers[layer] = self._matrix(layer, node)

    def state(self, layer: int) -> FloatArray | None:
        """[H] what the MoE block of `layer` is given; None where it is not known."""
        node = self._inputs.get(layer)
        return None if node is None else self.api.row(node, self.model.spec.hidden_size)

    def logits(self, layer: int, state: FloatArray) -> FloatArray | None:
        """[E] what the router of `layer` makes of `state`; None before it was seen."""
        matrix = self._routers.get(layer)
        return None if matrix is None else matrix @ state

    def _matrix(self, layer: int, node: int) -> FloatArray | None:
        name = f"blk.{self._layer_ids[layer]}.ffn_gate_inp.weight"
        shape = self.model.spec.num_experts, self.model.spec.hidden_size
        return self.api.float32_source(node, name, shape)


class NextRouter(Predictor):
    """The next router's largest logits."""

    def __init__(self, inputs: BlockInputs, width: int) -> None:
        """`width` experts are named, the likeliest first; top_k, or more for a wider net."""
        self.name = f"next router {width}"
        self._inputs = inputs
        self._width = width

    def learn(self, layer: int, rows: Sequence[int]) -> None:
        """Nothing to learn."""

    def guess(self, layer: int, rows: Sequence[int] = ()) -> list[int]:
        """Experts that layer `layer` + 1 may choose; none where nothing is known."""
        state = self._inputs.state(layer)
        logits = None if state is None else self._inputs.logits(layer + 1, state)
        return [] if logits is None else largest_logits(logits, self._width)
