"""What a model costs under a budget, and how many slots its experts get. No torch: headers only.

`Session` opens a model by these functions; the trace simulator asks them the same questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_moe import budget as bill
from edge_moe.budget import STAGING_BUFFERS
from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import BudgetError, InputError
from edge_moe.gguf_split import is_gguf_name
from edge_moe.overhead import known_overhead, runtime_overhead, tokenizer_bytes
from edge_moe.package import RESIDENT_NAME, Package, is_package
from edge_moe.plan import Device, MemoryTerm
from edge_moe.runtime.expert_store import CheckpointStore, ExpertStore, PackageStore
from edge_moe.runtime.policy import token_cycle_bytes
from edge_moe.runtime.policy_memory import order_terms
from edge_moe.runtime.slots import (
    allot_by_bytes,
    allot_by_count,
    allot_within,
    size_classes,
    smallest_slot_bytes,
)
from edge_moe.safetensors_header import read_header
from edge_moe.spec import ModelSpec
from edge_moe.tensor_info import TensorInfo
from edge_moe.units import format_bytes, round_up_bytes

DEFAULT_CONTEXT_TOKENS = 4096


@dataclass(frozen=True)
class Slots:
    """How the expert bytes are laid out."""

    counts: dict[int, int]
    """Slots per record size."""
    num_bytes: int
    is_paging: bool
    is_below_cycle: bool

    def warnings(self) -> list[str]:
        """What the user should know about these slots."""
        if not self.is_below_cycle:
            return []
        return [
            f"the slots ({format_bytes(self.num_bytes)}) hold less than one token's experts over "
            "all layers: most experts are read anew for every token; a larger budget is much faster"
        ]


def require_one_limit(budget_bytes: int | None, num_slots: int | None) -> None:
    """Raise InputError where both were given: neither is to be ignored."""
    if budget_bytes is not None and num_slots is not None:
        raise InputError("--slots and --budget are two ways to say the same: give one of them")


def open_source(model: Path) -> Package | Checkpoint:
    """The native package or Hugging Face folder at `model`.

    Raises:
        InputError: not a folder.
        PackageError, CheckpointError, SpecError: a damaged one.
    """
    if is_gguf_name(model):
        raise InputError(f"{model} runs in llama.cpp: open it with `GgufSession`")
    if not model.is_dir():
        raise InputError(
            f"{model} is not a folder: give a native package or a Hugging Face checkpoint"
        )
    return Package(model) if is_package(model) else Checkpoint(model)


def open_store(source: Package | Checkpoint) -> ExpertStore:
    """Where the experts of `source` are read from."""
    return PackageStore(source) if isinstance(source, Package) else CheckpointStore(source)


def source_fingerprint(source: Package | Checkpoint) -> str:
    """Fingerprint of the checkpoint that `source` is, or was built from."""
    if isinstance(source, Package):
        return source.manifest.model_fingerprint
    return source.fingerprint


def dense_tensors(source: Package | Checkpoint) -> list[TensorInfo]:
    """Everything but routed experts, as stored."""
    if isinstance(source, Checkpoint):
        return list(source.dense_tensors)
    return list(read_header(source.folder / RESIDENT_NAME)[0].values())


def dense_parameters(source: Package | Checkpoint) -> int:
    """Number of weights outside routed experts; a tied lm_head counts once."""
    return sum(
        bill.num_weights(info)
        for info in dense_tensors(source)
        if not source.spec.is_tied_head(info.name)
    )


def context_length(spec: ModelSpec, asked: int | None) -> int:
    """Tokens of context: what was asked for, or the default within the model's limit.

    Raises:
        InputError: longer than the model's limit.
    """
    if asked is None:
        return min(DEFAULT_CONTEXT_TOKENS, spec.max_position_embeddings)
    if asked > spec.max_position_embeddings:
        raise InputError(
            f"context {asked} is longer than the model's {spec.max_position_embeddings} tokens: "
            "lower --ctx (run) or --window-tokens (eval)"
        )
    return asked


def session_terms(
    source: Package | Checkpoint,
    store: ExpertStore,
    context_tokens: int,
    device: Device,
    *,
    has_budget: bool,
    scored_tokens: int = 1,
) -> list[MemoryTerm]:
    """The bill with every kept expert resident.

    Only a budget is worth measuring overhead for; what was measured before is used without one too.
    """
    spec = source.spec
    find_overhead = runtime_overhead if has_budget else known_overhead
    overhead, origin = find_overhead(spec.model_type, device)
    return bill.memory_terms(
        spec,
        forms=store.forms(),
        dense_bytes=dense_parameters(source) * _itemsize_bytes(spec, device),
        context_tokens=context_tokens,
        device=device,
        target="native",
        runtime_bytes=overhead + tokenizer_bytes(source.folder),
        runtime_source=origin,
        scored_tokens=scored_tokens,
    )


def record_sizes(store: ExpertStore) -> list[list[int]]:
    """[L][rows] packed bytes of every expert."""
    return [
        [store.record((layer, row)).num_bytes for row in range(len(kept))]
        for layer, kept in enumerate(store.kept)
    ]


def all_fit(
    sizes: Sequence[Sequence[int]],
    terms: Sequence[MemoryTerm],
    budget_bytes: int | None,
    num_slots: int | None,
) -> bool:
    """Whether every expert of [L][rows] `sizes` has a slot within these limits."""
    if num_slots is not None:
        return num_slots >= sum(map(len, sizes))
    return budget_bytes is None or budget_bytes >= bill.non_expert_bytes(terms) + sum(
        map(sum, sizes)
    )


def eviction_terms(sizes: Sequence[Sequence[int]]) -> list[MemoryTerm]:
    """RAM of the orders of eviction, one per record size, while experts of these sizes page."""
    return order_terms(list(map(len, sizes)), len({size for layer in sizes for size in layer}))


def paging_terms(
    sizes: Sequence[Sequence[int]],
    terms: list[MemoryTerm],
    device: Device,
    budget_bytes: int | None,
    num_slots: int | None,
) -> list[MemoryTerm]:
    """The bill `terms` of `device`, and what paging adds to it where not every expert fits."""
    if device == "cuda" or all_fit(sizes, terms, budget_bytes, num_slots):
        return terms  # a GPU's orders of eviction are in RAM: `host_terms`
    return [*terms, *eviction_terms(sizes)]


def allot(
    spec: ModelSpec,
    sizes: list[list[int]],
    terms: list[MemoryTerm],
    budget_bytes: int | None,
    num_slots: int | None,
) -> Slots:
    """Slots per record size, for experts of [L][rows] `sizes`.

    Raises:
        BudgetError: `minimum_bytes` is the smallest budget that works, paging included.
        InputError: fewer slots than top_k, or a budget besides.
    """
    require_one_limit(budget_bytes, num_slots)
    classes = size_classes(sizes)
    cycle = token_cycle_bytes((max(layer) for layer in sizes if layer), spec.top_k)
    every = {item.record_bytes: item.num_experts for item in classes}
    if num_slots is not None:
        if num_slots < spec.top_k:
            fewest = max(spec.top_k, len(classes))
            sizes_too = f" and the {fewest} sizes of experts" if fewest > spec.top_k else ""
            raise InputError(
                f"{num_slots} slots are fewer than top_k={spec.top_k}{sizes_too}: give at least "
                f"{fewest}"
            )
        counts = allot_by_count(classes, num_slots)
    elif budget_bytes is None:
        counts = every
    else:
        fixed = bill.non_expert_bytes(terms)
        smallest = smallest_slot_bytes(classes, spec.top_k)
        if budget_bytes - fixed < smallest:
            raise too_small(budget_bytes, terms, smallest, "slots")
        counts = allot_by_bytes(classes, budget_bytes - fixed, spec.top_k)
    num_bytes = sum(size * count for size, count in counts.items())
    return Slots(counts, num_bytes, counts != every, num_bytes < cycle and counts != every)


def staging_bytes(sizes: Sequence[Sequence[int]]) -> int:
    """RAM of the buffers through which experts of [L][rows] `sizes` reach a GPU."""
    return STAGING_BUFFERS * max(map(max, sizes))


def host_slots(
    sizes: Sequence[Sequence[int]], ram_bytes: int, device: Device = "cuda"
) -> dict[int, int]:
    """Experts per record size that `ram_bytes` of RAM keep beside the slots.

    Of a GPU: after staging buffers.

    Raises:
        InputError: less than the staging buffers and one expert take.
    """
    classes, taken = size_classes(sizes), staging_bytes(sizes) if device == "cuda" else 0
    largest = classes[-1].record_bytes
    if ram_bytes < taken + largest:
        raise InputError(
            f"--ram {format_bytes(ram_bytes)} is less than {format_bytes(taken)} of staging "
            f"buffers and one expert take: give at least {round_up_bytes(taken + largest)}, or "
            "leave it out"
        )
    return allot_within(classes, ram_bytes - taken)


def host_terms(
    sizes: Sequence[Sequence[int]],
    device: Device,
    ram_bytes: int | None,
    *,
    is_paging: bool = False,
) -> list[MemoryTerm]:
    """What experts beside the slots take in RAM: no part of the device's budget."""
    staging = MemoryTerm(
        name="staging",
        num_bytes=staging_bytes(sizes),
        source="formula",
        note=f"pinned, {STAGING_BUFFERS} buffers of the largest expert",
    )
    terms = [staging] if device == "cuda" else []
    if is_paging and device == "cuda":
        terms += eviction_terms(sizes)
    if not ram_bytes:
        return terms
    kept = sum(size * count for size, count in host_slots(sizes, ram_bytes, device).items())
    tier = MemoryTerm(name="experts in RAM", num_bytes=kept, source="plan")
    return [tier, *terms]


def too_small(
    budget_bytes: int, terms: list[MemoryTerm], smallest_bytes: int, what: str
) -> BudgetError:
    """The error where not even the `smallest_bytes` of `what` fit beside the other terms."""
    minimum_bytes = bill.non_expert_bytes(terms) + smallest_bytes
    return BudgetError(
        f"budget {format_bytes(budget_bytes)} is too small even when experts are paged: "
        f"{bill.describe_terms([term for term in terms if term.name != 'experts'])} and "
        f"{format_bytes(smallest_bytes)} of {what}; the smallest that works is "
        f"{round_up_bytes(minimum_bytes)}: raise --budget or lower --ctx",
        minimum_bytes=minimum_bytes,
    )


def with_slots(terms: list[MemoryTerm], slot_bytes: int, note: str = "slots") -> list[MemoryTerm]:
    """The bill at this budget: experts take what the slots take."""
    experts = MemoryTerm(name="experts", num_bytes=slot_bytes, source="plan", note=note)
    return [experts if term.name == "experts" else term for term in terms]


def _itemsize_bytes(spec: ModelSpec, device: Device) -> int:
    """Bytes of a dense weight in memory: float32 on a CPU, the checkpoint's dtype on a GPU."""
    return 4 if device == "cpu" or spec.dtype == "float32" else 2
