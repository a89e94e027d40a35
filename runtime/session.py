"""`Session`: a package or checkpoint opened under a memory budget, ready to generate.

The dense part is loaded; experts live in slots under a hard byte budget and are paged in from disk.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_moe.errors import InputError
from edge_moe.package import Package
from edge_moe.plan import MemoryTerm
from edge_moe.runtime import memory
from edge_moe.runtime.allotment import (
    dense_parameters,
    host_terms,
    open_source,
    record_sizes,
    require_one_limit,
    source_fingerprint,
    with_slots,
)
from edge_moe.runtime.block_predictors import BlockInput
from edge_moe.runtime.dense_graphs import DenseGraphs
from edge_moe.runtime.expert_store import ExpertStore
from edge_moe.runtime.fetch_choice import Misses
from edge_moe.runtime.generate import Timing, check_prompt_length
from edge_moe.runtime.interleaved_trial import FastestOf
from edge_moe.runtime.kernel_choice import Kernels
from edge_moe.runtime.linear_map import LinearGuess, LinearMap
from edge_moe.runtime.model import held_bytes, moe_blocks, verify_resident
from edge_moe.runtime.moe_block import MoeBlock
from edge_moe.runtime.paged_experts import Ranker
from edge_moe.runtime.policy import PagingStatistics
from edge_moe.runtime.pre_gate import PreGate
from edge_moe.runtime.predictor_choice import DEFAULT_PREDICTORS, require_known
from edge_moe.runtime.predictors import LINEAR_GUESSES, ROUTER_GUESSES
from edge_moe.runtime.residency import PagingOptions, Residency, dense_graphs
from edge_moe.runtime.session_setup import Setup, find_device
from edge_moe.runtime.shadow_allotment import Allotment, Limits
from edge_moe.runtime.shadow_store import TERM_NAME as SHADOWS_TERM
from edge_moe.runtime.skipping import SkipRule
from edge_moe.runtime.stalls import EXACT, StallOptions
from edge_moe.runtime.subset import RouterRows, Rows, SubsetStore, choose_rows
from edge_moe.runtime.text_session import TextSession
from edge_moe.runtime.tokenizer import load_tokenizer
from edge_moe.runtime.torch_decoder import Decoder
from edge_moe.runtime.trace import TraceInfo, TraceRecorder
from edge_moe.spec import ModelSpec
from edge_moe.task_pattern import Match, TaskPattern, match_pattern


class Session(TextSession):
    """A model that can be asked. Use `Session.open`, and close it or use it in a `with` block."""

    def __init__(self, setup: Setup, model: Any, tokenizer: Any) -> None:
        self.spec: ModelSpec = setup.source.spec
        self.model = model
        self.tokenizer = tokenizer
        self.context_tokens = setup.context_tokens
        self.device = setup.options.device
        self.load_seconds = 0.0
        self.timing = Timing()
        self._setup = setup
        self._options = setup.options
        self._blocks = moe_blocks(model, self.spec)
        self._routers = RouterRows(self._blocks)
        self._experts: Residency | None = None
        self._graphs: DenseGraphs | None = None
        self._terms = setup.terms

    @classmethod
    def open(
        cls,
        model: Path | str,
        *,
        budget_bytes: int | None = None,
        context_tokens: int | None = None,
        device: str | None = None,
        num_slots: int | None = None,
        prefetch: bool | None = None,
        ram_bytes: int | None = None,
        scored_tokens: int = 1,
        skip: SkipRule | None = None,
        pattern: TaskPattern | None = None,
        match_first: bool = False,
        kernels: Kernels = "auto",
        misses: Misses = "auto",
        graphs: bool | None = None,
        stall: StallOptions = EXACT,
        predictors: Sequence[str] = DEFAULT_PREDICTORS,
        linear: LinearMap | None = None,
        pre_gate: PreGate | None = None,
        delta: Path | None = None,
        rearranged: bool = False,
    ) -> Session:
        """Load the dense part of `model` and as many experts as there are slots.

        Args:
            model: a native package, or a Hugging Face checkpoint folder; `GgufSession` opens .gguf
                files.
            budget_bytes: hard cap on the device's memory; None makes every expert resident.
            context_tokens: longest sequence; default 4096 or the model's limit.
            num_slots: experts in memory at once, instead of a budget.
            prefetch: read guessed experts of the next layer ahead, as the first of `predictors`
                says; None tries all of them and nothing by turns on the first tokens, and keeps
                what is fastest.
            ram_bytes: on CUDA, packed experts kept in RAM between the disk and the GPU.
            scored_tokens: most positions that `logits` will be asked for at once.
            skip: leave out chosen experts that this rule finds not worth computing.
            pattern: run with this task's experts only; see `use_pattern`.
            match_first: without a limit, start with slots for one layer's experts only, until
                `match_task` has said which pattern to use: the other experts never stay in memory.
            kernels: whose kernels compute the experts, see `edge_moe.runtime.kernel_choice`:
                `exact` gives what transformers does with the same weights, `ggml` rounds inputs as
                llama.cpp does, `triton` computes packed experts on CUDA, `auto` is ggml or triton
                for quantised experts where it can be.
            misses: with `ram_bytes`, whether a token's experts that the GPU lacks are fetched, or
                computed on the CPU; `auto` measures both, and keeps what is faster. On a CPU
                `auto` fetches. Where an expert is computed can change the last digits of a result.
            graphs: on CUDA, replay what lies between the experts of a token from captured graphs;
                None tries both by turns on the first tokens, and keeps what is faster. Replayed
                logits agree with others but for rounding.
            stall: how long decoded tokens wait for experts that are not in memory. Anything but
                `exact` keeps the package's shadows in memory while it pages, and in place of
                `prefetch` brings in what was missed.
            predictors: names of `edge_moe.runtime.predictor_choice.PREDICTORS`.
            linear: what the predictor `linear` goes by; its guesses are traced, too.
            pre_gate: chooses the experts of all MoE layers but the first, in the place of their
                routers, which only weigh them. While paging, all that it has chosen for a token is
                read ahead (unless `prefetch` is False), and predictors are not asked.
            delta: a task of `edge-moe delta`, added to dense weights now and to experts as they
                are paged in. Quantised experts stay as they are, and the delta's products are
                added to theirs.
            rearranged: put experts as llama.cpp's fastest CPU kernels want them, while they are
                paged in, where their types have such kernels. Results differ from the others' in
                the last digits.

        Raises:
            DeltaError: a damaged delta, or one of another model.
            BudgetError: the budget cannot hold the model even when paging.
            PackageError, CheckpointError, SpecError, InputError: `model` cannot be used.
            MissingExtraError: kernels ggml without llama-cpp-python, or triton without triton.
        """
        start, model = time.perf_counter(), Path(model)
        require_one_limit(budget_bytes, num_slots)
        require_known(predictors, has_linear=linear is not None)
        memory.limit_arenas()
        source = open_source(model)
        if isinstance(source, Package):
            verify_resident(source)
        options = PagingOptions(
            *(find_device(device), prefetch, ram_bytes, skip, stall.only_fetching(misses)),
            kernels=kernels,
            stall=stall,
            graphs=graphs,
            predictors=tuple(predictors),
            linear=linear,
            pre_gate=pre_gate,
            rearranged=rearranged,
        )
        limits = Limits(budget_bytes, num_slots)
        with ExitStack() as held:  # closed where opening fails
            setup = Setup.open(
                *(source, options, limits),
                context_tokens=context_tokens,
                scored_tokens=scored_tokens,
                delta=delta,
            )
            held.callback(setup.close)
            tokenizer = load_tokenizer(model)
            session = cls(setup, setup.load_network(), tokenizer)
            if match_first and not limits.has_any:
                session._reside(setup.store, None, setup.allot_one_layer())
            else:
                session.use_pattern(pattern)
            held.pop_all()
        session.load_seconds = time.perf_counter() - start
        return session

    def use_pattern(self, pattern: TaskPattern | None) -> None:
        """Keep only the experts of a task, or all of them with None. Statistics start anew.

        They get the slots; the routers lose the rows of the others, as if the model had been built
        without them. Under a budget (or with a number of slots) as many experts are kept as fit, so
        nothing pages; without one the pattern's own kept sets are.

        Raises:
            InputError: the pattern belongs to another model, or keeps too few experts.
        """
        setup = self._setup
        store, rows = setup.store, None
        if pattern is not None:
            if pattern.model_fingerprint != self.fingerprint:
                raise InputError(
                    f"task pattern {pattern.name!r} belongs to another model "
                    f"({pattern.model_fingerprint[:12]}, not {self.fingerprint[:12]}): make one "
                    "for this model with `edge-moe patterns`"
                )
            room = setup.allot(store).slots.num_bytes if setup.limits.has_any else None
            rows = choose_rows(pattern, store, self.spec, room)
            store = SubsetStore(store, rows)
        shadows: ExpertStore | None = setup.shadows
        if shadows is not None and rows is not None:
            shadows = SubsetStore(shadows, rows)
        self._reside(store, rows, setup.allot(store, shadows))

    def _reside(self, store: ExpertStore, rows: Rows | None, allotment: Allotment) -> None:
        """Run with the experts of `store`, which are `rows` of the whole model's."""
        if self._experts is not None:
            self._experts.close()
            self._experts = None  # its slots are freed before the new ones are taken
        self._routers.use(rows)
        self._terms = allotment.terms
        bodies = allotment.bodies or store
        self._experts = Residency.open(
            *(self.spec, self._blocks, bodies, allotment.slots),
            *(self._options, self._setup.kernels, allotment.shadows),
        )
        self._graphs = dense_graphs(
            self.model, self._experts.pager, self._blocks, self._options, self.context_tokens
        )

    def match_task(self, prompt_ids: Sequence[int], patterns: Mapping[str, TaskPattern]) -> Match:
        """Which of `patterns` a prompt is nearest to, by the experts that it is routed to.

        Costs one prefill of the prompt with every expert reachable, paging what does not fit; what
        it read counts in `statistics()` until `use_pattern` starts them anew.

        Raises:
            InputError: a prompt that does not fit the context, or no pattern.
        """
        check_prompt_length(prompt_ids, self.context_tokens)
        with self.tracing() as recorder:
            self.new_loop().prefill(prompt_ids)
        trace = recorder.finish(self.trace_info())
        return match_pattern(trace.gate_means(self.spec.num_experts), patterns)

    @contextmanager
    def tracing(self) -> Iterator[TraceRecorder]:
        """Record what the routers choose, and what is guessed before, while the block runs."""
        pager, recorder = self._residency.pager, TraceRecorder()

        def begin(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            recorder.begin(arguments[0].flatten().tolist())

        hook = self.model.get_input_embeddings().register_forward_pre_hook(begin)
        pager.recorder, pager.rankers = recorder, self._rankers()
        try:
            yield recorder
        finally:
            pager.recorder, pager.rankers = None, {}
            hook.remove()

    def _rankers(self) -> dict[str, Ranker]:
        """Twice as wide as top_k, so that narrower guesses can be told from what was recorded."""
        if self.spec.latent_width:  # its experts are not given what the next router would be
            return {}
        blocks, width = self._blocks, 2 * self.spec.top_k
        found: dict[str, Ranker] = {
            ROUTER_GUESSES: lambda layer, hidden: blocks[layer + 1].ranked(hidden, width)
        }
        if self._options.linear is not None:
            block_input = BlockInput()
            linear = self._options.linear.for_experts(self.kept)
            guess = LinearGuess(block_input.values, linear, width)

            def rank(layer: int, hidden: torch.Tensor) -> list[int]:
                block_input.hidden = hidden
                return guess.guess(layer, [])

            found[LINEAR_GUESSES] = rank
        return found

    def trace_info(self) -> TraceInfo:
        """What the rows of a trace of this session stand for."""
        return TraceInfo(
            model_fingerprint=self.fingerprint,
            moe_layer_ids=self.spec.moe_layer_ids,
            top_k=self.spec.top_k,
            kept=tuple(tuple(kept) for kept in self._residency.store.kept),
        )

    def new_loop(self) -> Decoder:
        """A new sequence."""
        trial = self._residency.miss_trial
        prefetcher = self._residency.prefetcher
        return Decoder(
            *(self.model, self.device, self.context_tokens),
            trial=trial,
            graphs=self._graphs,
            read_ahead=None if prefetcher is None else prefetcher.read_ahead,
        )

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """float32 [T, V]: row t predicts token t + 1.

        Raises:
            InputError: more tokens than the context holds.
        """
        decoder = self.new_loop()
        vocab_size = self.model.config.vocab_size
        if self._residency.shadows is not None:  # a prompt would wait for every body
            return decoder.logits(token_ids, vocab_size, chunk_tokens=1)
        return decoder.logits(token_ids, vocab_size)

    @property
    def eos_ids(self) -> set[int]:
        """Tokens that end a text, from generation_config.json or the tokenizer."""
        found = self.model.generation_config.eos_token_id
        if found is None:
            found = self.tokenizer.eos_token_id
        if found is None:
            return set()
        return set(found) if isinstance(found, list) else {found}

    @property
    def fingerprint(self) -> str:
        """Of the checkpoint that this model is, or was built from."""
        return source_fingerprint(self._setup.source)

    @property
    def kept(self) -> list[list[int]]:
        """Per MoE layer, ids of the experts in use."""
        return self._residency.store.kept

    @property
    def blocks(self) -> Sequence[MoeBlock]:
        """The MoE blocks of the model."""
        return self._blocks

    @property
    def num_experts(self) -> int:
        """Experts that the model's folder holds, over all MoE layers."""
        return sum(map(len, self._setup.store.kept))

    @property
    def dense_parameters(self) -> int:
        """Number of weights outside routed experts: every token uses them."""
        return dense_parameters(self._setup.source)

    @property
    def is_paging(self) -> bool:
        """Whether there are fewer slots than experts in use."""
        return self._residency.slots.is_paging

    @property
    def warnings(self) -> list[str]:
        """What the user should know about the slots and the kernels."""
        options = self._options
        found = self._residency.slots.warnings() + self._setup.kernels.warnings
        if options.ram_bytes and not options.tier_bytes:
            found.append(
                "--ram is for experts beside a GPU: on a CPU it does nothing without --misses cpu; "
                "leave it out, or raise --budget"
            )
        if self._setup.shadows is not None and self._residency.shadows is None:
            found.append(
                f"every expert is in memory: --stall {options.stall.mode} has nothing to do"
            )
        return found

    @property
    def kernels(self) -> str:
        """Whose kernels compute the experts: as `KernelChoice.label`."""
        return self._setup.kernels.experts.label

    @property
    def measured_terms(self) -> dict[str, int]:
        """Bytes really taken, by the name of the term."""
        found = {
            "dense weights": held_bytes(self.model),
            "experts": self._residency.cache.slot_bytes,
        }
        if self._residency.shadows is not None:
            found[SHADOWS_TERM] = self._residency.shadows.cache.slot_bytes
        return found

    def statistics(self) -> PagingStatistics:
        """What paging did since the session was opened, or since `use_pattern`."""
        return self._residency.cache.statistics

    @property
    def prefetch_trial(self) -> FastestOf | None:
        """Whose guesses pay here, where that is being tried."""
        prefetcher = self._residency.prefetcher
        read_ahead = None if prefetcher is None else prefetcher.read_ahead
        return None if read_ahead is None else read_ahead.trial

    def memory(self) -> list[MemoryTerm]:
        """The planned bill at this budget, term by term."""
        return with_slots(self._terms, self._residency.slots.num_bytes)

    def host_memory(self) -> list[MemoryTerm]:
        """What experts beside a GPU's slots take in RAM; on a CPU they are in `memory`."""
        options, residency = self._options, self._residency
        if options.kind == "cpu":
            return []
        return host_terms(
            *(record_sizes(residency.store), options.kind, options.tier_bytes),
            is_paging=residency.slots.is_paging,
        )

    @property
    def graphs(self) -> str:
        """Whether dense segments are replayed, and why not; empty on a CPU."""
        return self._graphs.label if self._graphs is not None else ""

    @property
    def pre_gate(self) -> str:
        """Who chooses in the place of the routers, in words; empty where nobody does."""
        gate = self._options.pre_gate
        return gate.label if gate is not None else ""

    @property
    def misses(self) -> str:
        """What is done with missed experts, in words; empty where all are fetched."""
        cpu_misses = self._residency.pager.misses
        return cpu_misses.chooser.label if cpu_misses is not None else ""

    def check_integrity(self) -> None:
        """Raise RuntimeError if the slots' bookkeeping is inconsistent."""
        self._residency.cache.check_integrity()

    def close(self) -> None:
        """Stop reading ahead, close the files, and hand freed memory back."""
        if self._experts is not None:
            self._experts.close()
        self._setup.close()
        memory.trim()

    @property
    def _residency(self) -> Residency:
        if self._experts is None:
            raise RuntimeError("the session holds no experts")
        return self._experts
