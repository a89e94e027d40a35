"""Checkpoint + task text -> SkipCalibration: the median ratio of router weights in every layer.

Streams like `calibrate`: one decoder layer in memory, hidden states on disk, and a killed run goes
on where it stopped. Cost per token and MoE layer: 6HI x (k + 1) floating point operations, k top_k.
Memory beside that of `calibrate`: 8 (k - 1) bytes per token, for the exact median of one layer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

import edge_moe
from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.calibration_memory import (
    calibration_terms,
    hidden_file_bytes,
    state_and_require_memory,
)
from edge_moe.converters.calibration_work import CalibrationWork, HiddenWriter, calibration_work
from edge_moe.converters.layer_stream import LayerStream
from edge_moe.converters.observe import OBSERVE, BlockObserver
from edge_moe.errors import InputError, StatsError
from edge_moe.files import require_free_disk, require_new_output, write_text
from edge_moe.formats import DROP
from edge_moe.plan import MemoryTerm
from edge_moe.runtime.evaluate import progress
from edge_moe.runtime.skipping import median_ratio
from edge_moe.runtime.tokenizer import load_tokenizer
from edge_moe.skip_calibration import SkipCalibration
from edge_moe.stats import STATS_VERSION, StatsInfo
from edge_moe.tasks import task_label, task_windows, tokenizer_fingerprint, windows_fingerprint


def calibrate_skipping(
    model: Path,
    tasks: Sequence[str],
    output: Path,
    *,
    window_tokens: int = 512,
    max_windows: int | None = None,
) -> SkipCalibration:
    """Measure, on the calibration text of `tasks`, how much lighter a token's other experts are.

    Writes the file `output`; `output`.work holds what a killed run needs to go on.

    Raises:
        EdgeMoeError: bad model, text, option or output, or not enough memory or disk.
    """
    require_new_output(output)
    checkpoint = Checkpoint(model)
    windows = task_windows(tasks, "calibration", load_tokenizer(model), window_tokens, max_windows)
    info = _run_info(checkpoint, tasks, window_tokens, windows)
    work_folder = output.with_name(f"{output.name}.work")
    _require_room(checkpoint, info, work_folder)
    with calibration_work(work_folder, info, [len(window) for window in windows]) as work:
        ratios = _Pass(checkpoint, work, windows).ratios()
        shared = set(SkipCalibration.model_fields) & set(StatsInfo.model_fields) - {"version"}
        calibration = SkipCalibration(**info.model_dump(include=shared), median_ratios=ratios)
        calibration.save(output)
        work.remove()
    work_folder.rmdir()
    return calibration


def skipping_terms(checkpoint: Checkpoint, num_tokens: int, window_tokens: int) -> list[MemoryTerm]:
    """`calibration_terms`, and what the exact median of a layer's ratios takes.

    ratios  8 bytes x (k - 1) x tokens in all windows
    """
    ratio_bytes = 8 * max(0, checkpoint.spec.top_k - 1) * num_tokens
    ratios = MemoryTerm(name="ratios", num_bytes=ratio_bytes, source="formula")
    return [*calibration_terms(checkpoint, num_tokens, window_tokens), ratios]


class _Pass:
    """One pass over the layers that are not done yet."""

    def __init__(
        self, checkpoint: Checkpoint, work: CalibrationWork, windows: Sequence[Sequence[int]]
    ) -> None:
        self._spec = checkpoint.spec
        self._work = work
        self._windows = windows
        self._stream = LayerStream(checkpoint, OBSERVE)

    def ratios(self) -> tuple[float, ...]:
        """[L] the median ratio of every MoE layer."""
        num_layers = self._spec.num_layers
        with torch.inference_mode(), progress("calibrating skipping", num_layers) as advance:
            if self._work.next_layer is None:
                with self._work.committing(0, self._spec.hidden_size) as writer:
                    for window in self._windows:
                        writer.write(self._stream.embed(window))
            first = self._work.next_layer or 0
            for layer_id in range(num_layers):
                if layer_id >= first:
                    with self._work.committing(layer_id + 1, self._spec.hidden_size) as writer:
                        self._layer(layer_id, writer)
                advance()
        return tuple(self._read(layer_id) for layer_id in self._spec.moe_layer_ids)

    def _layer(self, layer_id: int, writer: HiddenWriter) -> None:
        hidden = self._work.hidden(layer_id)
        is_moe = layer_id in self._spec.moe_layer_ids
        with self._stream.loaded(layer_id):
            if not is_moe:
                for index in range(len(self._windows)):
                    writer.write(self._stream.run(layer_id, hidden.read(index)))
                return
            gates: list[npt.NDArray[np.float64]] = []
            with BlockObserver(self._stream.moe_block(layer_id), self._spec) as observer:
                for index in range(len(self._windows)):
                    output = self._stream.run(layer_id, hidden.read(index))
                    writer.write(output)
                    gates.append(observer.take(output).gates.numpy())
        write_text(self._path(layer_id), json.dumps(median_ratio(np.concatenate(gates))))

    def _read(self, layer_id: int) -> float:
        path = self._path(layer_id)
        try:
            return float(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise StatsError(
                f"{path} is damaged ({error}): remove {self._work.folder} and start again"
            ) from None

    def _path(self, layer_id: int) -> Path:
        return self._work.folder / f"ratio_{layer_id:04}.json"


def _run_info(
    checkpoint: Checkpoint,
    tasks: Sequence[str],
    window_tokens: int,
    windows: Sequence[Sequence[int]],
) -> StatsInfo:
    """What must agree before a killed run may go on."""
    spec = checkpoint.spec
    return StatsInfo(
        version=STATS_VERSION,
        edge_moe_version=edge_moe.__version__,
        model_type=spec.model_type,
        model_fingerprint=checkpoint.fingerprint,
        tokenizer_fingerprint=tokenizer_fingerprint(checkpoint.folder),
        data_fingerprint=windows_fingerprint(windows),
        tasks=tuple(task_label(task) for task in tasks),
        window_tokens=window_tokens,
        num_windows=len(windows),
        windows=tuple(range(len(windows))),
        num_tokens=sum(map(len, windows)),
        moe_layer_ids=spec.moe_layer_ids,
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        forms=(DROP,),
    )


def _require_room(checkpoint: Checkpoint, info: StatsInfo, work_folder: Path) -> None:
    """Refuse windows beyond the context, and when memory or disk is not there."""
    spec = checkpoint.spec
    if info.window_tokens > spec.max_position_embeddings:
        raise InputError(
            f"windows of {info.window_tokens} tokens exceed the model's context of "
            f"{spec.max_position_embeddings}: use a smaller window"
        )
    longest = min(info.window_tokens, info.num_tokens)
    state_and_require_memory(
        f"calibrating skipping on {info.num_tokens} tokens in {info.num_windows} windows",
        skipping_terms(checkpoint, info.num_tokens, longest),
        "calibrate on fewer windows (--max-windows), or on a machine with more memory",
    )
    hidden_bytes = hidden_file_bytes(spec.hidden_size, info.num_tokens)
    require_free_disk(work_folder, 2 * hidden_bytes, "calibration of skipping")
