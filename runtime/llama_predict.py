"""Which experts the next layer will probably choose: its router, asked about this layer's input.

llama.cpp names its nodes before it computes them, so their addresses are known when a router has
chosen: the input of this MoE block is still there, and the next router's matrix always is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edge_moe.gguf_model import GgufModel
from edge_moe.runtime.llama_api import LlamaApi
from edge_moe.runtime.llama_graph import ARCHITECTURES

FloatArray = npt.NDArray[np.float32]


@dataclass
class NextRouter:
    """Guesses for single tokens. Letters: H hidden_size, E experts, k top_k."""

    api: LlamaApi
    model: GgufModel
    num_guesses: int
    """Experts that are named, the likeliest first; k, or more for a wider net."""
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

    def guess(self, layer: int) -> list[int]:
        """Experts that layer `layer` + 1 may choose; none where nothing is known."""
        node, matrix = self._inputs.get(layer), self._routers.get(layer + 1)
        if node is None or matrix is None:
            return []
        hidden = self.api.row(node, matrix.shape[1])
        if hidden is None:
            return []
        logits = matrix @ hidden
        count = min(self.num_guesses, len(logits))
        best = np.argpartition(-logits, count - 1)[:count]
        guessed: list[int] = best[np.argsort(-logits[best], kind="stable")].tolist()
        return guessed

    def _matrix(self, layer: int, node: int) -> FloatArray | None:
        name = f"blk.{self._layer_ids[layer]}.ffn_gate_inp.weight"
        shape = self.model.spec.num_experts, self.model.spec.hidden_size
        return self.api.float32_source(node, name, shape)
