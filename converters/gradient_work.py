"""The work folder of a gradient run: what survives kill -9, and where a resumed run goes on.

    lock                       held while a run writes here
    run.json                   GradientInfo of the run; a resume with other settings is refused
    hidden_0007.safetensors    hidden states that enter layer 7, one tensor per window
    gradient_0007.safetensors  gradient of the loss with respect to them
    layer_0006.safetensors     statistics of layer 6

First the hidden files are made in ascending order, then the gradient files in descending order. The
rename of a gradient file is the commit of its layer: the layer's statistics are there already, and
its hidden states are no longer needed.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edge_moe.additive import Arrays
from edge_moe.converters.calibration_work import (
    HiddenReader,
    HiddenWriter,
    held,
    require_same_run,
)
from edge_moe.errors import InputError, StatsError
from edge_moe.files import atomic_path, require_new_output, write_text
from edge_moe.gradient_stats import GradientInfo, GradientStats
from edge_moe.stats import ExpertStats

_STATES = re.compile(r"(hidden|gradient)_(\d+)\.safetensors")
_FOLDER = "gradient_work"


class GradientWork:
    """Progress of one run inside its output folder, which may hold finished `ExpertStats`."""

    def __init__(self, output: Path, info: GradientInfo, window_lengths: Sequence[int]) -> None:
        """Start a run in the folder `output/gradient_work`, or go on with the one begun there.

        Raises:
            InputError: the folder holds another run.
        """
        self.folder = output / _FOLDER
        self._info = info
        self._window_lengths = tuple(window_lengths)
        settings = self.folder / "run.json"
        if settings.exists():
            require_same_run(settings, info)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(settings, info.model_dump_json(indent=1) + "\n")
        self._remove_leftovers()

    @property
    def is_worth_keeping(self) -> bool:
        """Whether a layer is done that a resumed run need not do."""
        return bool(self.last_hidden) or self.last_gradient is not None

    @property
    def last_hidden(self) -> int | None:
        """The highest layer whose input is on disk; None before the embeddings are."""
        return max(self._layers("hidden"), default=None)

    @property
    def last_gradient(self) -> int | None:
        """The lowest layer whose input's gradient is on disk; None before the loss is."""
        return min(self._layers("gradient"), default=None)

    def hidden(self, layer_id: int) -> HiddenReader:
        """The hidden states that enter layer `layer_id`."""
        return HiddenReader(self._path("hidden", layer_id))

    def gradient(self, layer_id: int) -> HiddenReader:
        """The gradient with respect to the hidden states that enter layer `layer_id`."""
        return HiddenReader(self._path("gradient", layer_id))

    @contextmanager
    def committing_hidden(self, layer_id: int) -> Iterator[HiddenWriter]:
        """Write the hidden states that enter `layer_id`; they count when the block ends."""
        with self._writing("hidden", layer_id) as writer:
            yield writer

    @contextmanager
    def committing_gradient(self, layer_id: int) -> Iterator[HiddenWriter]:
        """Write the gradient that leaves `layer_id` downwards; it counts when the block ends."""
        with self._writing("gradient", layer_id) as writer:
            yield writer
        self._remove_leftovers()

    def save_layer(self, stats: GradientStats) -> None:
        """Write the statistics of one layer (`stats` of a single MoE layer)."""
        (layer_id,) = stats.info.moe_layer_ids
        with atomic_path(self._path("layer", layer_id)) as temporary:
            save_file(stats.to_arrays(), temporary)

    def save_loss(self, loss_nats: Sequence[float]) -> None:
        """Write the loss of every window, in nats."""
        with atomic_path(self.folder / "loss.safetensors") as temporary:
            save_file({"loss_nats": np.array(loss_nats, np.float64)}, temporary)

    def layer_zeros(self, layer_id: int) -> GradientStats:
        """Empty statistics of one MoE layer."""
        return GradientStats.zeros(self._info.model_copy(update={"moe_layer_ids": (layer_id,)}))

    def collect(self) -> GradientStats:
        """Statistics of all layers together.

        Raises:
            StatsError: a file is missing or damaged.
        """
        try:
            arrays = self._joined_layers()
            losses = load_file(self.folder / "loss.safetensors")["loss_nats"]
        except (OSError, KeyError, SafetensorError) as error:
            raise StatsError(
                f"{self.folder} is damaged ({error}): remove it and measure again"
            ) from None
        stats = GradientStats.from_arrays(self._info, arrays)
        for loss in losses:
            stats.loss_nats.add(loss, index=0)
        return stats

    def _joined_layers(self) -> Arrays:
        """`GradientStats.to_arrays` of all layers, the loss still 0."""
        parts = [load_file(self._path("layer", layer)) for layer in self._info.moe_layer_ids]
        arrays: Arrays = {n: np.concatenate([part[n] for part in parts]) for n in parts[0]}
        return arrays | {"loss_nats": parts[0]["loss_nats"]}

    def remove(self) -> None:
        """Delete the folder: the run is finished."""
        shutil.rmtree(self.folder)

    @contextmanager
    def _writing(self, kind: str, layer_id: int) -> Iterator[HiddenWriter]:
        with atomic_path(self._path(kind, layer_id)) as temporary:
            with temporary.open("wb") as handle:
                yield HiddenWriter(handle, self._window_lengths, self._info.hidden_size)

    def _layers(self, kind: str) -> list[int]:
        matches = (_STATES.fullmatch(path.name) for path in self.folder.iterdir())
        return [int(match[2]) for match in matches if match and match[1] == kind]

    def _remove_leftovers(self) -> None:
        """States of layers that are done, and temporary files of killed runs."""
        for path in self.folder.glob(".*.tmp"):
            path.unlink()
        done = self.last_gradient
        if done is None:
            return
        for layer_id in self._layers("hidden"):
            if layer_id >= done:
                self._path("hidden", layer_id).unlink()
        for layer_id in self._layers("gradient"):
            if layer_id > done:
                self._path("gradient", layer_id).unlink()

    def _path(self, kind: str, layer_id: int) -> Path:
        return self.folder / f"{kind}_{layer_id:04}.safetensors"


@contextmanager
def gradient_work(
    output: Path, info: GradientInfo, window_lengths: Sequence[int]
) -> Iterator[GradientWork]:
    """Yield the work of a run in `output`, which no other process may write meanwhile.

    Raises:
        InputError: as for `require_no_gradients`; another run; another process writes there.
    """
    require_no_gradients(output)
    with held(output, _FOLDER, lambda: GradientWork(output, info, window_lengths)) as work:
        yield work


def require_no_gradients(output: Path) -> None:
    """Refuse an output that a gradient run can neither start in nor resume.

    Raises:
        InputError: `output` holds finished gradient statistics, or something else.
    """
    folder = output / _FOLDER
    if GradientStats.settings_path(output).exists():
        shutil.rmtree(folder, ignore_errors=True)
        raise InputError(
            f"output {output} already holds finished gradient statistics: "
            "choose another path or remove gradient.json first"
        )
    beside = folder, output / "work", ExpertStats.settings_path(output)  # a calibration's
    if not any(path.exists() for path in beside):
        require_new_output(output)
