"""`GgufSession`: any GGUF MoE in llama.cpp under a hard budget of RAM, its experts paged by us."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edge_moe.errors import InputError
from edge_moe.gguf_model import GgufModel
from edge_moe.plan import MemoryTerm
from edge_moe.runtime import memory
from edge_moe.runtime.allotment import context_length, with_slots
from edge_moe.runtime.generate import FloatArray, Timing, TokenLoop
from edge_moe.runtime.gguf_allotment import (
    batch_tokens,
    expert_limit_bytes,
    largest_expert_bytes,
    num_rows,
    paging_terms,
    session_terms,
)
from edge_moe.runtime.gguf_experts import GgufExperts
from edge_moe.runtime.gguf_slices import Place
from edge_moe.runtime.gguf_tokenizer import GgufTokenizer
from edge_moe.runtime.interleaved_trial import FastestOf
from edge_moe.runtime.llama_gpu import require_gpu
from edge_moe.runtime.llama_predict import BlockInputs, NextRouter
from edge_moe.runtime.llama_probe import require_loadable
from edge_moe.runtime.llama_stream import require_callback_streams
from edge_moe.runtime.paged_llama import LoadedModel, PagedContext
from edge_moe.runtime.policies import DEFAULT_POLICY
from edge_moe.runtime.policy import EvictionPolicy, PagingStatistics, token_cycle_bytes
from edge_moe.runtime.predictor_choice import (
    DEFAULT_PREDICTORS,
    STATE_PREDICTORS,
    WIDE_GUESSES,
    id_predictor,
    predictor_terms,
    require_known,
)
from edge_moe.runtime.predictors import LINEAR_GUESSES, ROUTER_GUESSES, Predictor
from edge_moe.runtime.read_ahead import ReadAhead
from edge_moe.runtime.text_session import Prompt, TextSession, Where
from edge_moe.units import format_bytes

if TYPE_CHECKING:
    from edge_moe.runtime.rearranged_file import OnBytes
    from edge_moe.runtime.trace import TraceInfo, TraceRecorder


class GgufSession(TextSession):
    """The interface of `runtime.session.Session` that running and chatting need."""

    def __init__(
        self,
        model: GgufModel,
        loaded: LoadedModel,
        experts: GgufExperts,
        context: PagedContext,
        terms: list[MemoryTerm],
        context_tokens: int,
    ) -> None:
        """Use `GgufSession.open`."""
        self.spec = model.spec
        self.device = Where("cpu")
        self.context_tokens = context_tokens
        self.timing = Timing()
        self.load_seconds = 0.0
        self.warnings: list[str] = []
        template = model.header.metadata.get("tokenizer.chat_template")
        vocabulary = loaded.api.llama.llama_model_get_vocab(loaded.pointer)
        self.tokenizer: GgufTokenizer = GgufTokenizer(loaded.api.llama, vocabulary, template)
        self._model = model
        self._loaded = loaded
        self._experts = experts
        self._context = context
        self._terms = terms

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        budget_bytes: int | None = None,
        context_tokens: int | None = None,
        num_slots: int | None = None,
        prefetch: bool | None = None,
        policy: type[EvictionPolicy] = DEFAULT_POLICY,
        can_trace: bool = False,
        gpu_layers: int = 0,
        predictors: Sequence[str] = DEFAULT_PREDICTORS,
        rearranged: Path | None = None,
        on_bytes: OnBytes | None = None,
    ) -> GgufSession:
        """Load everything but the experts of the file `path`, and those as far as they fit.

        Args:
            budget_bytes: hard cap on RAM; None keeps every expert in memory.
            context_tokens: longest sequence; default 4096 or the model's limit.
            num_slots: experts in memory at once, instead of a budget.
            prefetch: read guessed experts of the next layer ahead, as the first of `predictors`
                says; None tries all of them and nothing by turns on the first tokens, and keeps
                what is fastest.
            policy: which expert leaves.
            can_trace: watch the routers even where nothing is paged, so that `tracing` works.
            gpu_layers: of so many last layers all but the experts is computed on a GPU. Predictors
                that ask routers or states are left out then: those are in its memory.
            predictors: names of `edge_moe.runtime.predictor_choice.PREDICTORS`.
            rearranged: folder for a file of the experts as llama.cpp's fastest CPU kernels want
                them; it is made once, and as large as they are. Dense matrices are rearranged in
                memory.
            on_bytes: told the bytes done and in all while that file is made.

        Raises:
            BudgetError: the budget cannot hold the model even when paging.
            CheckpointError, SpecError: a damaged file, or no MoE that is known.
            DiskSpaceError: no room for the rearranged experts.
            InputError: llama.cpp cannot run it, or fewer slots than top_k, or no faster kernels.
            MissingExtraError: llama-cpp-python is not installed.
        """
        start, path = time.perf_counter(), Path(path)
        memory.limit_arenas()
        require_callback_streams()
        model = GgufModel(path)
        context = context_length(model.spec, context_tokens)
        require_gpu(path, gpu_layers)
        names = _usable(predictors, prefetch, gpu_layers)
        has_budget = budget_bytes is not None
        terms = session_terms(model, context, has_budget=has_budget, gpu_layers=gpu_layers)
        terms += predictor_terms(names, num_rows(model))
        terms = paging_terms(model, terms, budget_bytes, num_slots, policy)
        limit_bytes = expert_limit_bytes(model, terms, budget_bytes, num_slots)
        most_tokens = min(batch_tokens(model, limit_bytes), context)
        require_loadable(path, context, most_tokens, {})
        with ExitStack() as held:  # closed where opening fails
            loaded = LoadedModel(model, gpu_layers, rearranges_dense=rearranged is not None)
            held.callback(loaded.close)
            places = _places(model, loaded, rearranged, on_bytes)
            experts = GgufExperts(model, loaded.region, limit_bytes, policy, places)
            held.callback(experts.close)
            is_paging = experts.is_paging
            if not is_paging:
                experts.fill()
            inputs = BlockInputs(loaded.api, model)
            network = PagedContext(
                *(model, loaded, experts),
                context_tokens=context,
                batch_tokens=most_tokens,
                is_watched=is_paging or can_trace,
                inputs=inputs,
                read_ahead=_read_ahead(names, inputs, model, prefetch) if is_paging else None,
                may_cut=not model.spec.num_sliding_layers,
            )
            held.callback(network.close)
            session = cls(model, loaded, experts, network, terms, context)
            held.pop_all()
        if is_paging and gpu_layers and prefetch is not False:
            session.warnings += _left_out(predictors, names)
        if is_paging:
            session.warnings += _below_cycle(model, limit_bytes)
        session.load_seconds = time.perf_counter() - start
        return session

    def logits(self, token_ids: Sequence[int]) -> FloatArray:
        """float32 [T, V]: row t predicts token t + 1.

        Raises:
            InputError: more tokens than the context holds.
        """
        return self.new_loop().logits(token_ids, self.spec.vocab_size)

    @contextmanager
    def tracing(self) -> Iterator[TraceRecorder]:
        """Record which experts the routers choose while the block runs: ids, without weights.

        Twice as many as top_k are guessed beside them, so that narrower guesses can be told.

        Raises:
            InputError: nothing is paged, and the session was not opened to be traced.
        """
        from edge_moe.runtime.trace import TraceRecorder  # a process that only runs stays small

        recorder = TraceRecorder()
        inputs = self._context.inputs
        self._context.record(recorder, {ROUTER_GUESSES: NextRouter(inputs, 2 * self.spec.top_k)})
        try:
            yield recorder
        finally:
            self._context.record(None)

    def trace_info(self) -> TraceInfo:
        """What the rows of a trace of this session stand for."""
        from edge_moe.runtime.trace import TraceInfo

        every = tuple(range(self.spec.num_experts))
        return TraceInfo(
            model_fingerprint=self._model.fingerprint,
            moe_layer_ids=self.spec.moe_layer_ids,
            top_k=self.spec.top_k,
            kept=(every,) * self.spec.num_moe_layers,
            has_weights=False,
        )

    def new_loop(self) -> TokenLoop:
        """A new sequence; what came before is forgotten."""
        self._context.clear()
        return _LlamaLoop(self._context, self.context_tokens)

    @property
    def eos_ids(self) -> set[int]:
        """Every token that ends a text, as llama.cpp counts them."""
        return self.tokenizer.end_ids

    @property
    def is_paging(self) -> bool:
        """Whether there is less memory than experts."""
        return self._experts.is_paging

    @property
    def measured_terms(self) -> dict[str, int]:
        """Bytes really taken, by the name of the term."""
        return {"experts": self._experts.used_bytes}

    def memory(self) -> list[MemoryTerm]:
        """The bill at this budget, term by term."""
        held_bytes = min(self._experts.limit_bytes, self._experts.total_bytes)
        return with_slots(self._terms, held_bytes, "whole pages")

    def statistics(self) -> PagingStatistics:
        """What paging did since the session was opened."""
        return self._experts.statistics

    @property
    def prefetch_trial(self) -> FastestOf | None:
        """Whose guesses pay here, where that is being tried."""
        return self._context.prefetch_trial

    def check_integrity(self) -> None:
        """Raise RuntimeError if the bookkeeping is inconsistent."""
        self._experts.check_integrity()

    def close(self) -> None:
        """Free the model, close the files, and hand freed memory back."""
        self._context.close()
        self._experts.close()
        self._loaded.close()
        memory.trim()

    def _loop_for(self, prompt: Prompt, prompt_ids: Sequence[int]) -> TokenLoop:
        """Of a chat only what is new is computed, where the model's memory can be cut."""
        kept = 0 if isinstance(prompt, str) else self._context.keep_prefix(prompt_ids)
        return _LlamaLoop(self._context, self.context_tokens, kept) if kept else self.new_loop()


def _usable(predictors: Sequence[str], prefetch: bool | None, gpu_layers: int) -> tuple[str, ...]:
    """Those of `predictors` that can guess here, if any are to.

    Raises:
        InputError: one that is unknown, or that no GGUF model can be guessed for by.
    """
    if LINEAR_GUESSES in predictors:
        raise InputError(
            "a linear map guesses in edge-moe's own runtime, not for .gguf files: name "
            f"another predictor, such as {ROUTER_GUESSES}"
        )
    require_known(predictors)
    if prefetch is False:
        return ()
    return tuple(name for name in predictors if not gpu_layers or name not in STATE_PREDICTORS)


def _left_out(asked: Sequence[str], kept: Sequence[str]) -> list[str]:
    """What to say of predictors that cannot guess with layers on a GPU."""
    lost = [name for name in asked if name not in kept]
    if not lost:
        return []
    where = "with --gpu-layers the routers that guess them are in the GPU's memory"
    if not kept:
        return [f"experts are not read ahead: {where}; give --predictor transitions or token"]
    return [f"experts are read ahead by {', '.join(kept)}, not by {', '.join(lost)}: {where}"]


def _below_cycle(model: GgufModel, limit_bytes: int) -> list[str]:
    """What to say where not even one token's experts fit."""
    cycle_bytes = token_cycle_bytes(largest_expert_bytes(model).values(), model.spec.top_k)
    if limit_bytes >= cycle_bytes:
        return []
    return [
        f"experts have {format_bytes(limit_bytes)}, one token uses {format_bytes(cycle_bytes)}: "
        "nearly every expert is read anew for every token; raise --budget if you can"
    ]


def _places(
    model: GgufModel, loaded: LoadedModel, folder: Path | None, on_bytes: OnBytes | None
) -> dict[str, Place]:
    """Where experts lie as the fastest kernels want them; none without a `folder` for that."""
    if folder is None:
        return {}
    from edge_moe.runtime.rearranged_file import rearranged_places

    return rearranged_places(model, loaded.region, loaded.rearranger(), folder, on_bytes)


def _read_ahead(
    names: Sequence[str], inputs: BlockInputs, model: GgufModel, prefetch: bool | None
) -> ReadAhead | None:
    if not names:
        return None
    rows = num_rows(model)
    guessers = {name: _predictor(name, inputs, rows, model.spec.top_k) for name in names}
    return ReadAhead(len(rows), guessers, FastestOf(names) if prefetch is None else None)


def _predictor(name: str, inputs: BlockInputs, num_rows: Sequence[int], top_k: int) -> Predictor:
    if name == ROUTER_GUESSES:
        return NextRouter(inputs, top_k)
    if name == WIDE_GUESSES:
        return NextRouter(inputs, min(2 * top_k, min(num_rows)))
    return id_predictor(name, num_rows, top_k)


class _LlamaLoop(TokenLoop):
    """A sequence through llama.cpp."""

    def __init__(self, context: PagedContext, context_tokens: int, kept: int = 0) -> None:
        """`kept` tokens of the prompt are in the cache."""
        super().__init__(context_tokens)
        self._context = context
        self.num_tokens = kept

    def prefill(self, token_ids: Sequence[int]) -> FloatArray:
        logits = super().prefill(token_ids[self.num_tokens :])
        self.timing.prompt_tokens = len(token_ids)
        return logits

    def step(self, token_ids: Sequence[int], *, keep_all: bool = False) -> FloatArray:
        found: FloatArray = self._context.decode(token_ids, self.num_tokens, keep_all=keep_all)
        self.num_tokens += len(token_ids)
        return found

    def cache_bytes(self) -> int:
        """llama.cpp takes the whole context's at once."""
        return 0
