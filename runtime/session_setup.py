"""`Setup`: what a session of edge-moe's own runtime is made of, settled before weights are loaded.

Everything here comes from headers, so that what cannot run is refused at once.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import InputError
from edge_moe.package import Package
from edge_moe.plan import MemoryTerm
from edge_moe.runtime import memory
from edge_moe.runtime.adapter import merge_adapter
from edge_moe.runtime.allotment import (
    allot,
    context_length,
    dense_tensors,
    host_terms,
    open_store,
    paging_terms,
    record_sizes,
    session_terms,
    source_fingerprint,
)
from edge_moe.runtime.delta_dense import add_dense
from edge_moe.runtime.delta_store import DeltaStore, kernels_beside, open_delta
from edge_moe.runtime.expert_store import ExpertStore
from edge_moe.runtime.kernel_choice import KernelChoices, Kernels, choose_kernels
from edge_moe.runtime.kernels.ggml_products import ggml_cpu
from edge_moe.runtime.kv_cache import share_key_value_heads
from edge_moe.runtime.model import build_model
from edge_moe.runtime.paged_experts import register_experts
from edge_moe.runtime.pre_gated_routing import require_pre_gate
from edge_moe.runtime.predictor_choice import linear_term, predictor_terms, require_linear
from edge_moe.runtime.rearranged_store import RearrangedStore
from edge_moe.runtime.residency import PagingOptions
from edge_moe.runtime.shadow_allotment import Allotment, Limits, allot_experts
from edge_moe.runtime.shadow_store import ShadowStore, open_shadows


@dataclass(frozen=True)
class Setup:
    """See the module."""

    source: Package | Checkpoint
    store: ExpertStore
    """Every expert that the folder holds."""
    shadows: ShadowStore | None
    """Where misses may be computed from them."""
    context_tokens: int
    limits: Limits
    options: PagingOptions
    kernels: KernelChoices
    terms: list[MemoryTerm]
    """The bill with every expert of `store` resident."""

    @classmethod
    def open(
        cls,
        source: Package | Checkpoint,
        options: PagingOptions,
        limits: Limits,
        *,
        context_tokens: int | None,
        scored_tokens: int,
        delta: Path | None = None,
    ) -> Setup:
        """Open the stores, and settle the rest; the arguments are those of `Session.open`.

        Raises:
            DeltaError: a damaged delta, or one of another model.
            BudgetError: the budget cannot hold the model even when paging.
            InputError, CheckpointError, MissingExtraError: `source` cannot be run like this.
        """
        context = context_length(source.spec, context_tokens)
        with ExitStack() as held:  # closed where opening fails
            store = open_store(source)
            held.callback(store.close)
            rearranging = _rearranging(source, store, options)
            store = rearranging or store
            if delta is not None:
                task = open_delta(delta, source_fingerprint(source), source.spec)
                store = DeltaStore(store, task, source.spec)
                options = replace(options, kernels=kernels_beside(store, options))
            shadows = open_shadows(source) if options.stall.uses_shadows else None
            if shadows is not None:
                held.callback(shadows.close)
            kernels = _choose_kernels(options, store, shadows)
            has_budget = limits.budget_bytes is not None
            terms = _bill(
                *(source, store, context, options),
                has_budget=has_budget,
                scored_tokens=scored_tokens,
            )
            if rearranging is not None:
                terms.append(rearranging.term())
            setup = cls(source, store, shadows, context, limits, options, kernels, terms)
            setup.require_room()
            held.pop_all()
        return setup

    def require_room(self) -> None:
        """Refuse limits before anything is loaded.

        Raises:
            BudgetError: the budget cannot hold the model even when paging.
            InputError: fewer slots than top_k, or RAM for less than one expert.
        """
        self.allot(self.store, self.shadows)
        host_terms(record_sizes(self.store), self.options.kind, self.options.tier_bytes)

    def allot(self, store: ExpertStore, shadows: ExpertStore | None = None) -> Allotment:
        """Slots within the limits for the experts of `store`, which are some or all of these."""
        kind = self.options.kind
        return allot_experts(self.source.spec, store, shadows, self.terms, self.limits, kind)

    def allot_one_layer(self) -> Allotment:
        """Slots for the experts of the largest layer only."""
        most = max(map(len, self.store.kept))
        sizes = record_sizes(self.store)
        terms = paging_terms(sizes, self.terms, self.options.kind, None, most)
        return Allotment(allot(self.source.spec, sizes, terms, None, most), terms)

    def load_network(self) -> Any:
        """The transformers model with its dense weights, and experts yet to be attached.

        Raises:
            SpecError, CheckpointError, PackageError, DeltaError: as `build_model`, `merge_adapter`
                and `add_dense`.
        """
        source, device = self.source, self.options.device
        share_key_value_heads(device)
        register_experts()
        num_rows = [len(kept) for kept in self.store.kept]
        network = build_model(source.spec, source.folder, dense_tensors(source), num_rows, device)
        if isinstance(source, Package):
            merge_adapter(network, source)
        if isinstance(self.store, DeltaStore):
            add_dense(network, self.store.delta, source.spec, self.store.kept)
        memory.trim()
        return network

    def close(self) -> None:
        """Close the files."""
        self.store.close()
        if self.shadows is not None:
            self.shadows.close()


def find_device(name: str | None) -> torch.device:
    """The device called `name`; by default CUDA where there is any.

    Raises:
        InputError: CUDA, and torch finds none.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, but torch finds no CUDA GPU: use --device cpu")
    return torch.device(name)


def _rearranging(
    source: Package | Checkpoint, store: ExpertStore, options: PagingOptions
) -> RearrangedStore | None:
    """`store` with its experts rearranged, where that was asked for.

    Raises:
        InputError: none of them can be, or another version of libggml.
        MissingExtraError: llama-cpp-python is not installed.
    """
    if not options.rearranged:
        return None
    ggml_cpu()
    choice = choose_kernels(options.kernels, options.device, store.all_forms())
    found = RearrangedStore(store, source.spec, choice.packed_forms)
    if found.has_any:
        return found
    remedy = "leave out --rearranged"
    if isinstance(source, Checkpoint):
        remedy += ", or build a package in q4_0 or q4_k"
    raise InputError(
        f"{source.folder}: llama.cpp has no faster kernels for its experts on this CPU: {remedy}"
    )


def _choose_kernels(
    options: PagingOptions, store: ExpertStore, shadows: ExpertStore | None
) -> KernelChoices:
    kernels, device = options.kernels, options.device
    experts, misses = choose_kernels(kernels, device, store.all_forms()), None
    if options.tier_bytes and options.misses != "fetch":
        on_cpu: Kernels = "auto" if kernels == "triton" else kernels
        misses = choose_kernels(on_cpu, torch.device("cpu"), store.all_forms())
    of_shadows = None if shadows is None else choose_kernels(kernels, device, shadows.all_forms())
    if options.rearranged:
        experts = replace(experts, is_rearranged=True)
        misses = None if misses is None else replace(misses, is_rearranged=True)
    return KernelChoices(experts, misses, of_shadows)


def _bill(
    source: Package | Checkpoint,
    store: ExpertStore,
    context_tokens: int,
    options: PagingOptions,
    *,
    has_budget: bool,
    scored_tokens: int,
) -> list[MemoryTerm]:
    """With every expert of `store` resident, and what guesses the next ones."""
    terms = session_terms(
        *(source, store, context_tokens, options.kind),
        has_budget=has_budget,
        scored_tokens=scored_tokens,
    )
    if options.kind == "cpu":  # a GPU's tier is no part of what the device may hold
        terms += host_terms(record_sizes(store), "cpu", options.tier_bytes)
    if isinstance(store, DeltaStore):
        terms.append(store.term())
    linear = options.linear
    if linear is not None:
        require_linear(linear, source.spec, source_fingerprint(source), store.kept)
        terms.append(linear_term(linear))
    gate = options.pre_gate
    if gate is not None:
        require_pre_gate(gate, source.spec, source_fingerprint(source), store.kept)
        return [*terms, gate.memory_term]
    names = () if options.prefetch is False else options.predictors
    return terms + predictor_terms(names, [len(kept) for kept in store.kept])
