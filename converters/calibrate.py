"""Checkpoint + task text -> ExpertStats, one decoder layer at a time.

Every window runs alone through every layer, without padding, and its sums are rounded once to a
fixed grid (see `exact_sum`). So the result does not depend on shards, on the order of windows or on
how often the run was killed; shards of one text are bit-equal in sum to one run, on machines whose
float32 arithmetic agrees.

Cost per token and MoE layer: 6HI x (k + 1) floating point operations to run the layer (k top_k,
one more expert to learn who would replace a dropped one), 6HI x k x (1 + lossy forms) to measure
forms, and 2 per dense weight. Packing costs the same per weight and form for any text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.block_sums import WindowObservation, add_window
from edge_moe.converters.calibrated_packing import CalibratedPacker
from edge_moe.converters.calibration_memory import (
    calibration_terms,
    hidden_file_bytes,
    state_and_require_memory,
)
from edge_moe.converters.calibration_request import (
    CalibrationRequest,
    Fingerprints,
    checked_forms,
)
from edge_moe.converters.calibration_work import (
    CalibrationWork,
    HiddenWriter,
    calibration_work,
)
from edge_moe.converters.form_loss import CheckpointExperts, FormLosses, add_moments
from edge_moe.converters.layer_stream import LayerStream
from edge_moe.converters.observe import OBSERVE, BlockObserver, router_scores_of
from edge_moe.converters.packer import Packer, PlainPacker
from edge_moe.converters.progress import progress_bar
from edge_moe.errors import CheckpointError, InputError
from edge_moe.exact_sum import ExactSum
from edge_moe.files import require_free_disk
from edge_moe.formats import DROP
from edge_moe.formats.quantise import get_quantiser
from edge_moe.gradient_stats import load_gradients
from edge_moe.plan import CalibrationOptions
from edge_moe.runtime.tokenizer import load_tokenizer
from edge_moe.stats import ExpertStats, StatsInfo, require_unfinished
from edge_moe.tasks import (
    task_windows,
    tokenizer_fingerprint,
    windows_fingerprint,
)


def calibrate(
    model: Path,
    tasks: Sequence[str],
    output: Path,
    *,
    window_tokens: int = 512,
    max_windows: int | None = None,
    shard: tuple[int, int] = (0, 1),
    forms: Sequence[str] | None = None,
    quantiser: str | None = None,
) -> ExpertStats:
    """Measure every expert of the checkpoint `model` on the calibration text of `tasks`.

    Writes `output` (a folder) and returns what it holds. A killed run goes on where it stopped when
    it is started again with the same arguments. `shard=(i, N)` covers the windows whose number
    modulo N is i; `ExpertStats.merge` joins shards. `forms` defaults to the planner's candidates.
    `quantiser` packs them (see `edge_moe.formats.quantise`): the best by default, which needs the
    whole text at once; shards default to `nearest`, whose losses add up.
    Gradient statistics that `output` holds must be of the same run; they know the forms' losses.
    Memory: `calibration_terms`. Disk: twice the hidden states of all windows, while it runs.

    Raises:
        EdgeMoeError: bad model, text, option or output, or not enough memory or disk.
    """
    require_unfinished(output)
    checkpoint = Checkpoint(model)
    measured_forms = checked_forms(checkpoint.spec, forms)
    info, texts = calibration_text(
        checkpoint, tasks, window_tokens, max_windows, shard, measured_forms, quantiser
    )
    known = _known_losses(output, info)
    _require_room(checkpoint, info, output)
    with calibration_work(output, info, [len(text) for text in texts]) as work:
        stats = _Run(checkpoint, info, work, texts, known).finish()
        work.publish_moments()
        stats.save(output)
        work.remove()
    return stats


def calibration_text(
    checkpoint: Checkpoint,
    tasks: Sequence[str],
    window_tokens: int,
    max_windows: int | None,
    shard: tuple[int, int],
    forms: tuple[str, ...],
    quantiser: str | None = None,
) -> tuple[StatsInfo, list[list[int]]]:
    """The settings of a run over `shard` of the tasks' calibration text, and its windows.

    Raises:
        EdgeMoeError: bad model, text or option.
    """
    model = checkpoint.folder
    request = CalibrationRequest(tuple(tasks), window_tokens, max_windows, shard, forms, quantiser)
    request.check(checkpoint.spec)
    tokenizer = load_tokenizer(model)
    windows = task_windows(tasks, "calibration", tokenizer, window_tokens, max_windows)
    fingerprints = Fingerprints(checkpoint.fingerprint, tokenizer_fingerprint(model))
    return request.run_over(windows, checkpoint.spec, fingerprints)


def text_packer(
    checkpoint: Checkpoint, asked: CalibrationOptions | None, data_fingerprint: str
) -> Packer:
    """Packs experts as they were packed when their forms were measured.

    Raises:
        InputError: the calibration text that the plan's quantiser needs is gone or has changed.
    """
    if asked is None or not get_quantiser(asked.quantiser).needs:
        return PlainPacker(checkpoint, asked.quantiser if asked else "nearest")
    tokenizer = load_tokenizer(checkpoint.folder)
    windows = task_windows(
        asked.tasks, "calibration", tokenizer, asked.window_tokens, asked.max_windows
    )
    if windows_fingerprint(windows) != data_fingerprint:
        raise InputError(
            f"the text of {', '.join(asked.tasks)} has changed since it was calibrated on, and "
            f"quantiser {asked.quantiser} needs it again: restore it, or calibrate and plan again"
        )
    return CalibratedPacker(checkpoint, asked.quantiser, windows)


class _Run:
    """One pass over the layers that are not done yet."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        info: StatsInfo,
        work: CalibrationWork,
        texts: Sequence[Sequence[int]],
        known: ExactSum | None,
    ) -> None:
        """`known` [L, E, F] are losses of packed forms that need not be measured again."""
        self.checkpoint = checkpoint
        self.info = info
        self.work = work
        self.texts = texts
        self.known = known
        self.stream = LayerStream(checkpoint, OBSERVE)
        self.form_losses = FormLosses(CheckpointExperts(checkpoint), info.forms, info.quantiser)
        self.progress = progress_bar()
        self.bar = self.progress.add_task(
            "calibrating", total=self._units(checkpoint.spec.num_layers)
        )

    def finish(self) -> ExpertStats:
        """The statistics of all layers."""
        num_layers = self.checkpoint.spec.num_layers
        self._check_outside_layers()
        with torch.inference_mode(), self.progress:
            if self.work.next_layer is None:
                self._embed()
            first_layer = self.work.next_layer or 0
            self.progress.advance(self.bar, self._units(first_layer))
            for layer_id in range(first_layer, num_layers):
                self.progress.update(self.bar, description=f"layer {layer_id + 1} of {num_layers}")
                with self.work.committing(layer_id + 1, self.checkpoint.spec.hidden_size) as writer:
                    self._layer(layer_id, writer)
        return self.work.collect()

    def _check_outside_layers(self) -> None:
        """Embeddings, final norm and output head: no layer reads them, a damaged one ruins all."""
        layers = self.checkpoint.spec.layer_prefix(0).removesuffix("0.")
        for info in self.checkpoint.dense_tensors:
            if not info.name.startswith(layers):
                self.checkpoint.check_finite(info.name)

    def _units(self, num_layers: int) -> float:
        """Progress units of the first layers: a window run, or one form measured on a window."""
        num_moe = sum(layer_id < num_layers for layer_id in self.info.moe_layer_ids)
        return len(self.texts) * (num_layers + num_moe * len(self.info.forms))

    def _embed(self) -> None:
        with self.work.committing(0, self.checkpoint.spec.hidden_size) as writer:
            for text in self.texts:
                writer.write(self.stream.embed(text))

    def _layer(self, layer_id: int, writer: HiddenWriter) -> None:
        with self.stream.loaded(layer_id):
            if layer_id in self.info.moe_layer_ids:
                self.work.save_layer(self._moe_layer(layer_id, writer))
                return
            for _ in self._outputs(layer_id, writer):
                pass

    def _moe_layer(self, layer_id: int, writer: HiddenWriter) -> ExpertStats:
        """Run all windows while watching the MoE block, then measure its experts' forms."""
        block = self.stream.moe_block(layer_id)
        with BlockObserver(block, self.checkpoint.spec) as observer:
            seen = [observer.take(output) for output in self._outputs(layer_id, writer)]
        try:
            moments = add_moments(block.experts, seen, self.checkpoint.spec)
            self.work.save_moments(layer_id, moments)
            stats = self.work.layer_zeros(layer_id)
            form_losses = self._packed_losses(layer_id, block, seen)
            if self.known is not None:
                row = [self.info.moe_layer_ids.index(layer_id)]
                stats.form_loss.merge(ExactSum(self.known.high[row], self.known.low[row]))
            for observation, losses in zip(seen, form_losses, strict=True):
                losses[:, stats.form_index(DROP)] = observation.drop_loss
                add_window(stats, observation, losses)
        except OverflowError as error:
            raise CheckpointError(
                f"{self.checkpoint.folder}: layer {layer_id}: {error}; its weights are damaged: "
                "download it again"
            ) from None
        return stats

    def _packed_losses(
        self, layer_id: int, block: Any, seen: Sequence[WindowObservation]
    ) -> npt.NDArray[np.float64]:
        """[windows, E, F] losses of the packed forms; zeros where their sum is known."""
        num_experts, num_forms = self.info.num_experts, len(self.info.forms)
        if self.known is not None:
            self.progress.advance(self.bar, len(seen) * num_forms)
            return np.zeros((len(seen), num_experts, num_forms))
        step = len(seen) * num_forms / num_experts
        spec = self.checkpoint.spec
        return self.form_losses.measure(
            layer_id,
            block.experts,
            seen,
            lambda: self.progress.advance(self.bar, step),
            lambda: [router_scores_of(block, each.inputs, spec) for each in seen],
        )

    def _outputs(self, layer_id: int, writer: HiddenWriter) -> Iterator[Tensor]:
        """Hidden states after the loaded layer, [1, W, H] of each window, also written down."""
        hidden = self.work.hidden(layer_id)
        for index in range(len(self.texts)):
            output = self.stream.run(layer_id, hidden.read(index))
            writer.write(output)
            self.progress.advance(self.bar)
            yield output


def _known_losses(output: Path, info: StatsInfo) -> ExactSum | None:
    """[L, E, F] losses of packed forms that a gradient run has left in `output`.

    Raises:
        StatsError: it was a run of something else.
    """
    gradients = load_gradients(output, info)
    return None if gradients is None else gradients.packed_loss()


def _require_room(checkpoint: Checkpoint, info: StatsInfo, output: Path) -> None:
    """State the memory needed on stderr, and refuse when it or the disk is not there."""
    longest = min(info.window_tokens, info.num_tokens)
    terms = calibration_terms(checkpoint, info.num_tokens, longest, info.quantiser)
    subject = f"calibrating on {info.num_tokens} tokens in {len(info.windows)} windows"
    state_and_require_memory(subject, terms)
    hidden_bytes = hidden_file_bytes(checkpoint.spec.hidden_size, info.num_tokens)
    require_free_disk(output, 2 * hidden_bytes, "calibration")
