"""The gradient of the language-model loss at the output of every MoE block, layer by layer.

Forward: every layer is loaded once and its input hidden states are written to disk. Then the loss.
Backward: the layers are loaded once more, from the last to the first MoE layer; each is run again
from its stored input, and the gradient that came from above is pulled through it.

The loss is the sum of the next-token cross-entropies of one window, in nats (see
`edge_moe.gradient_stats`). Memory: one layer in float32 and the activations of one window.
Disk: (layers + 2) x 4H bytes per token. Cost: about four forward passes.
Letters: T tokens of one window, H hidden_size, k top_k, K = k + 1 slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.calibration_work import HiddenWriter
from edge_moe.converters.gradient_work import GradientWork
from edge_moe.converters.layer_stream import LayerStream
from edge_moe.converters.loss_head import LossHead
from edge_moe.converters.observe import OBSERVE, BlockObserver
from edge_moe.converters.rerouting import Slots
from edge_moe.gradient_stats import GradientInfo
from edge_moe.runtime.moe_block import expert_output


@dataclass(frozen=True)
class BlockGradient:
    """One window in one MoE layer: what the block was given, what it did, what the loss says."""

    inputs: Tensor
    """[T, H] what the block was given."""
    slots: Slots
    """The chosen experts of every token and the next-best one, with their weights."""
    outputs: Tensor
    """[T, K, H] un-gated output of every slot's expert; zero in an empty slot."""
    gradient: Tensor
    """[T, H] float32, d(loss)/d(output of the MoE block)."""

    @property
    def expert_ids(self) -> Tensor:
        """[T, k]"""
        return self.slots.expert_ids[:, : self.slots.top_k]

    @property
    def gates(self) -> Tensor:
        """[T, k] float64 real weights."""
        return self.slots.gates[:, : self.slots.top_k]


@dataclass(frozen=True)
class LayerGradients:
    """One MoE layer while its weights are in memory."""

    layer_id: int
    block: Any
    """transformers' MoE block, with its weights."""
    windows: Iterator[BlockGradient]
    """Every window in turn; each is computed when it is asked for, and kept by nobody."""


class GradientStream:
    """Loss gradients of all windows, from the last MoE layer to the first. Resumable by layer."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        info: GradientInfo,
        work: GradientWork,
        texts: Sequence[Sequence[int]],
        on_window: Callable[[], None] = lambda: None,
    ) -> None:
        """`texts` are the windows `info.windows`; `on_window` is called when one passed a layer."""
        self._checkpoint = checkpoint
        self._info = info
        self._work = work
        self._texts = texts
        self._on_window = on_window
        self._stream = LayerStream(checkpoint, OBSERVE)

    def layers(self) -> Iterator[LayerGradients]:
        """Every MoE layer that is not done yet.

        A layer counts as done when the next one is asked for, so save what you made of it before.
        """
        spec = self._checkpoint.spec
        if self._work.last_gradient is None:
            self._forward()
            self._loss()
        done = self._work.last_gradient
        lowest = spec.moe_layer_ids[0]
        for layer_id in reversed(range(lowest, spec.num_layers if done is None else done)):
            with (
                self._stream.loaded(layer_id),
                self._work.committing_gradient(layer_id) as writer,
            ):
                if layer_id in spec.moe_layer_ids:
                    windows = self._moe_windows(layer_id, writer)
                    yield LayerGradients(layer_id, self._stream.moe_block(layer_id), windows)
                    for _ in windows:
                        pass
                else:
                    self._dense_layer(layer_id, writer)

    def _forward(self) -> None:
        """Write the hidden states that enter every layer, and those that leave the last."""
        work, num_windows = self._work, len(self._texts)
        if work.last_hidden is None:
            with work.committing_hidden(0) as writer:
                for text in self._texts:
                    writer.write(self._stream.embed(text))
        for layer_id in range(work.last_hidden or 0, self._checkpoint.spec.num_layers):
            hidden = work.hidden(layer_id)
            with self._stream.loaded(layer_id), work.committing_hidden(layer_id + 1) as writer:
                with self._watching(layer_id), torch.no_grad():
                    for index in range(num_windows):
                        writer.write(self._stream.run(layer_id, hidden.read(index)))
                        self._on_window()

    def _loss(self) -> None:
        """The loss of every window, and its gradient at the end of the last layer."""
        num_layers = self._checkpoint.spec.num_layers
        head = LossHead(self._checkpoint, self._stream.final_norm(), self._info.labels)
        hidden, losses = self._work.hidden(num_layers), []
        with self._work.committing_gradient(num_layers) as writer:
            for index, (text, window_id) in enumerate(
                zip(self._texts, self._info.windows, strict=True)
            ):
                gradient, loss_nats = head.gradient(hidden.read(index), text, window_id)
                writer.write(gradient)
                losses.append(loss_nats)
                self._on_window()
            self._work.save_loss(losses)

    def _moe_windows(self, layer_id: int, writer: HiddenWriter) -> Iterator[BlockGradient]:
        block = self._stream.moe_block(layer_id)
        with GradientObserver(block, self._checkpoint.spec) as observer:
            for leaf, output, upstream in self._runs(layer_id):
                seen = observer.take_window()
                below, gradient = torch.autograd.grad(output, (leaf, seen.block_output), upstream)
                writer.write(below)
                self._on_window()
                yield BlockGradient(
                    inputs=seen.inputs,
                    slots=seen.slots,
                    outputs=seen.outputs,
                    gradient=gradient.reshape(seen.inputs.shape),
                )

    def _watching(self, layer_id: int) -> AbstractContextManager[object]:
        """The experts need an observer to run at all; dense layers have none."""
        if layer_id not in self._info.moe_layer_ids:
            return nullcontext()
        return GradientObserver(self._stream.moe_block(layer_id), self._checkpoint.spec)

    def _dense_layer(self, layer_id: int, writer: HiddenWriter) -> None:
        for leaf, output, upstream in self._runs(layer_id):
            writer.write(torch.autograd.grad(output, leaf, upstream)[0])
            self._on_window()

    def _runs(self, layer_id: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(input that asks for a gradient, output, gradient of the output) of every window."""
        hidden, upstream = self._work.hidden(layer_id), self._work.gradient(layer_id + 1)
        for index in range(len(self._texts)):
            leaf = hidden.read(index).requires_grad_()
            with torch.enable_grad():
                output = self._stream.run(layer_id, leaf)
            yield leaf, output, upstream.read(index)


@dataclass(frozen=True)
class _Seen:
    """A forward pass of the block; everything but `block_output` is cut off from autograd."""

    inputs: Tensor
    slots: Slots
    outputs: Tensor
    block_output: Tensor


class GradientObserver(BlockObserver):
    """Keeps the block's output inside autograd's graph, and what the block did to get there."""

    _pending: tuple[Tensor, Slots, Tensor] | None = None
    _block_output: Tensor | None = None

    def take_window(self) -> _Seen:
        """The last forward pass, which is then forgotten."""
        if self._pending is None or self._block_output is None:
            raise RuntimeError("the MoE block was not run through the experts interface")
        seen = _Seen(*self._pending, self._block_output)
        self._pending = self._block_output = None
        return seen

    def _record(self, hidden: Tensor, slots: Slots, outputs: Tensor) -> None:
        self._pending = hidden.detach(), slots.detached(), outputs.detach()

    def _after_block(self, block: nn.Module, arguments: object, output: Any) -> None:
        self._block_output = output[0] if isinstance(output, tuple) else output

    def _slot_outputs(self, hidden: Tensor, expert_ids: Tensor) -> Tensor:
        """[T, K, H] as the base class computes it, written once.

        Every write into a tensor that autograd watches copies its whole gradient on the way back.
        """
        tokens, slots, parts = [], [], []
        for expert_id in np.unique(expert_ids[expert_ids >= 0].numpy()):
            token, slot = (expert_ids == expert_id).nonzero(as_tuple=True)
            gate_up = self._experts.gate_up_proj[expert_id]
            down = self._experts.down_proj[expert_id]
            parts.append(expert_output(self._experts, hidden[token], gate_up, down, int(expert_id)))
            tokens.append(token)
            slots.append(slot)
        empty = hidden.new_zeros(*expert_ids.shape, hidden.shape[1])
        return empty.index_put((torch.cat(tokens), torch.cat(slots)), torch.cat(parts))
