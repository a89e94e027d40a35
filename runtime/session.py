"""`Session`: a package or checkpoint opened under a memory budget, ready to generate.

The dense part is loaded; experts live in slots under a hard byte budget and are paged in from disk.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_moe import budget as bill
from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import BudgetError, InputError
from edge_moe.overhead import ASSUMED_BYTES, runtime_overhead, tokenizer_bytes
from edge_moe.package import Package, is_package
from edge_moe.plan import Device, MemoryTerm
from edge_moe.runtime import memory
from edge_moe.runtime.adapter import merge_adapter
from edge_moe.runtime.expert_cache import ExpertCache, HostTier
from edge_moe.runtime.expert_store import CheckpointStore, ExpertStore, PackageStore
from edge_moe.runtime.generate import Decoder, Sampling, TextStream, Timing, chunks
from edge_moe.runtime.model import (
    build_model,
    compute_dtype,
    dense_tensors,
    held_bytes,
    moe_blocks,
    verify_resident,
)
from edge_moe.runtime.paged_experts import ExpertPager, attach, register_experts
from edge_moe.runtime.policy import PagingStatistics, choose_policy, token_cycle_bytes
from edge_moe.runtime.prefetch import Prefetcher
from edge_moe.runtime.slots import (
    SlotBuffers,
    allot_by_bytes,
    allot_by_count,
    size_classes,
    smallest_slot_bytes,
)
from edge_moe.spec import ModelSpec
from edge_moe.units import format_bytes

DEFAULT_CONTEXT_TOKENS = 4096


@dataclass(frozen=True)
class _Slots:
    """How the expert bytes are laid out."""

    counts: dict[int, int]
    num_bytes: int
    is_paging: bool
    is_below_cycle: bool


class Session:
    """A model that can be asked. Use `Session.open`, and close it or use it in a `with` block."""

    def __init__(
        self,
        *,
        spec: ModelSpec,
        model: Any,
        tokenizer: Any,
        cache: ExpertCache,
        store: ExpertStore,
        prefetcher: Prefetcher | None,
        terms: list[MemoryTerm],
        measured_terms: dict[str, int],
        context_tokens: int,
        device: torch.device,
        is_paging: bool,
        load_seconds: float,
        warnings: list[str],
    ) -> None:
        self.spec = spec
        self.model = model
        self.tokenizer = tokenizer
        self.context_tokens = context_tokens
        self.device = device
        self.is_paging = is_paging
        self.load_seconds = load_seconds
        self.warnings = warnings
        self.measured_terms = measured_terms
        self.timing = Timing()
        self._cache = cache
        self._store = store
        self._prefetcher = prefetcher
        self._terms = terms

    @classmethod
    def open(
        cls,
        model: Path,
        *,
        budget_bytes: int | None = None,
        context_tokens: int | None = None,
        device: str | None = None,
        num_slots: int | None = None,
        prefetch: bool = True,
        ram_bytes: int | None = None,
    ) -> Session:
        """Load the dense part of `model` and as many experts as there are slots.

        Args:
            model: a native package, or a Hugging Face checkpoint folder.
            budget_bytes: hard cap on the device's memory; None makes every expert resident.
            context_tokens: longest sequence; default 4096 or the model's limit.
            num_slots: experts in memory at once, instead of a budget.
            ram_bytes: on CUDA, packed experts kept in RAM between the disk and the GPU.

        Raises:
            BudgetError: the budget cannot hold the model even when paging.
            PackageError, CheckpointError, SpecError, InputError: `model` cannot be used.
        """
        start = time.perf_counter()
        memory.limit_arenas()
        source = _open_source(model)
        if isinstance(source, Package):
            verify_resident(source)
        spec = source.spec
        where = _device(device)
        context = _context(spec, context_tokens)
        store = _store(source)
        terms = _terms(source, store, context, where, has_budget=budget_bytes is not None)
        slots = _allot(spec, store, terms, budget_bytes, num_slots)
        tokenizer = load_tokenizer(model)
        rows = [len(kept) for kept in store.kept]
        register_experts()
        network = build_model(spec, model, dense_tensors(source), rows, where)
        if isinstance(source, Package):
            merge_adapter(network, source)
        memory.trim()
        cache = _cache(spec, store, slots, where, ram_bytes)
        blocks = moe_blocks(network, spec)
        is_predicting = prefetch and slots.is_paging
        prefetcher = Prefetcher(blocks, store, cache) if is_predicting else None
        attach(blocks, ExpertPager(spec, store, cache, compute_dtype(spec, where), prefetcher))
        return cls(
            spec=spec,
            model=network,
            tokenizer=tokenizer,
            cache=cache,
            store=store,
            prefetcher=prefetcher,
            terms=[_resized(term, slots.num_bytes) for term in terms],
            measured_terms={
                "dense weights": held_bytes(network),
                "experts": cache.slot_bytes,
            },
            context_tokens=context,
            device=where,
            is_paging=slots.is_paging,
            load_seconds=time.perf_counter() - start,
            warnings=_warnings(slots),
        )

    def generate(
        self,
        prompt: str | list[dict[str, str]],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """Text that follows `prompt` (a string, or chat messages for the chat template).

        `timing` says afterwards how long it took and why it stopped. Closing the iterator, or
        Ctrl-C while it runs, leaves the session usable.

        Raises:
            InputError: an empty prompt, one longer than the context, or chat without a template.
        """
        prompt_ids = self.prompt_ids(prompt)
        if len(prompt_ids) >= self.context_tokens:
            raise InputError(
                f"the prompt has {len(prompt_ids)} tokens but the context holds "
                f"{self.context_tokens}: shorten it or raise --ctx"
            )
        decoder = Decoder(self.model, self.device, self.context_tokens)
        self.timing = decoder.timing
        stream = TextStream(self.tokenizer, stop)
        sampling = Sampling(temperature, top_p, seed)
        for token in decoder.tokens(prompt_ids, max_new_tokens, sampling, self.eos_ids):
            piece = stream.push(token)
            if piece:
                yield piece
            if stream.is_stopped:
                decoder.timing.stop_reason = "stop"
                return
        rest = stream.finish()
        if rest:
            yield rest

    def generate_ids(
        self, prompt_ids: Sequence[int], max_new_tokens: int, *, stop_at_eos: bool = True
    ) -> list[int]:
        """Greedy continuation as token ids."""
        decoder = Decoder(self.model, self.device, self.context_tokens)
        self.timing = decoder.timing
        eos = self.eos_ids if stop_at_eos else set()
        return list(decoder.tokens(prompt_ids, max_new_tokens, Sampling(), eos))

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """float32 [T, V]: row t predicts token t + 1.

        Raises:
            InputError: more tokens than the context holds.
        """
        if not 0 < len(token_ids) <= self.context_tokens:
            raise InputError(
                f"{len(token_ids)} tokens do not fit a context of {self.context_tokens}"
            )
        decoder = Decoder(self.model, self.device, self.context_tokens)
        parts = [decoder.step(chunk, keep_all=True).cpu() for chunk in chunks(token_ids)]
        return np.concatenate([part.numpy() for part in parts])

    def prompt_ids(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Token ids of a prompt.

        Raises:
            InputError: nothing in it, or messages without a chat template.
        """
        if isinstance(prompt, str):
            ids = list(self.tokenizer(prompt)["input_ids"])
        else:
            if not self.has_chat_template:
                raise InputError("this model has no chat template: give plain text with --prompt")
            text = self.tokenizer.apply_chat_template(
                prompt, tokenize=False, add_generation_prompt=True
            )
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise InputError("the prompt is empty: give it at least one character")
        return ids

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def eos_ids(self) -> set[int]:
        """Tokens that end a text, from generation_config.json or the tokenizer."""
        found = self.model.generation_config.eos_token_id
        if found is None:
            found = self.tokenizer.eos_token_id
        if found is None:
            return set()
        return set(found) if isinstance(found, list) else {found}

    def statistics(self) -> PagingStatistics:
        """What paging did since the session was opened."""
        return self._cache.statistics

    def memory(self) -> list[MemoryTerm]:
        """The planned bill at this budget, term by term."""
        return self._terms

    def check_integrity(self) -> None:
        """Raise RuntimeError if the slots' bookkeeping is inconsistent."""
        self._cache.check_integrity()

    def close(self) -> None:
        """Stop reading ahead and close the files."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
        self._store.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that lies beside the weights.

    Raises:
        InputError: there is none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{folder} holds no readable tokenizer ({reason})") from None


def _open_source(model: Path) -> Package | Checkpoint:
    if not model.is_dir():
        raise InputError(
            f"{model} is not a folder: give a native package or a Hugging Face checkpoint"
        )
    return Package(model) if is_package(model) else Checkpoint(model)


def _store(source: Package | Checkpoint) -> ExpertStore:
    return PackageStore(source) if isinstance(source, Package) else CheckpointStore(source)


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, but torch finds no CUDA GPU: use --device cpu")
    return torch.device(name)


def _context(spec: ModelSpec, asked: int | None) -> int:
    if asked is None:
        return min(DEFAULT_CONTEXT_TOKENS, spec.max_position_embeddings)
    if asked > spec.max_position_embeddings:
        raise InputError(
            f"context {asked} is longer than the model's {spec.max_position_embeddings} tokens: "
            "ask for less"
        )
    return asked


def _terms(
    source: Package | Checkpoint,
    store: ExpertStore,
    context_tokens: int,
    device: torch.device,
    *,
    has_budget: bool,
) -> list[MemoryTerm]:
    """The bill with every kept expert resident. Only a budget is worth measuring overhead for."""
    spec = source.spec
    kind: Device = "cuda" if device.type == "cuda" else "cpu"
    itemsize = compute_dtype(spec, device).itemsize
    dense = sum(
        bill.num_weights(info) * itemsize
        for info in dense_tensors(source)
        if not (info.name == "lm_head.weight" and spec.tie_word_embeddings)
    )
    overhead, origin = (
        runtime_overhead(spec.model_type, kind) if has_budget else (ASSUMED_BYTES[kind], "assumed")
    )
    return bill.memory_terms(
        spec,
        forms=[
            [store.record((layer, row)).form for row in range(len(kept))]
            for layer, kept in enumerate(store.kept)
        ],
        dense_bytes=dense,
        context_tokens=context_tokens,
        device=kind,
        target="native",
        runtime_bytes=overhead + tokenizer_bytes(source.folder),
        runtime_source=origin,
    )


def _allot(
    spec: ModelSpec,
    store: ExpertStore,
    terms: list[MemoryTerm],
    budget_bytes: int | None,
    num_slots: int | None,
) -> _Slots:
    """Slots per record size.

    Raises:
        BudgetError: `minimum_bytes` is the smallest budget that works, paging included.
    """
    sizes = [
        [store.record((layer, row)).num_bytes for row in range(len(kept))]
        for layer, kept in enumerate(store.kept)
    ]
    classes = size_classes(sizes)
    cycle = token_cycle_bytes((max(layer) for layer in sizes), spec.top_k)
    every = {item.record_bytes: item.num_experts for item in classes}
    if num_slots is not None:
        if num_slots < spec.top_k:
            raise InputError(f"{num_slots} slots are fewer than top_k={spec.top_k}: give more")
        counts = allot_by_count(classes, num_slots)
    elif budget_bytes is None:
        counts = every
    else:
        fixed = bill.non_expert_bytes(terms)
        smallest = smallest_slot_bytes(classes, spec.top_k)
        if budget_bytes - fixed < smallest:
            raise BudgetError(
                f"budget {format_bytes(budget_bytes)} is too small even when experts are paged: "
                f"{bill.describe_terms([term for term in terms if term.name != 'experts'])} and "
                f"{format_bytes(smallest)} of slots need {format_bytes(fixed + smallest)} "
                f"({fixed + smallest} bytes)",
                minimum_bytes=fixed + smallest,
            )
        counts = allot_by_bytes(classes, budget_bytes - fixed, spec.top_k)
    num_bytes = sum(size * count for size, count in counts.items())
    return _Slots(counts, num_bytes, counts != every, num_bytes < cycle and counts != every)


def _cache(
    spec: ModelSpec,
    store: ExpertStore,
    slots: _Slots,
    device: torch.device,
    ram_bytes: int | None,
) -> ExpertCache:
    """Slots on the device, filled as far as they go; the counting starts afterwards."""
    cycle = slots.num_bytes + 1 if slots.is_below_cycle else 0
    host = None
    if ram_bytes and device.type == "cuda":  # on a CPU the slots already are the RAM
        host = HostTier(ram_bytes, is_pinned=True)
    cache = ExpertCache(
        store,
        SlotBuffers(slots.counts, device),
        choose_policy(slots.num_bytes, cycle),
        host=host,
        device=device,
    )
    cache.fill()
    cache.statistics = PagingStatistics()
    return cache


def _resized(term: MemoryTerm, slot_bytes: int) -> MemoryTerm:
    """The bill at this budget: experts take what the slots take."""
    if term.name != "experts":
        return term
    return MemoryTerm(name=term.name, num_bytes=slot_bytes, source="plan", note="slots")


def _warnings(slots: _Slots) -> list[str]:
    if not slots.is_below_cycle:
        return []
    return [
        f"the slots ({format_bytes(slots.num_bytes)}) hold less than one token's experts over all "
        "layers: recency would never hit, so the most frequent experts are kept; a larger budget "
        "is much faster"
    ]
