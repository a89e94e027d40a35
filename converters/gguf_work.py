"""The work folder of a calibration on llama.cpp: what survives kill -9.

lock, run.json         as in `calibration_work`
windows/               see `window_spool`; a window that is there need not be run again
layer_0006.safetensors   statistics of layer 6, which is done; its moments were written before
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from edge_moe.converters.calibration_work import CalibrationWork, held
from edge_moe.converters.window_spool import WindowSpool
from edge_moe.spec import ModelSpec
from edge_moe.stats import StatsInfo, require_unfinished


class GgufWork(CalibrationWork):
    """Progress of one run inside its output folder."""

    def __init__(
        self, output: Path, info: StatsInfo, spec: ModelSpec, window_lengths: Sequence[int]
    ) -> None:
        super().__init__(output, info, window_lengths)
        self.spool = WindowSpool(self.folder / "windows", spec, window_lengths)

    @property
    def is_worth_keeping(self) -> bool:
        """Whether a window is done that a resumed run need not do."""
        return not self.spool.is_empty

    def is_done(self, layer_id: int) -> bool:
        """Whether the statistics of a layer are there."""
        return self.layer_path(layer_id).exists()


@contextmanager
def gguf_work(
    output: Path, info: StatsInfo, spec: ModelSpec, window_lengths: Sequence[int]
) -> Iterator[GgufWork]:
    """Yield the work of a run in `output`, which no other process may write meanwhile.

    Raises:
        InputError: as for `calibration_work`.
    """
    require_unfinished(output)
    with held(output, "work", lambda: GgufWork(output, info, spec, window_lengths)) as work:
        yield work
