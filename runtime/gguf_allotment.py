"""What a GGUF model costs under a budget, and what its experts get. No llama.cpp: headers only.

`GgufSession` opens a file by these functions; the trace simulator asks them the same questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from edge_moe import budget as bill
from edge_moe.errors import InputError
from edge_moe.gguf_header import GgufTensorInfo
from edge_moe.gguf_model import GgufModel
from edge_moe.offer import stored_forms
from edge_moe.overhead import gguf_overhead
from edge_moe.plan import MemoryTerm
from edge_moe.runtime.allotment import all_fit, require_one_limit, too_small
from edge_moe.runtime.llama_region import PAGE_BYTES
from edge_moe.runtime.policies import DEFAULT_POLICY
from edge_moe.runtime.policy import EvictionPolicy
from edge_moe.runtime.policy_memory import order_terms
from edge_moe.units import format_bytes

GPU_DRIVER_BYTES = 300_000_000
"""RAM that a process with a CUDA context takes besides: an assumption, never measured here."""


def session_terms(
    model: GgufModel, context_tokens: int, *, has_budget: bool, gpu_layers: int = 0
) -> list[MemoryTerm]:
    """The bill with every expert resident; only a budget is worth measuring a process for.

    It is of RAM: what `gpu_layers` put on a GPU is left out.
    """
    setting = bill.Setting(model, "gguf", "cpu", context_tokens, (0, "assumed"))
    rows = [[form] * model.spec.num_experts for form in stored_forms(model)]
    process, source = gguf_overhead(model.header, is_measured=has_budget)
    runtime = MemoryTerm(
        name="runtime", num_bytes=process, source=source, note="a process with llama.cpp"
    )
    terms = [runtime if term.name == "runtime" else term for term in setting.bill(rows)]
    return _without_gpu(model, terms, gpu_layers) if gpu_layers else terms


def _without_gpu(model: GgufModel, terms: list[MemoryTerm], gpu_layers: int) -> list[MemoryTerm]:
    """`terms` less the dense weights and the cache of layers that are on a GPU for certain.

    llama.cpp offloads the last layers, and versions differ in whether the output matrix counts as
    one: so one layer fewer is taken to be there.
    """
    num_layers = model.spec.num_layers
    num_there = min(gpu_layers - 1, num_layers)
    there = tuple(f"blk.{layer_id}." for layer_id in range(num_layers - num_there, num_layers))
    moved = {
        "dense weights": sum(
            info.num_bytes for info in model.dense_tensors if info.name.startswith(there)
        ),
        "KV cache": _evenly(terms, num_there, num_layers) if _is_even(model) else 0,
    }
    found = []
    for term in terms:
        num_bytes = moved.get(term.name, 0)
        note = "; ".join(filter(None, [term.note, f"{format_bytes(num_bytes)} more on the GPU"]))
        change = {"num_bytes": term.num_bytes - num_bytes, "note": note}
        found.append(term.model_copy(update=change) if num_bytes else term)
    gpu = MemoryTerm(
        name="GPU driver", num_bytes=GPU_DRIVER_BYTES, source="assumed", note="RAM of its context"
    )
    return [*found, gpu]


def _is_even(model: GgufModel) -> bool:
    """Whether every layer's cache is as large as the next one's."""
    return not (model.spec.num_sliding_layers or model.spec.state_values)


def _evenly(terms: list[MemoryTerm], num_layers_there: int, num_layers: int) -> int:
    cache = next(term for term in terms if term.name == "KV cache")
    return cache.num_bytes * num_layers_there // num_layers


def largest_expert_bytes(model: GgufModel) -> dict[int, int]:
    """Whole pages that an expert of each layer takes at most."""
    count = model.spec.num_experts
    return {
        layer_id: sum(_pages(info.num_bytes // count) for info in layer.stacks)
        for layer_id, layer in model.layers.items()
    }


def _pages(num_bytes: int) -> int:
    return (-(-num_bytes // PAGE_BYTES) + 1) * PAGE_BYTES


def paging_terms(
    model: GgufModel,
    terms: list[MemoryTerm],
    budget_bytes: int | None,
    num_slots: int | None,
    policy: type[EvictionPolicy] = DEFAULT_POLICY,
) -> list[MemoryTerm]:
    """The bill `terms`, and what paging adds to it where not every expert fits."""
    sizes = expert_sizes(model)
    if num_slots is not None:
        fits = num_slots * max(largest_expert_bytes(model).values()) >= sum(map(sum, sizes))
    else:
        fits = all_fit(sizes, terms, budget_bytes, None)
    return terms if fits else [*terms, *order_terms(num_rows(model), policy=policy)]


def num_rows(model: GgufModel) -> list[int]:
    """[L] experts of each MoE layer."""
    return [model.spec.num_experts] * model.spec.num_moe_layers


def expert_limit_bytes(
    model: GgufModel, terms: list[MemoryTerm], budget_bytes: int | None, num_slots: int | None
) -> int:
    """What experts may take.

    Raises:
        BudgetError: too little for one token.
        InputError: fewer slots than top_k, or a budget besides.
    """
    require_one_limit(budget_bytes, num_slots)
    largest, top_k = max(largest_expert_bytes(model).values()), model.spec.top_k
    if num_slots is not None:
        if num_slots < top_k:
            raise InputError(f"{num_slots} slots are fewer than top_k={top_k}: give at least that")
        return num_slots * largest
    if budget_bytes is None:
        return sum(largest_expert_bytes(model).values()) * model.spec.num_experts
    fixed, smallest = bill.non_expert_bytes(terms), top_k * largest
    if budget_bytes - fixed < smallest:
        raise too_small(budget_bytes, terms, smallest, "experts")
    return budget_bytes - fixed


def batch_tokens(model: GgufModel, limit_bytes: int) -> int:
    """Tokens computed at a time: whatever their routers choose in one layer fits together."""
    spec = model.spec
    fitting = limit_bytes // max(largest_expert_bytes(model).values())
    if fitting >= spec.num_experts:
        return bill.LLAMA_UBATCH_TOKENS
    return max(1, min(fitting // spec.top_k, bill.LLAMA_UBATCH_TOKENS))


def num_pages(offset: int, stride: int, row: int) -> int:
    """Pages of the file that hold row `row` of a stack at `offset`, `stride` bytes each."""
    start = (offset + row * stride) % PAGE_BYTES
    return -(-(start + stride) // PAGE_BYTES)


def expert_sizes(
    model: GgufModel, offsets: Mapping[str, int] = MappingProxyType({})
) -> list[list[int]]:
    """[L][E] bytes that every expert takes in memory: the whole pages that its rows lie in.

    The tensors named in `offsets` begin there in a file of their own.
    """
    count = model.spec.num_experts

    def size(info: GgufTensorInfo, row: int) -> int:
        offset = offsets.get(info.name, info.offset)
        return num_pages(offset, info.num_bytes // count, row) * PAGE_BYTES

    return [
        [sum(size(info, row) for info in model.layers[layer_id].stacks) for row in range(count)]
        for layer_id in sorted(model.layers)
    ]
