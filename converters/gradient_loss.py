"""Checkpoint + task text -> GradientStats: what the loss gradient says about experts and neurons.

    form costs    diagonal (GEMQ) and first-order cost of every expert in every form
    neurons       sums from which HEAPr's scores follow
    layers        mean squared gradient

Cost per token and MoE layer, beside the gradient stream's: as for calibration's forms, and
2HI x k x 2 for the neurons. Memory: `gradient_terms`. Every window is rounded once to a fixed grid
(see `exact_sum`), so shards merge bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.block_sums import mix
from edge_moe.converters.calibrate import calibration_text
from edge_moe.converters.calibration_memory import hidden_file_bytes, state_and_require_memory
from edge_moe.converters.calibration_request import checked_forms
from edge_moe.converters.form_loss import CheckpointExperts, FormLosses
from edge_moe.converters.gradient_memory import gradient_terms
from edge_moe.converters.gradient_stream import BlockGradient, GradientStream, LayerGradients
from edge_moe.converters.gradient_work import GradientWork, gradient_work, require_no_gradients
from edge_moe.converters.observe import router_scores_of
from edge_moe.converters.progress import progress_bar
from edge_moe.converters.rerouting import weight_changes
from edge_moe.errors import CheckpointError, InputError
from edge_moe.files import require_free_disk
from edge_moe.formats import DROP
from edge_moe.gradient_stats import (
    GRADIENT_VERSION,
    FormCost,
    GradientInfo,
    GradientStats,
    Labels,
)
from edge_moe.runtime.moe_block import expert_inner
from edge_moe.stats import ExpertStats


def measure_gradients(
    model: Path,
    tasks: Sequence[str],
    output: Path,
    *,
    window_tokens: int = 512,
    max_windows: int | None = None,
    shard: tuple[int, int] = (0, 1),
    forms: Sequence[str] | None = None,
    quantiser: str | None = None,
    labels: Labels = "text",
) -> GradientStats:
    """Measure the loss gradient at every expert of `model` on the calibration text of `tasks`.

    Writes `gradient.json` and `gradient.safetensors` into the folder `output`, which may already
    hold the statistics of a calibration, and returns what they hold. A killed run goes on where it
    stopped when it is started again with the same arguments. Arguments are those of `calibrate`;
    `labels` says whether the loss asks for the text's own next token or for one that is drawn from
    the model's prediction (the Fisher information, to which KL divergence answers).

    Raises:
        EdgeMoeError: bad model, text, option or output, or not enough memory or disk.
    """
    require_no_gradients(output)
    checkpoint = Checkpoint(model)
    spec = checkpoint.spec
    if spec.latent_width:
        raise InputError(
            f"{spec.model_type}'s experts work on a latent state of {spec.latent_width} values, "
            "whose loss gradients are not measured: calibrate without --gradients"
        )
    base, texts = calibration_text(
        checkpoint, tasks, window_tokens, max_windows, shard, checked_forms(spec, forms), quantiser
    )
    info = GradientInfo(
        **base.model_dump(exclude={"version"}),
        version=GRADIENT_VERSION,
        labels=labels,
        hidden_size=spec.hidden_size,
        expert_width=spec.expert_width,
    )
    if ExpertStats.settings_path(output).exists():
        info.require_same_run(ExpertStats.load(output).info)
    _require_room(checkpoint, info, output, max(map(len, texts)))
    with gradient_work(output, info, [len(text) for text in texts]) as work:
        stats = _Run(checkpoint, info, work, texts).finish()
        stats.save(output)
        work.remove()
    return stats


class _Run:
    """One pass forward and back over the layers that are not done yet."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        info: GradientInfo,
        work: GradientWork,
        texts: Sequence[Sequence[int]],
    ) -> None:
        self._checkpoint = checkpoint
        self._info = info
        self._work = work
        self._num_windows = len(texts)
        self._progress = progress_bar()
        self._bar = self._progress.add_task("gradients, forward", total=self._total_units())
        self._stream = GradientStream(
            checkpoint, info, work, texts, lambda: self._progress.advance(self._bar)
        )
        self._form_losses = FormLosses(CheckpointExperts(checkpoint), info.forms, info.quantiser)

    def finish(self) -> GradientStats:
        """The statistics of all layers."""
        with self._progress:
            self._progress.advance(self._bar, self._done_units())
            for layer in self._stream.layers():
                self._progress.update(
                    self._bar, description=f"gradients, layer {layer.layer_id + 1}"
                )
                try:
                    self._work.save_layer(self._measure(layer))
                except OverflowError as error:
                    raise CheckpointError(
                        f"{self._checkpoint.folder}: layer {layer.layer_id}: {error}; "
                        "its weights are damaged"
                    ) from None
        return self._work.collect()

    def _total_units(self) -> float:
        """A unit is a window in a layer, forwards, backwards or in one form."""
        return self._num_windows * (self._checkpoint.spec.num_layers + 1) + self._backward_units(
            self._checkpoint.spec.num_layers
        )

    def _backward_units(self, num_layers: int) -> float:
        """Of those of the lowest `num_layers` layers that are run backwards."""
        layer_ids = range(self._info.moe_layer_ids[0], num_layers)
        num_moe = sum(layer_id in self._info.moe_layer_ids for layer_id in layer_ids)
        return self._num_windows * (len(layer_ids) + num_moe * len(self._info.forms))

    def _done_units(self) -> float:
        if self._work.last_gradient is None:
            return self._num_windows * (self._work.last_hidden or 0)
        return self._total_units() - self._backward_units(self._work.last_gradient)

    def _measure(self, layer: LayerGradients) -> GradientStats:
        """All sums of one layer."""
        stats, spec = self._work.layer_zeros(layer.layer_id), self._checkpoint.spec
        kept = []
        for window in layer.windows:
            stats.gradient_square.add(float(window.gradient.double().square().sum()), index=0)
            _add_drops(stats, window, self._checkpoint)
            kept.append(_Kept(window.inputs, window.expert_ids, window.gates, window.gradient))
        for expert_id in range(self._info.num_experts):
            for rest in kept:
                _add_neurons(stats, layer.block.experts, expert_id, rest)
        step = self._num_windows * len(self._info.forms) / self._info.num_experts
        changes = self._form_losses.changes(
            layer.layer_id,
            layer.block.experts,
            kept,
            lambda: self._progress.advance(self._bar, step),
            lambda: [router_scores_of(layer.block, each.inputs, spec) for each in kept],
        )
        for each in changes:
            change = each.gates[:, None] * each.change
            costs = token_costs(kept[each.window].gradient[each.token].double(), change)
            totals = {kind: float(cost.sum()) for kind, cost in costs.items()}
            totals[FormCost.OUTPUT_CHANGE] = each.loss  # to the last bit what calibration sums
            for kind, total in totals.items():
                stats.form_cost[kind].add(total, index=(0, each.expert_id, each.form))
        return stats


@dataclass(frozen=True)
class _Kept:
    """What remains of a window until the whole layer is measured; see `RoutedWindow`."""

    inputs: Tensor
    expert_ids: Tensor
    gates: Tensor
    gradient: Tensor


def token_costs(gradient: Tensor, change: Tensor) -> dict[FormCost, Tensor]:
    """Costs [n] of changing the MoE output by `change` [n, H], where its gradient is `gradient`.

    Both float64, one row per token; `change` contains the gate.
    """
    product = gradient * change
    return {
        FormCost.OUTPUT_CHANGE: change.square().sum(dim=1),
        FormCost.DIAGONAL: product.square().sum(dim=1),
        FormCost.FIRST_ORDER: product.sum(dim=1).square(),
    }


def neuron_squares(
    experts: Any, expert_id: int, inputs: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """(h**2, (g . w)**2), float64 [n, I] each, of every neuron of one expert.

    `inputs` [n, H] are tokens that chose the expert, `gradient` [n, H] that of the loss at the
    expert's own un-gated output. h is what a neuron gives to down_proj, w its column there.
    """
    hidden = expert_inner(experts, inputs, experts.gate_up_proj[expert_id], expert_id)
    along = gradient @ experts.down_proj[expert_id]
    return hidden.double().square(), along.double().square()


def _add_neurons(stats: GradientStats, experts: Any, expert_id: int, window: _Kept) -> None:
    token, slot = (window.expert_ids == expert_id).nonzero(as_tuple=True)
    if not len(token):
        return
    gradient = window.gates[token, slot].float()[:, None] * window.gradient[token]
    hidden, along = neuron_squares(experts, expert_id, window.inputs[token], gradient)
    stats.routed_tokens[0, expert_id] += len(token)
    stats.neuron["hidden_square"].add(hidden.sum(dim=0).numpy(), index=(0, expert_id))
    stats.neuron["gradient_square"].add(along.sum(dim=0).numpy(), index=(0, expert_id))


def _add_drops(stats: GradientStats, window: BlockGradient, checkpoint: Checkpoint) -> None:
    """Add what it costs to drop each expert, when the router chooses again without it."""
    spec = checkpoint.spec
    changes = weight_changes(window.slots, spec.router)
    gradient = window.gradient.double()
    drop = stats.info.forms.index(DROP)
    totals = {kind: np.zeros(spec.num_experts) for kind in FormCost}
    for slot in range(window.slots.top_k):
        change = mix(changes[:, slot], window.outputs).double()
        ids = window.expert_ids[:, slot].numpy()
        for kind, cost in token_costs(gradient, change).items():
            totals[kind] += np.bincount(ids, cost.numpy(), spec.num_experts)
    for kind, total in totals.items():
        stats.form_cost[kind].add(total, index=(0, slice(None), drop))


def _require_room(
    checkpoint: Checkpoint, info: GradientInfo, output: Path, window_tokens: int
) -> None:
    """State the memory needed on stderr, and refuse when it or the disk is not there."""
    terms = gradient_terms(checkpoint, info.num_tokens, window_tokens, info.quantiser)
    subject = f"loss gradients of {info.num_tokens} tokens in {len(info.windows)} windows"
    state_and_require_memory(subject, terms)
    state_bytes = hidden_file_bytes(checkpoint.spec.hidden_size, info.num_tokens)
    num_states = checkpoint.spec.num_layers + 2
    require_free_disk(output, num_states * state_bytes, "measuring loss gradients")
