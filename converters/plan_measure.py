"""Measures proposed plans for the search: KL divergence on held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.calibrate import text_packer
from edge_moe.converters.calibrated_packing import CalibratedPacker
from edge_moe.converters.search_memory import search_terms
from edge_moe.converters.variants import PackedExperts, VariantScorer
from edge_moe.plan import MemoryTerm, SearchRecord
from edge_moe.problem import FloatArray
from edge_moe.runtime.heldout import described_search, search_windows
from edge_moe.runtime.tokenizer import load_tokenizer
from edge_moe.stats import StatsInfo
from edge_moe.trials import MAX_PASS_PROPOSALS, OnShare


class PlanMeasure:
    """Callable that measures plans of one checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        stats: StatsInfo,
        tasks: Sequence[str],
        packed: PackedExperts | None = None,
    ) -> None:
        """`packed` are experts packed as `stats` says, where somebody has them already.

        Raises:
            InputError: a task without held-out text.
        """
        tokenizer = load_tokenizer(checkpoint.folder)
        windows = search_windows(tasks, tokenizer, checkpoint.active_parameters)
        if packed is None:
            packer = text_packer(checkpoint, stats.options, stats.data_fingerprint)
            packed = PackedExperts(checkpoint, packer)
        self._scorer = VariantScorer(checkpoint, windows, packed)
        self._windows = windows
        self._checkpoint, self._forms = checkpoint, stats.forms
        self._packed = packed
        self._tasks = tuple(tasks)

    def __call__(
        self, proposals: Mapping[str, list[list[str]]], on_run: OnShare
    ) -> Mapping[str, FloatArray]:
        """KL divergence of every token; `on_run` is told the share of layers done."""
        scores = self._scorer.score(proposals, on_run)
        return {name: found.kld for name, found in scores.items()}

    def memory_terms(self) -> list[MemoryTerm]:
        """Upper bounds of what measuring adds to a process that has imported torch, by term."""
        lengths = [len(window) for window in self._windows]
        terms = search_terms(self._checkpoint, lengths, self._forms, MAX_PASS_PROPOSALS)
        packer = self._packed.packer
        if isinstance(packer, CalibratedPacker):
            packing = [term for term in packer.memory_terms() if term.name != "allowance"]
            total = sum(term.num_bytes for term in packing)
            terms.append(MemoryTerm(name="packing", num_bytes=total, source="formula"))
        return terms

    def described(self, record: SearchRecord) -> SearchRecord:
        """`record` with the text that was measured on."""
        return described_search(record, self._windows, self._tasks)
