"""`ExpertUses`: which node of llama.cpp's graph multiplies by which experts' matrix.

A layer's matrices are used one after the other. So what a router chose is waited for matrix by
matrix, and the later ones are read while the earlier ones compute.
"""

from __future__ import annotations

from edge_moe.errors import InputError
from edge_moe.gguf_model import GgufModel
from edge_moe.runtime.gguf_experts import GgufExperts
from edge_moe.runtime.gguf_slices import layer_stacks
from edge_moe.runtime.llama_api import LlamaApi
from edge_moe.runtime.llama_region import ExpertRegion


class ExpertUses:
    """Learned from the first graph, in which every layer waits for all that it needs."""

    def __init__(
        self, api: LlamaApi, region: ExpertRegion, experts: GgufExperts, model: GgufModel
    ) -> None:
        self._api = api
        self._experts = experts
        self._path = model.path
        self._places: dict[int | None, tuple[int, int]] = {
            region.tensor(info.name): (layer, index)
            for layer, layer_id in enumerate(experts.layer_ids)
            for index, info in enumerate(layer_stacks(model, layer_id))
        }
        self._counts = [len(layer_stacks(model, layer_id)) for layer_id in experts.layer_ids]
        self._is_known = [False] * len(self._counts)
        self._order: list[int] = []
        """Matrices used since the last router, in the order of their use."""
        self._layer: int | None = None
        """... which was this layer's."""
        self._before: dict[str, int] = {}
        """Names of nodes behind which a matrix of their layer is used, and which."""
        self._last_name = ""

    def forget(self) -> None:
        """Another graph begins; what came of the last does not matter."""
        self._layer = None

    def begin(self, layer: int) -> bool:
        """The router of `layer` has chosen: whether its matrices are waited for one by one.

        Raises:
            InputError: `end`'s.
        """
        self.end()
        self._layer, self._order = layer, []
        return self._is_known[layer]

    def end(self) -> None:
        """The graph goes on behind the last layer.

        Raises:
            InputError: a matrix was used by a node that was not seen.
        """
        layer, self._layer = self._layer, None
        if layer is None:
            return
        is_whole = len(self._order) == self._counts[layer]
        if is_whole and not self._is_known[layer]:
            self._is_known[layer] = True
            self._experts.set_order(layer, self._order)
        if not is_whole and self._is_known[layer]:
            raise InputError(
                f"{self._path}: llama.cpp's graph has changed in layer "
                f"{self._experts.layer_ids[layer]}: give a budget that holds all experts"
            )

    def must_stop_after(self, name: str, node: int) -> bool:
        """llama.cpp is about to compute `node`: wait for the experts that it uses.

        Returns whether it is to compute all up to this node before it asks for the next, because
        experts of the next are not there yet.

        Raises:
            CheckpointError, OSError: they cannot be read.
        """
        place = self._places.get(self._api.first_source(node))
        last_name, self._last_name = self._last_name, name
        if place is not None and place[0] == self._layer and place[1] not in self._order:
            index = place[1]
            self._experts.wait(index)
            if self._order:  # before the first, there is next to nothing to compute
                self._before[last_name] = index
            self._order.append(index)
        following = self._before.get(name)
        return following is not None and self._experts.is_late(following)
