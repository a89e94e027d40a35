"""Time of one MoE layer's experts on a GPU: Triton's packed kernels, unpacking, and the bound.

    python benchmarks/triton_kernels.py [--forms q8_0,q4_k,tq2_0,mixed] [--tokens 1,4,32,256]

Needs a CUDA device. One layer of the size of Qwen3-30B-A3B's: 8 of 128 experts, hidden size 2048,
width 768; `mixed` gives the experts of a layer q8_0, q4_k, q4_0 and tq2_0 in turn. Several layers
take turns, so that no cache holds them all. In every round tokens choose experts at random, and all
contenders compute the same choice, in turn:

exact     torch, every expert unpacked to the inputs' type, then multiplied (fewer rounds)
triton    edge-moe's engine with Triton's kernels, with the bookkeeping of the slots
kernels   the same two launches alone, gate_up and down, and the copies of their small tables

The bound is the larger of the packed bytes of the chosen experts over the rate at which the device
reads its memory, and their operations over the rate of its best matrix product; both are measured
here. Not yet measured on a GPU: no result of this script is in the repository.
Prints one table and writes benchmarks/results/triton_kernels.json, with the device's name.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from packed_experts import layer_model
from pydantic import BaseModel, ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table

from edge_moe.files import write_text
from edge_moe.formats import expert_bytes, get_form
from edge_moe.measurement import Provenance
from edge_moe.runtime.expert_cache import ExpertCache
from edge_moe.runtime.expert_store import ExpertStore, RecordInfo
from edge_moe.runtime.kernel_choice import choose_kernels
from edge_moe.runtime.packed_experts import SlotExperts
from edge_moe.runtime.paged_experts import ExpertPager
from edge_moe.runtime.policy import Key, LeastRecentlyUsed
from edge_moe.runtime.products import Chosen, Pairs, Products
from edge_moe.runtime.slots import SlotBuffers
from edge_moe.runtime.streams import CudaStreams
from edge_moe.runtime.transfer import DirectTransfer, StagedTransfer, Transfer

RESULTS = Path(__file__).resolve().parent / "results"
MIXED = "mixed"
MIXED_FORMS = ("q8_0", "q4_k", "q4_0", "tq2_0")
SLOT_BYTES = 10**9
"""At least, in layers: more than a device's caches."""
EXACT_ROUNDS = 5
PACKED_ROWS = 64
"""Rows of weights that are packed; matrices repeat them."""
MATRIX_ROWS = 4096
EXACT, TRITON, KERNELS = "exact", "triton", "kernels"


class Shape(NamedTuple):
    """Of the layer."""

    hidden_size: int = 2048
    width: int = 768
    num_experts: int = 128
    top_k: int = 8


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Model):
    """One form and number of tokens: seconds of every round, by contender."""

    form: str
    num_tokens: int
    packed_bytes: int
    """Of the experts that one round reads, on average."""
    operations: int
    """Of one round: two per weight and pair of a token and an expert."""
    read_bytes_per_second: float
    operations_per_second: float
    seconds: dict[str, list[float]]

    @property
    def bound_seconds(self) -> float:
        return max(
            self.packed_bytes / self.read_bytes_per_second,
            self.operations / self.operations_per_second,
        )

    def median(self, name: str) -> float:
        """Of a contender's seconds."""
        return float(np.median(self.seconds[name]))


class Record(_Model):
    """benchmarks/results/triton_kernels.json"""

    provenance: Provenance
    triton_version: str
    torch_version: str
    rows: list[Row]


class LayerStore(ExpertStore):
    """Experts of random weights whose forms take turns, the same in every layer."""

    def __init__(self, forms: tuple[str, ...], shape: Shape, num_layers: int) -> None:
        self._packed = {form: random_expert(form, shape) for form in forms}
        self._forms = list(islice(cycle(forms), shape.num_experts))
        self.kept = [list(range(shape.num_experts))] * num_layers

    def record(self, key: Key) -> RecordInfo:
        form = self._forms[key[1]]
        return RecordInfo(form, len(self._packed[form]))

    def read_into(self, key: Key, buffer: memoryview) -> None:
        buffer[:] = self._packed[self._forms[key[1]]]

    def close(self) -> None:
        """Nothing is open."""


def random_expert(form: str, shape: Shape) -> bytes:
    """A packed expert: a few rows of random weights, again and again."""
    generator = np.random.default_rng(0)

    def packed(rows: int, width: int) -> bytes:
        weights = generator.standard_normal((PACKED_ROWS, width), np.float32) * np.float32(0.03)
        return get_form(form).pack(weights)[np.arange(rows) % PACKED_ROWS].tobytes()

    return packed(2 * shape.width, shape.hidden_size) + packed(shape.hidden_size, shape.width)


class Layers:
    """The layers in the device's slots, and who computes them."""

    def __init__(
        self, forms: tuple[str, ...], shape: Shape, device: torch.device, slot_bytes: int
    ) -> None:
        spec, self.experts = layer_model(*shape)
        sizes = [expert_bytes(form, shape.hidden_size, shape.width) for form in forms]
        per_layer = list(islice(cycle(sizes), shape.num_experts))
        self.num_layers = max(2, -(-slot_bytes // sum(per_layer)))
        self.store = LayerStore(forms, shape, self.num_layers)
        counts = {size: self.num_layers * per_layer.count(size) for size in sizes}
        self.buffers = SlotBuffers(counts, device)
        self._transfer = device_transfer(device, sizes)
        self.cache = ExpertCache(
            self.store, self.buffers, LeastRecentlyUsed, transfer=self._transfer
        )
        self.cache.fill()
        choice = choose_kernels("triton", device, forms)
        found = choice.new_products(spec, self.buffers)
        if found is None or choice.exact_forms:
            raise SystemExit(f"Triton has no kernels for {', '.join(choice.exact_forms)}")
        self.products: Products = found
        self.pagers = {
            name: ExpertPager(spec, self.store, self.cache, None) for name in (EXACT, TRITON)
        }
        packed = SlotExperts(
            self.store, self.cache, self.products, self.pagers[TRITON].unpacked_output
        )
        self.pagers[TRITON].packed = packed

    def kernels(self, layer: int, hidden: torch.Tensor, pairs: Pairs) -> Callable[[], Any]:
        """gate_up and down of all pairs of one layer, whose slots are looked up beforehand."""
        members = list(pairs.members())
        keys = [(layer, member.row) for member in members]
        slots = self.cache.acquire_residents(keys)
        if slots is None:
            raise RuntimeError("every expert has a slot")
        self.cache.release_residents(keys)
        chosen = Chosen(
            forms=[self.store.record(key).form for key in keys],
            slots=slots,
            lengths=[member.stop - member.start for member in members],
            tokens=pairs.tokens,
            num_tokens=len(hidden),
        )
        return partial(self.products.gated, chosen, hidden)

    def close(self) -> None:
        """Free what brought the experts into the slots."""
        self.products.close()
        self._transfer.close()


def device_transfer(device: torch.device, sizes: list[int]) -> Transfer:
    """How records come into slots."""
    if device.type == "cpu":
        return DirectTransfer()
    return StagedTransfer(CudaStreams(device), max(sizes))


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, torch.Tensor]:
    """(seconds until the device is done, result)"""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    found = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, found


def best_rate(run: Callable[[], Any], amount: float, device: torch.device) -> float:
    """`amount` per second, the best of several runs."""
    return amount / min(timed(run, device)[0] for _ in range(8))


def measure(
    form: str,
    num_tokens: int,
    rounds: int,
    device: torch.device,
    *,
    shape: Shape = Shape(),  # noqa: B008  (a tuple)
    slot_bytes: int = SLOT_BYTES,
) -> Row:
    """All contenders on one form, or on all of `MIXED_FORMS`."""
    forms = MIXED_FORMS if form == MIXED else (form,)
    layers = Layers(forms, shape, device, slot_bytes)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = np.random.default_rng(1)
    seconds: dict[str, list[float]] = {name: [] for name in (EXACT, TRITON, KERNELS)}
    read_bytes = []
    for turn in range(-2, rounds):  # the first ones compile
        layer = turn % layers.num_layers
        states = generator.standard_normal((num_tokens, shape.hidden_size), np.float32)
        order = np.argsort(generator.random((num_tokens, shape.num_experts)), axis=1)
        hidden = torch.from_numpy(states).to(device, dtype)
        rows = torch.from_numpy(order[:, : shape.top_k].copy()).to(device)
        weights = torch.full(rows.shape, 1 / shape.top_k, device=device)
        runs: dict[str, Callable[[], Any]] = {
            name: partial(pager.forward, layers.experts, layer, hidden, rows, weights)
            for name, pager in layers.pagers.items()
            if name == TRITON or turn < EXACT_ROUNDS
        }
        runs[KERNELS] = layers.kernels(layer, hidden, Pairs.of(rows, weights))
        found = {}
        for name in sorted(runs, key=lambda name: generator.random()):
            with torch.inference_mode():
                spent, found[name] = timed(runs[name], device)
            if turn >= 0:
                seconds[name].append(spent)
        if EXACT in found:
            require_alike(found[TRITON].float(), found[EXACT].float())
        chosen = np.unique(order[:, : shape.top_k]).tolist()
        read_bytes.append(sum(layers.store.record((layer, row)).num_bytes for row in chosen))
    slab = layers.buffers.buffer(max(layers.buffers.counts)).view(-1)
    words = slab[: slab.numel() // 8 * 8].view(torch.int64)
    num_rows = min(MATRIX_ROWS, 2 * shape.hidden_size)
    matrix = torch.randn(num_rows, num_rows, device=device).to(dtype)
    layers.close()
    return Row(
        form=form,
        num_tokens=num_tokens,
        packed_bytes=int(np.mean(read_bytes)),
        operations=2 * num_tokens * shape.top_k * 3 * shape.hidden_size * shape.width,
        read_bytes_per_second=best_rate(words.sum, 8 * len(words), device),
        operations_per_second=best_rate(lambda: matrix @ matrix, 2.0 * num_rows**3, device),
        seconds=seconds,
    )


def require_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Both computed the same: within the rounding of the inputs' type."""
    error = float((found - expected).norm() / expected.norm())
    if not error < 0.02:
        raise RuntimeError(f"triton differs from exact by {error:.3f} of the output")


def show(rows: list[Row], console: Console) -> None:
    """Medians over the rounds, in microseconds, and the share of the bound that is reached."""
    table = Table(box=box.MARKDOWN)
    titles = ("form", "tokens", "bound", KERNELS, TRITON, EXACT, "bound / kernels")
    for title in (*titles, "exact / triton"):
        table.add_column(title, justify="right")
    for row in rows:
        times = [row.median(name) for name in (KERNELS, TRITON, EXACT)]
        table.add_row(
            *(row.form, str(row.num_tokens), f"{1e6 * row.bound_seconds:.1f}"),
            *(f"{1e6 * each:.1f}" for each in times),
            *(f"{row.bound_seconds / times[0]:.2f}", f"{times[2] / times[1]:.1f}"),
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--forms", default=f"q8_0,q4_0,q4_k,q6_k,tq2_0,q2_0,{MIXED}")
    parser.add_argument("--tokens", default="1,4,32,256", help="numbers of tokens at a time")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "torch finds no CUDA device, and these kernels are not timed on a CPU: run this on a "
            "machine with an NVIDIA GPU, with torch built for CUDA"
        )
    import triton

    device = torch.device("cuda")
    rows = [
        measure(form, int(num_tokens), arguments.rounds, device)
        for form in arguments.forms.split(",")
        for num_tokens in arguments.tokens.split(",")
    ]
    record = Record(
        provenance=Provenance.here(accelerator=torch.cuda.get_device_name(device)),
        triton_version=triton.__version__,
        torch_version=torch.__version__,
        rows=rows,
    )
    write_text(arguments.output / "triton_kernels.json", record.model_dump_json(indent=1) + "\n")
    show(rows, Console(width=150))


if __name__ == "__main__":
    main()
