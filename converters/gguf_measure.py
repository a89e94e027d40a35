"""Measures proposed plans of a GGUF file for the search: each is built, run and removed again.

What is measured is what `build` would write, as llama.cpp computes it, with rounded activations.
A plan costs a copy of its bytes, packing of what changes its type (kept between plans within
`PACKED_LIMIT_BYTES`) and one evaluation of the text. On disk: the whole model's logits, float32
(4 V bytes per token of the text), and one plan's file. Logits are read a window at a time. Needs
the extra `gguf`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_moe import metrics
from edge_moe.converters.calibration_memory import PACK_CHUNK_WEIGHTS
from edge_moe.converters.search_memory import PACKED_LIMIT_BYTES
from edge_moe.converters.slice_gguf import can_pack, write_trial_slice
from edge_moe.converters.slice_packing import InputSquares, SlicePacker
from edge_moe.errors import DiskSpaceError, InputError, StatsError
from edge_moe.files import os_problem, require_free_disk
from edge_moe.gguf_model import GgufModel
from edge_moe.plan import MemoryTerm, SearchRecord, formula_terms
from edge_moe.problem import FloatArray
from edge_moe.runtime import gguf_logits
from edge_moe.runtime.heldout import described_search, search_windows
from edge_moe.stats import StatsInfo
from edge_moe.trials import Measuring, MeasuringFailed, OnShare

MEASURING = Measuring(pass_plans=1, needs_equal_counts=True)
"""Plans are measured one after the other: none waits for another, whenever the time runs out."""
_WRITING_SHARE = 0.4
"""Of a plan's time; a guess that only a progress bar shows."""
_ALLOWANCE_BYTES = 96_000_000


def check_packable(stats: StatsInfo) -> None:
    """Refuse statistics whose plans `build` could not pack either.

    Raises:
        StatsError: names the quantiser.
    """
    if not can_pack(stats.quantiser):
        raise StatsError(
            f"the statistics' quantiser {stats.quantiser!r} packs by the calibration text, and no "
            "GGUF is built that way: calibrate with --quantiser imatrix or nearest"
        )


class GgufPlanMeasure:
    """Callable that measures plans of one GGUF file."""

    def __init__(
        self,
        model: GgufModel,
        stats: StatsInfo,
        tasks: Sequence[str],
        work: Path,
        squares: InputSquares | None,
    ) -> None:
        """`work` is a folder for files, which the caller removes; `squares` are the statistics'.

        Raises:
            InputError: a task without held-out text.
            MissingExtraError: llama-cpp-python is not installed.
            DiskSpaceError: `work` has no room for logits and a plan.
        """
        with gguf_logits.gguf_tokenizer(model.path) as tokenizer:
            self._windows = search_windows(tasks, tokenizer, model.active_parameters)
        self._model, self._work, self._tasks = model, work, tuple(tasks)
        self._packer = SlicePacker(stats.quantiser, squares, PACKED_LIMIT_BYTES)
        self._longest = max(map(len, self._windows))
        self._has_whole = False
        needed_bytes = model.file_bytes + 4 * self._num_tokens * model.spec.vocab_size
        require_free_disk(work, needed_bytes, "measuring plans")

    def __call__(
        self, proposals: Mapping[str, list[list[str]]], on_run: OnShare
    ) -> Mapping[str, FloatArray]:
        """KL divergence of every token; `on_run` is told the share that is done.

        Raises:
            MeasuringFailed: the disk is full, memory is short, or llama.cpp does not run the file.
            CheckpointError: the model's file was damaged since it was opened.
        """
        found = {}
        for index, (name, forms) in enumerate(proposals.items()):
            on_share = partial(self._tell, on_run, index, len(proposals))
            found[name] = self._measure(forms, on_share)
        on_run(1.0)
        return found

    @staticmethod
    def _tell(on_run: OnShare, num_done: int, num_plans: int, share: float) -> None:
        on_run((num_done + share) / num_plans)

    def memory_terms(self) -> list[MemoryTerm]:
        """Upper bounds of what measuring adds to the process, by term.

        weights         the file, whose pages are mapped, or repacked for this processor
        packed experts  the limit up to which they are kept
        packing         one matrix read, in float32 and packed, and a chunk on its way
        kv cache        float32
        logits          4 x 4 V bytes per token of a window: llama.cpp's, two copies, the reference
        scores          2^21 values of 52 bytes
        """
        spec, model = self._model.spec, self._model
        terms = {
            "weights": model.file_bytes,
            "packed experts": min(PACKED_LIMIT_BYTES, model.file_bytes),
            "packing": 16 * spec.expert_weights + 64 * PACK_CHUNK_WEIGHTS,
            "kv cache": spec.unwindowed_kv_bytes(self._longest, 4),
            "logits": 16 * self._longest * spec.vocab_size,
            "scores": 52 * metrics.CHUNK_VALUES,
            "allowance": _ALLOWANCE_BYTES,
        }
        return formula_terms(terms)

    def described(self, record: SearchRecord) -> SearchRecord:
        """`record` with the text that was measured on."""
        return described_search(record, self._windows, self._tasks)

    @property
    def _num_tokens(self) -> int:
        return sum(map(len, self._windows))

    def _measure(self, forms: list[list[str]], on_share: Callable[[float], None]) -> FloatArray:
        path = self._work / "trial.gguf"
        written = 0

        def advance(num_bytes: int) -> None:
            nonlocal written
            written += num_bytes
            on_share(_WRITING_SHARE * min(1.0, written / self._model.file_bytes))

        try:
            if not self._has_whole:
                self._run_whole(on_share)
            write_trial_slice(self._model, forms, path, self._packer, advance)
            return self._divergence(path, on_share)
        except (DiskSpaceError, InputError) as error:
            raise MeasuringFailed(str(error)) from error
        except OSError as error:
            raise MeasuringFailed(f"{error.filename or path}: {os_problem(error)}") from error
        except MemoryError as error:
            raise MeasuringFailed("memory ran out: free some, or use --no-search") from error
        finally:
            path.unlink(missing_ok=True)

    def _run_whole(self, on_share: Callable[[float], None]) -> None:
        """Keep the whole model's logits [T, V] of every window on disk."""
        with gguf_logits.GgufModel(self._model.path, self._longest) as model:
            for index, window in enumerate(self._windows):
                np.save(self._whole_path(index), model.logits(window))
                on_share(0.0)
        self._has_whole = True

    def _divergence(self, path: Path, on_share: Callable[[float], None]) -> FloatArray:
        parts = []
        with gguf_logits.GgufModel(path, self._longest) as model:
            for index in range(len(self._windows)):
                parts.append(self._window_divergence(model, index))
                share = (index + 1) / len(self._windows)
                on_share(min(_WRITING_SHARE + (1 - _WRITING_SHARE) * share, 1 - 1e-9))
        return np.concatenate(parts)

    def _window_divergence(self, model: gguf_logits.GgufModel, index: int) -> FloatArray:
        window = self._windows[index]
        whole: npt.NDArray[np.float32] = np.load(self._whole_path(index))  # mapped pages would stay
        return metrics.compare_tokens(model.logits(window), whole, window).kld

    def _whole_path(self, index: int) -> Path:
        return self._work / f"{index:04}.npy"
