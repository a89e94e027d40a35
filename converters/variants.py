"""Many plans of one checkpoint, scored by KL divergence in one pass over its layers.

A variant is the form of every expert. Each layer is loaded once; every variant runs through it with
its own packed-and-unpacked experts and sliced routers, so nothing is built or written. Variants
share their hidden states as long as their forms agree. Memory: two layers of experts in float32,
the packed experts of one layer within `PACKED_LIMIT_BYTES`, and the hidden states of all windows
once per distinct variant; `edge_moe.converters.search_memory` adds it up. The whole checkpoint is
run once, whatever the number of passes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edge_moe import metrics
from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.form_loss import is_lossless
from edge_moe.converters.layer_stream import LayerStream
from edge_moe.converters.loss_head import OutputHead
from edge_moe.converters.packer import Packer, PlainPacker
from edge_moe.converters.search_memory import BATCH_TOKENS, PACKED_LIMIT_BYTES
from edge_moe.converters.stacked_experts import STACKED, empty_stacks, put_expert
from edge_moe.formats import DROP, unpack_expert
from edge_moe.metrics import TokenScores
from edge_moe.runtime.moe_block import EXPERT_STACKS, select_experts

Forms = Sequence[Sequence[str]]
"""[L][E] form of every expert."""
Windows = Sequence[Sequence[int]]
_Row = tuple[str, ...]
_Path = tuple[_Row, ...]


class PackedExperts:
    """Packed experts of a checkpoint, kept until the byte limit pushes the oldest out."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        packer: Packer | None = None,
        limit_bytes: int = PACKED_LIMIT_BYTES,
    ) -> None:
        self._checkpoint = checkpoint
        self.packer = packer or PlainPacker(checkpoint)
        self._limit_bytes = limit_bytes
        self._num_bytes = 0
        self._records: OrderedDict[tuple[int, int, str], npt.NDArray[np.uint8]] = OrderedDict()

    def unpacked(self, layer_id: int, expert_id: int, form: str) -> tuple[Any, Any, Any]:
        """(gate_proj [I, H], up_proj [I, H], down_proj [H, I]) as the form holds them."""
        if is_lossless(form, self._checkpoint.expert_dtypes(layer_id, expert_id)):
            return self._checkpoint.expert(layer_id, expert_id)
        key = layer_id, expert_id, form
        if key not in self._records:
            self._add(key, self.packer.pack(layer_id, expert_id, form))
        self._records.move_to_end(key)
        spec = self._checkpoint.spec
        return unpack_expert(form, self._records[key], *spec.expert_shape)

    def _add(self, key: tuple[int, int, str], record: npt.NDArray[np.uint8]) -> None:
        self._records[key] = record
        self._num_bytes += record.nbytes
        while self._num_bytes > self._limit_bytes and len(self._records) > 1:
            _, dropped = self._records.popitem(last=False)
            self._num_bytes -= dropped.nbytes


class VariantScorer:
    """Scores plans of one checkpoint on the same windows, packing every expert once."""

    def __init__(
        self, checkpoint: Checkpoint, windows: Windows, packed: PackedExperts | None = None
    ) -> None:
        """`packed` may be shared by scorers of one checkpoint; by default packed as `nearest`."""
        self._checkpoint = checkpoint
        self._spec = checkpoint.spec
        self._windows = windows
        self._batches = _batches(windows)
        self._stream = LayerStream(checkpoint, STACKED)
        self._packed = packed or PackedExperts(checkpoint)
        self._reference: Sequence[Tensor] | None = None
        self._whole = _path([["whole"] * self._spec.num_experts] * self._spec.num_moe_layers)

    def score(
        self,
        variants: Mapping[str, Forms],
        on_run: Callable[[float], None] = lambda _: None,
        whole: Sequence[Tensor] | None = None,
    ) -> dict[str, TokenScores]:
        """Every variant beside the whole checkpoint. `on_run` is told the share of work done.

        `whole` is what `run_whole` of another scorer gave for the same windows: the reference then
        is that checkpoint, which must share this one's last norm and lm_head.

        Raises:
            CheckpointError: a layer is missing or computes NaN or infinity.
        """
        paths = {name: _path(forms) for name, forms in variants.items()}
        reference = whole or self._reference
        wanted = [*paths.values(), *(() if reference is not None else (self._whole,))]
        with torch.inference_mode():
            states = self._run_all(wanted, on_run)
            if reference is None:
                reference = self._reference = states[self._whole]
            return self._compare(states, paths, reference)

    def run_whole(self) -> Sequence[Tensor]:
        """[B, T, H] the whole checkpoint's last hidden states, one tensor per batch of windows."""
        if self._reference is None:
            with torch.inference_mode():
                self._reference = self._run_all([self._whole], lambda _: None)[self._whole]
        return self._reference

    def _run_all(
        self, wanted: Sequence[_Path], on_run: Callable[[float], None]
    ) -> dict[_Path, list[Tensor]]:
        """The last hidden states of every path."""
        states: dict[_Path, list[Tensor]] = {(): [self._embed(batch) for batch in self._batches]}
        for layer_id in range(self._spec.num_layers):
            states = self._layer(layer_id, states, wanted)
            on_run((layer_id + 1) / self._spec.num_layers)
        return states

    def _embed(self, batch: Sequence[int]) -> Tensor:
        return torch.cat([self._stream.embed(self._windows[index]) for index in batch])

    def _layer(
        self, layer_id: int, states: dict[_Path, list[Tensor]], wanted: Sequence[_Path]
    ) -> dict[_Path, list[Tensor]]:
        """The states after a layer; a MoE layer splits those whose forms differ in it."""
        with self._stream.loaded(layer_id):
            if layer_id not in self._spec.moe_layer_ids:
                return {path: self._run(layer_id, state) for path, state in states.items()}
            depth = self._spec.moe_layer_ids.index(layer_id) + 1
            found: dict[_Path, list[Tensor]] = {}
            for path in wanted:
                if path[:depth] not in found:
                    with self._forms(layer_id, path[depth - 1]):
                        state = self._run(layer_id, states[path[: depth - 1]])
                    found[path[:depth]] = state
            return found

    def _run(self, layer_id: int, state: list[Tensor]) -> list[Tensor]:
        return [self._stream.run(layer_id, hidden) for hidden in state]

    @contextmanager
    def _forms(self, layer_id: int, row: _Row) -> Iterator[None]:
        """The MoE block of a loaded layer with its experts stored as `row` says."""
        if set(row) == {"whole"}:
            yield
            return
        block = self._stream.moe_block(layer_id)
        kept = [expert_id for expert_id, form in enumerate(row) if form != DROP]
        rows, experts = block.tensors(), block.experts
        stacks = {name: getattr(experts, name) for name in EXPERT_STACKS}
        gate_up, down = self._experts(layer_id, row, kept)
        for name, value in rows.items():
            block.set_tensor(name, select_experts(value, kept))
        experts.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
        experts.down_proj = nn.Parameter(down, requires_grad=False)
        block.set_num_experts(len(kept))
        try:
            yield
        finally:
            for name, value in rows.items():
                block.set_tensor(name, value)
            for name, value in stacks.items():
                setattr(experts, name, value)
            block.set_num_experts(len(row))

    def _experts(self, layer_id: int, row: _Row, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(gate_up_proj [R, 2I, H], down_proj [R, H, I]) of the kept experts."""
        stacks = empty_stacks(self._spec, len(kept))
        for place, expert_id in enumerate(kept):
            put_expert(stacks, place, self._packed.unpacked(layer_id, expert_id, row[expert_id]))
        return stacks

    def _compare(
        self, states: dict[_Path, list[Tensor]], paths: Mapping[str, _Path], whole: Sequence[Tensor]
    ) -> dict[str, TokenScores]:
        norm, head = self._stream.final_norm(), OutputHead(self._checkpoint)
        wanted = set(paths.values())
        parts: dict[_Path, list[TokenScores]] = {path: [] for path in wanted}
        places = {
            index: (position, place)
            for position, batch in enumerate(self._batches)
            for place, index in enumerate(batch)
        }
        for index, window in enumerate(self._windows):
            position, place = places[index]
            targets = np.asarray(window[1:], dtype=np.int64)
            for rows in metrics.row_chunks(len(targets), len(head.weight)):
                base = head.logits(norm(whole[position][place, rows])).numpy()
                reference = metrics.Reference.of(base)
                for path in wanted:
                    state = states[path][position][place, rows]
                    logits = head.logits(norm(state)).numpy()
                    parts[path].append(reference.scores(logits, targets[rows]))
        joined = {path: TokenScores.join(found) for path, found in parts.items()}
        return {name: joined[path] for name, path in paths.items()}


def _path(forms: Forms) -> _Path:
    return tuple(tuple(row) for row in forms)


def _batches(windows: Windows) -> list[list[int]]:
    """Indices of windows of equal length, as many together as `BATCH_TOKENS` allow."""
    batches: list[list[int]] = []
    for index in sorted(range(len(windows)), key=lambda each: (len(windows[each]), each)):
        length = len(windows[index])
        fits = batches and len(windows[batches[-1][0]]) == length
        if fits and (len(batches[-1]) + 1) * length <= BATCH_TOKENS:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
