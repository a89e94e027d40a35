"""The work folder of a calibration: what survives kill -9, and where a resumed run goes on.

    lock                   held while a run writes here
    run.json               StatsInfo of the run; a resume with other settings is refused
    hidden_0007.safetensors  hidden states that enter layer 7, one tensor per window
    layer_0006.safetensors   statistics of layer 6

A layer writes its statistics first and then renames the hidden states of the next layer into
place. That rename is the commit: the highest complete hidden file names the layer to go on with,
and every lower MoE layer's statistics exist.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from edge_moe.converters.safetensors_writer import TensorEntry, header
from edge_moe.converters.staging import locked
from edge_moe.errors import CheckpointError, EdgeMoeError, InputError, StatsError
from edge_moe.files import atomic_path, write_text
from edge_moe.moments import LayerMoments, moments_path
from edge_moe.safetensors_header import read_header
from edge_moe.stats import ExpertStats, StatsInfo, first_difference, require_unfinished
from edge_moe.tensor_info import TensorInfo

_HIDDEN = re.compile(r"hidden_(\d+)\.safetensors")


class HiddenWriter:
    """Appends the hidden states of one window after another to a safetensors file."""

    def __init__(self, handle: BinaryIO, window_lengths: Sequence[int], hidden_size: int) -> None:
        entries = [
            TensorEntry(str(index), "F32", (1, length, hidden_size))
            for index, length in enumerate(window_lengths)
        ]
        self._handle = handle
        self._handle.write(header(entries))

    def write(self, hidden: Tensor) -> None:
        """Append the next window, [1, W, H] float32."""
        self._handle.write(hidden.contiguous().numpy().data)


class HiddenReader:
    """Hidden states of one layer's windows, read one at a time."""

    def __init__(self, path: Path) -> None:
        self._tensors: dict[str, TensorInfo] = read_header(path)[0]

    def read(self, index: int) -> Tensor:
        """[1, W, H] float32 of window `index`, in memory of torch's own."""
        info = self._tensors[str(index)]
        hidden = torch.empty(info.shape)
        with info.path.open("rb") as handle:
            handle.seek(info.offset)
            handle.readinto(hidden.numpy().data.cast("B"))
        return hidden


class CalibrationWork:
    """Progress of one run inside its output folder."""

    def __init__(self, output: Path, info: StatsInfo, window_lengths: Sequence[int]) -> None:
        """Start a run in the folder `output/work`, or go on with the one that was begun there.

        Raises:
            InputError: the folder holds another run.
        """
        self.folder = output / "work"
        self._output = output
        self._info = info
        self._window_lengths = tuple(window_lengths)
        settings = self.folder / "run.json"
        if settings.exists():
            require_same_run(settings, info)
        else:
            write_text(settings, info.model_dump_json(indent=1) + "\n")
        self._remove_leftovers()

    @property
    def is_worth_keeping(self) -> bool:
        """Whether a layer is done that a resumed run need not do."""
        return bool(self.next_layer)

    @property
    def next_layer(self) -> int | None:
        """The layer whose input is on disk; None before the embeddings are."""
        return max(self._hidden_layers(), default=None)

    def hidden(self, layer_id: int) -> HiddenReader:
        """The hidden states that enter layer `layer_id`."""
        return HiddenReader(self._hidden_path(layer_id))

    @contextmanager
    def committing(self, layer_id: int, hidden_size: int) -> Iterator[HiddenWriter]:
        """Write the hidden states that enter layer `layer_id`; they count when the block ends."""
        with atomic_path(self._hidden_path(layer_id)) as temporary:
            with temporary.open("wb") as handle:
                yield HiddenWriter(handle, self._window_lengths, hidden_size)
        self._remove_leftovers()

    def save_layer(self, stats: ExpertStats) -> None:
        """Write the statistics of one layer (`stats` of a single MoE layer)."""
        (layer_id,) = stats.info.moe_layer_ids
        with atomic_path(self.layer_path(layer_id)) as temporary:
            save_file(stats.to_arrays(), temporary)

    def save_moments(self, layer_id: int, moments: LayerMoments) -> None:
        """Write the second moments of one layer."""
        moments.save(moments_path(self.folder, layer_id))

    def publish_moments(self) -> None:
        """Move the second moments of all layers out of the work folder."""
        for layer_id in self._info.moe_layer_ids:
            source, target = (moments_path(each, layer_id) for each in (self.folder, self._output))
            if source.exists():  # a resumed run may have moved some already
                target.parent.mkdir(exist_ok=True)
                source.rename(target)

    def layer_zeros(self, layer_id: int) -> ExpertStats:
        """Empty statistics of one MoE layer."""
        return ExpertStats.zeros(self._info.model_copy(update={"moe_layer_ids": (layer_id,)}))

    def collect(self) -> ExpertStats:
        """Statistics of all layers together.

        Raises:
            StatsError: a layer's file is missing or damaged.
        """
        try:
            parts = [load_file(self.layer_path(layer)) for layer in self._info.moe_layer_ids]
        except (OSError, SafetensorError) as error:
            raise StatsError(
                f"{self.folder} is damaged ({error}): remove it and calibrate again"
            ) from None
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return ExpertStats.from_arrays(self._info, arrays)

    def remove(self) -> None:
        """Delete the folder: the run is finished."""
        shutil.rmtree(self.folder)

    def _hidden_layers(self) -> list[int]:
        matches = (_HIDDEN.fullmatch(path.name) for path in self.folder.iterdir())
        return [int(match.group(1)) for match in matches if match]

    def _remove_leftovers(self) -> None:
        """Hidden states of layers that are done, and temporary files of killed runs."""
        for path in self.folder.glob(".*.tmp"):
            path.unlink()
        for layer_id in sorted(self._hidden_layers())[:-1]:
            self._hidden_path(layer_id).unlink()

    def _hidden_path(self, layer_id: int) -> Path:
        return self.folder / f"hidden_{layer_id:04}.safetensors"

    def layer_path(self, layer_id: int) -> Path:
        return self.folder / f"layer_{layer_id:04}.safetensors"


class Resumable(Protocol):
    """Work that a killed or failed run may leave for the next one."""

    @property
    def is_worth_keeping(self) -> bool:
        """Whether a layer is done that a resumed run need not do."""

    def remove(self) -> None:
        """Delete the folder."""


WorkT = TypeVar("WorkT", bound=Resumable)


@contextmanager
def calibration_work(
    output: Path, info: StatsInfo, window_lengths: Sequence[int]
) -> Iterator[CalibrationWork]:
    """Yield the work of a run in `output`, which no other process may write meanwhile.

    Raises:
        InputError: as for `require_unfinished`; another run; another process writes there.
    """
    require_unfinished(output)
    with held(output, "work", lambda: CalibrationWork(output, info, window_lengths)) as work:
        yield work


@contextmanager
def held(output: Path, name: str, begin: Callable[[], WorkT]) -> Iterator[WorkT]:
    """Yield what `begin` makes of the folder `output/name`, locked against other processes.

    A run that fails leaves nothing behind, unless a layer is done that a resumed run need not do:
    bad weights have to change, and then nothing of the run can be used again.

    Raises:
        InputError: another process writes there.
    """
    folder = output / name
    folder.mkdir(parents=True, exist_ok=True)
    with locked(
        folder / "lock",
        f"output {output} is being calibrated by another process: wait for it to finish or choose "
        "another path",
    ):
        work = begin()
        try:
            yield work
        except (EdgeMoeError, OSError) as error:
            if isinstance(error, CheckpointError) or not work.is_worth_keeping:
                work.remove()
                if not any(output.iterdir()):
                    output.rmdir()
            raise


def require_same_run(settings: Path, info: StatsInfo) -> None:
    """Refuse to go on with a run that was begun with other settings than `info`.

    Raises:
        InputError: names the first setting that differs, or the damaged file.
    """
    remedy = f"choose another output or remove {settings.parent.parent}"
    try:
        begun = type(info).model_validate_json(settings.read_bytes())
    except (OSError, ValidationError):
        raise InputError(f"{settings} is damaged: {remedy}") from None
    found = first_difference(begun, info, {"options"})
    if found is not None:
        name, before, now = found
        raise InputError(
            f"cannot resume: {name} is {_brief(before)} in {settings} and {_brief(now)} now; "
            f"{remedy}"
        )


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
