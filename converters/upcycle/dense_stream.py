"""Decoder layers of a dense model, loaded and run one at a time: what its FFNs are given.

The layers around the FFNs are those of the MoE architecture that the model becomes, which hold it
exactly. Letters: W tokens of a window, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from edge_moe.converters.layer_stream import LayerRunner, aligned
from edge_moe.converters.upcycle.dense_model import EMBEDDING, DenseModel
from edge_moe.converters.upcycle.moe_modules import empty_model
from edge_moe.converters.upcycle.split_neurons import DenseFfn
from edge_moe.converters.upcycle.target import MoeShape, Target
from edge_moe.errors import CheckpointError, InputError


class _WatchedFfn(nn.Module):
    """In the place of a MoE block: the dense FFN, which keeps its input."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn: DenseFfn | None = None
        self.inputs: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        assert self.ffn is not None
        self.inputs = hidden.flatten(0, -2)
        return self.ffn.output(hidden)


class DenseStream(LayerRunner):
    """In float32 on the CPU. Memory: one layer, and the embedding while windows are embedded."""

    def __init__(self, dense: DenseModel, target: Target, shape: MoeShape) -> None:
        """Build the model without weights."""
        model = empty_model(dense, target, shape, is_tied=False)
        for layer in model.base_model.layers:
            layer.mlp = _WatchedFfn()
        super().__init__(model.base_model, "norm", dense.location)
        self._dense = dense

    def embed(self, windows: Sequence[Sequence[int]]) -> list[Tensor]:
        """What enters layer 0, [1, W, H] of every window.

        Raises:
            InputError: a token id outside the embedding table.
        """
        table = torch.from_numpy(self._dense.tensors[EMBEDDING].read())
        highest = max(map(max, windows))
        if highest >= len(table):
            raise InputError(
                f"token id {highest} is outside the model's {len(table)} embedding rows: "
                "the tokenizer does not belong to this model"
            )
        return [table[torch.tensor(list(window))][None] for window in windows]

    @contextmanager
    def loaded(self, layer_id: int) -> Iterator[DenseFfn]:
        """Layer `layer_id` with its weights, of which the FFN's are given.

        Raises:
            CheckpointError: NaN or infinity in them.
        """
        layer = self._layers[layer_id]
        prefix = f"model.layers.{layer_id}."
        state = {}
        for name in [each for each in self._dense.tensors if each.startswith(prefix)]:
            values = self._dense.tensors[name].read()
            state[name.removeprefix(prefix)] = aligned(values)
            if not torch.isfinite(state[name.removeprefix(prefix)]).all():
                raise CheckpointError(
                    f"{self._location}: {name!r} holds NaN or infinity: download the file again"
                )
        gate, up, down = (state.pop(f"mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
        layer.load_state_dict(state, assign=True)
        layer.mlp.ffn = DenseFfn(gate, up, down)
        try:
            yield layer.mlp.ffn
        finally:
            layer.to(device="meta")
            layer.mlp.ffn = layer.mlp.inputs = None

    def ffn_inputs(self, layer_id: int, hidden: list[Tensor]) -> Tensor:
        """[T, H] of all windows, which go through the loaded layer: `hidden` is what leaves it.

        Raises:
            CheckpointError: the result holds NaN or infinity.
        """
        found = []
        for index, window in enumerate(hidden):
            hidden[index] = self.run(layer_id, window)
            found.append(self._layers[layer_id].mlp.inputs)
        return torch.cat(found)
