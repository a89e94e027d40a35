"""Time of one MoE layer's experts: edge-moe's two kernels beside llama.cpp's own graph.

    python benchmarks/packed_experts.py [--forms q4_k,q8_0,tq2_0] [--tokens 1] [--rounds 40]

One layer of the size of Qwen3-30B-A3B's: 8 of 128 experts, hidden size 2048, width 768. Experts
hold the same random weights at different places in memory; several layers take turns, so that no
cache holds them all. In every round a token (or `--tokens` of them) chooses experts at random, and
all contenders compute the same choice, in turn:

exact               torch, every expert unpacked to float32 (fewer rounds: it is slow)
ggml                edge-moe's slots, libggml's kernels; with the cache's bookkeeping
ggml, rearranged    the same, experts rearranged when they are read, for the types llama.cpp does so
llama.cpp           its graph of the layer (`llama_experts.py`), weights as a GGUF stores them
llama.cpp, rearranged  the same, weights rearranged when they are loaded, for the types it does so

The bound is the packed bytes of the chosen experts over the rate at which this machine's cores read
memory, the best of several passes over all slots, measured before and after.
Prints one table and writes benchmarks/results/packed_experts-T.json.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads stall others

import numpy as np
import torch
from llama_experts import LlamaLayer
from pydantic import BaseModel, ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table

from edge_moe.files import write_text
from edge_moe.formats import expert_bytes, expert_packed_bytes, ggml_library
from edge_moe.formats.ggml_types import GGML_TYPES_BY_NAME
from edge_moe.measurement import Provenance
from edge_moe.minimal_model import minimal_config
from edge_moe.runtime.expert_cache import ExpertCache
from edge_moe.runtime.expert_store import ExpertStore, RecordInfo
from edge_moe.runtime.kernels.ggml_products import Backend
from edge_moe.runtime.model import meta_model
from edge_moe.runtime.packed_experts import SlotExperts
from edge_moe.runtime.paged_experts import ExpertPager, register_experts
from edge_moe.runtime.policy import Key, LeastRecentlyUsed
from edge_moe.runtime.rearranged_store import RearrangedStore
from edge_moe.runtime.slot_products import SlotProducts
from edge_moe.runtime.slots import SlotBuffers
from edge_moe.spec import ModelSpec

RESULTS = Path(__file__).resolve().parent / "results"
HIDDEN, WIDTH, NUM_EXPERTS, TOP_K = 2048, 768, 128, 8
SLOT_BYTES = 10**9
"""At least, in layers of 128 experts: more than a core's caches."""
DISTINCT = 4
EXACT_ROUNDS = 4
EXACT, GGML, LLAMA = "exact", "ggml", "llama.cpp"
GGML_REARRANGED, LLAMA_REARRANGED = f"{GGML}, rearranged", f"{LLAMA}, rearranged"
RATIOS = (
    *((GGML, name) for name in (LLAMA, LLAMA_REARRANGED, EXACT)),
    (GGML_REARRANGED, LLAMA_REARRANGED),
)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Model):
    """One form: seconds of every round, by contender."""

    form: str
    packed_bytes: int
    """Of the experts that one round reads, on average."""
    read_bytes_per_second: float
    load_average: float
    seconds: dict[str, list[float]]

    @property
    def bound_seconds(self) -> float:
        return self.packed_bytes / self.read_bytes_per_second

    def median(self, name: str) -> float | None:
        """Of a contender's seconds; None where it did not run."""
        return float(np.median(self.seconds[name])) if self.seconds.get(name) else None

    def best(self, name: str) -> float | None:
        """The shortest of a contender's seconds; None where it did not run."""
        return min(self.seconds[name]) if self.seconds.get(name) else None

    def ratio(self, name: str, other: str) -> float | None:
        """Median over the rounds of `name`'s seconds in units of `other`'s in the same round."""
        mine, others = self.seconds.get(name), self.seconds.get(other)
        if not mine or not others:
            return None
        return float(np.median([a / b for a, b in zip(mine, others, strict=False)]))


class Record(_Model):
    """benchmarks/results/packed_experts-T.json"""

    provenance: Provenance
    num_tokens: int
    num_threads: int
    rows: list[Row]


class RepeatedStore(ExpertStore):
    """A few packed experts, again and again."""

    def __init__(self, form: str, packed: list[bytes], num_layers: int) -> None:
        self._info = RecordInfo(form, len(packed[0]))
        self._packed = packed
        self.kept = [list(range(NUM_EXPERTS))] * num_layers

    def record(self, key: Key) -> RecordInfo:
        return self._info

    def read_into(self, key: Key, buffer: memoryview) -> None:
        buffer[:] = self._packed[key[1] % len(self._packed)]

    def close(self) -> None:
        """Nothing is open."""


def random_experts(form: str) -> list[bytes]:
    """Packed experts of random weights."""
    generator, kind = np.random.default_rng(0), GGML_TYPES_BY_NAME[form.upper()]

    def packed(rows: int, width: int) -> bytes:
        weights = generator.standard_normal((rows, width), np.float32) * np.float32(0.03)
        return ggml_library.quantize_chunk(kind, weights, None).tobytes()

    return [packed(2 * WIDTH, HIDDEN) + packed(HIDDEN, WIDTH) for _ in range(DISTINCT)]


def layer_model(
    hidden_size: int = HIDDEN,
    width: int = WIDTH,
    num_experts: int = NUM_EXPERTS,
    top_k: int = TOP_K,
) -> tuple[ModelSpec, Any]:
    """(spec, transformers' experts module without weights) of a layer like Qwen3's."""
    import json
    import tempfile

    config = minimal_config("qwen3_moe", width, num_experts) | {
        "hidden_size": hidden_size,
        "num_experts_per_tok": top_k,
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "dtype": "bfloat16",
    }
    register_experts()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        spec = ModelSpec.from_file(Path(folder) / "config.json")
        model = meta_model(Path(folder), torch.float32, "edge_moe_paged")
    return spec, model.get_submodule(spec.moe_module(0)).experts


def read_rate(memory: torch.Tensor) -> float:
    """Bytes per second of reading `memory` once on all threads, the best of several passes."""
    words = memory.view(-1)[: memory.numel() // 8 * 8].view(torch.int64)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        words.sum()
        best = min(best, time.perf_counter() - start)
    return 8 * len(words) / best


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result)"""
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def measure(form: str, num_tokens: int, rounds: int) -> Row:
    """All contenders on one form."""
    spec, experts = layer_model()
    packed = random_experts(form)
    record_bytes = expert_bytes(form, HIDDEN, WIDTH)
    num_layers = max(2, -(-SLOT_BYTES // (NUM_EXPERTS * record_bytes)))
    store = RepeatedStore(form, packed, num_layers)
    rearranged = RearrangedStore(store, spec, {form})
    buffers = SlotBuffers({record_bytes: num_layers * NUM_EXPERTS}, torch.device("cpu"))
    with ExitStack() as stack:
        pagers = {GGML: packed_pager(stack, spec, store, buffers)}
        pagers[EXACT] = ExpertPager(spec, store, pagers[GGML].cache, None)
        if rearranged.has_any:
            others = SlotBuffers(buffers.counts, torch.device("cpu"))
            pagers[GGML_REARRANGED] = packed_pager(stack, spec, rearranged, others)
        rate = read_rate(buffers.buffer(record_bytes))
        layers = llama_layers(stack, form, packed, num_layers, num_tokens)
        seconds: dict[str, list[float]] = {name: [] for name in (*pagers, *layers)}
        generator, read_bytes = np.random.default_rng(1), []
        for turn in range(-2, rounds):
            layer = turn % num_layers
            hidden = generator.standard_normal((num_tokens, HIDDEN), np.float32)
            rows = np.argsort(generator.random((num_tokens, NUM_EXPERTS)), axis=1)[:, :TOP_K]
            weights = generator.random((num_tokens, TOP_K), np.float32)
            tensors = torch.from_numpy(hidden), torch.from_numpy(rows), torch.from_numpy(weights)
            arrays = hidden, np.ascontiguousarray(rows, np.int32), weights
            runs: dict[str, Callable[[], Any]] = {
                name: partial(pager.forward, experts, layer, *tensors)
                for name, pager in pagers.items()
                if name != EXACT or turn < min(rounds, EXACT_ROUNDS)
            }
            runs |= {name: partial(each[layer], *arrays) for name, each in layers.items()}
            found = {}
            for name in sorted(runs, key=lambda name: generator.random()):
                with torch.inference_mode():
                    spent, found[name] = timed(runs[name])
                if turn >= 0:
                    seconds[name].append(spent)
            _require_alike(found)
            read_bytes.append(len(np.unique(rows)) * record_bytes)
    rate = max(rate, read_rate(buffers.buffer(record_bytes)))
    return Row(
        form=form,
        packed_bytes=int(np.mean(read_bytes)),
        read_bytes_per_second=rate,
        load_average=round(os.getloadavg()[0], 2),
        seconds=seconds,
    )


def packed_pager(
    stack: ExitStack, spec: ModelSpec, store: ExpertStore, buffers: SlotBuffers
) -> ExpertPager:
    """With every expert of `store` in its slot."""
    cache = ExpertCache(store, buffers, LeastRecentlyUsed)
    cache.fill()
    products = SlotProducts(
        *(spec, buffers, frozenset(store.all_forms())),
        is_rearranged=isinstance(store, RearrangedStore),
    )
    stack.callback(products.close)
    pager = ExpertPager(spec, store, cache, None)
    pager.packed = SlotExperts(store, cache, products, pager.unpacked_output)
    return pager


def llama_layers(
    stack: ExitStack, form: str, packed: list[bytes], num_layers: int, num_tokens: int
) -> dict[str, list[LlamaLayer]]:
    """llama.cpp's graph of every layer, as stored and, where it does so, rearranged."""
    backend = Backend(torch.get_num_threads())
    stack.callback(backend.close)
    gate, up, _ = expert_packed_bytes(form, HIDDEN, WIDTH)
    parts = [(one[:gate], one[gate : gate + up], one[gate + up :]) for one in packed]
    experts = [parts[number % DISTINCT] for number in range(NUM_EXPERTS)]
    found: dict[str, list[LlamaLayer]] = {}
    for name in (LLAMA, LLAMA_REARRANGED):
        try:
            for _ in range(num_layers):
                layer = LlamaLayer(
                    *(form, experts, (HIDDEN, WIDTH)),
                    backend=backend,
                    num_tokens=num_tokens,
                    top_k=TOP_K,
                    is_rearranged=name == LLAMA_REARRANGED,
                )
                stack.callback(layer.close)
                found.setdefault(name, []).append(layer)
        except NotImplementedError:
            continue
    return found


def _require_alike(found: dict[str, Any]) -> None:
    """All computed the same: within the rounding of inputs to 8 bits."""
    expected = np.asarray(found[GGML])
    for name, values in found.items():
        error = np.linalg.norm(np.asarray(values) - expected) / np.linalg.norm(expected)
        if not error < 0.03:
            raise RuntimeError(f"{name} differs from ggml by {error:.3f} of the output")


def show(rows: Sequence[Row], console: Console) -> None:
    """Medians over the rounds / best round, in milliseconds; then medians of ratios."""
    names = (GGML, GGML_REARRANGED, LLAMA, LLAMA_REARRANGED, EXACT)
    table = Table(box=box.MARKDOWN)
    for title in ("form", "bound", *names, *(" / ".join(pair) for pair in RATIOS)):
        table.add_column(title, justify="right")
    for row in rows:
        times = [(row.median(name), row.best(name)) for name in names]
        table.add_row(
            row.form,
            f"{1000 * row.bound_seconds:.2f}",
            *(
                f"{1000 * median:.2f} / {1000 * best:.2f}" if median and best else "-"
                for median, best in times
            ),
            *(
                f"{ratio:.3g}" if (ratio := row.ratio(*pair)) is not None else "-"
                for pair in RATIOS
            ),
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--forms", default="q4_k,q8_0,tq2_0,q4_0,q6_k", help="separated by commas")
    parser.add_argument("--tokens", type=int, default=1, help="tokens at a time")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    arguments = parser.parse_args()
    rows = [
        measure(form, arguments.tokens, arguments.rounds) for form in arguments.forms.split(",")
    ]
    record = Record(
        provenance=Provenance.published(),
        num_tokens=arguments.tokens,
        num_threads=torch.get_num_threads(),
        rows=rows,
    )
    path = arguments.output / f"packed_experts-{arguments.tokens}.json"
    write_text(path, record.model_dump_json(indent=1) + "\n")
    show(rows, Console(width=200))


if __name__ == "__main__":
    main()
