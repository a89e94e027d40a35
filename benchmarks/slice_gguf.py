"""How fast experts are cut out of a GGUF file, against copying a file on the same disk.

A synthetic Qwen3-MoE file of q4_0 experts is copied (`shutil.copyfile`, then fsync) and sliced
(`slice_gguf`, which flushes too) in turn, each from a cold page cache: once keeping all experts,
once keeping half. Bytes per second count what is written. The bound is half of the copy's rate.

    python benchmarks/slice_gguf.py --folder /big/disk [--gigabytes 1] [--rounds 6]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edge_moe.budget import non_expert_bytes
from edge_moe.converters.copy_range import write_all
from edge_moe.converters.slice_gguf import slice_gguf
from edge_moe.files import write_text
from edge_moe.formats import DROP
from edge_moe.gguf_model import GgufModel
from edge_moe.gguf_raw import RawTensor, header_bytes, offsets, string_key
from edge_moe.measurement import Provenance
from edge_moe.plan import Plan
from edge_moe.planner import make_plan
from edge_moe.source_model import SourceModel
from edge_moe.stats import STATS_VERSION, ExpertStats, StatsInfo

BOUND = 0.5
NUM_EXPERTS, TOP_K, HIDDEN, WIDTH, VOCAB = 128, 8, 1024, 512, 4096
BLOCK_BYTES = 8 * 2**20
RESULT = Path(__file__).parent / "results" / "slice_gguf.json"
_NUMBERS = {
    "embedding_length": HIDDEN,
    "expert_feed_forward_length": WIDTH,
    "attention.head_count": 16,
    "attention.head_count_kv": 4,
    "expert_count": NUM_EXPERTS,
    "expert_used_count": TOP_K,
    "context_length": 4096,
}


def synthetic_gguf(path: Path, num_bytes: int) -> Path:
    """A file of about `num_bytes`, its tensors random bytes: nothing reads them as weights."""
    layer = _layer_tensors(0)
    num_layers = max(1, num_bytes // sum(tensor.num_bytes for tensor in layer))
    tensors = [RawTensor("token_embd.weight", (VOCAB, HIDDEN), "Q8_0")]
    tensors += [tensor for index in range(num_layers) for tensor in _layer_tensors(index)]
    keys = [string_key("general.architecture", "qwen3moe")]
    numbers = _NUMBERS | {"block_count": num_layers}
    keys += [_number_key(f"qwen3moe.{name}", value) for name, value in numbers.items()]
    header = header_bytes(keys, tensors, 32)
    total_bytes = len(header) + offsets(tensors, 32)[-1]
    generator = np.random.default_rng(0)
    with path.open("wb") as handle:
        write_all(handle.fileno(), header, 0)
        for start in range(len(header), total_bytes, BLOCK_BYTES):
            block = generator.bytes(min(BLOCK_BYTES, total_bytes - start))
            write_all(handle.fileno(), block, start)
        os.fsync(handle.fileno())
    return path


def _layer_tensors(layer: int) -> list[RawTensor]:
    up, down = (NUM_EXPERTS, WIDTH, HIDDEN), (NUM_EXPERTS, HIDDEN, WIDTH)
    return [
        RawTensor(f"blk.{layer}.attn_norm.weight", (HIDDEN,), "F32"),
        RawTensor(f"blk.{layer}.attn_q.weight", (2 * HIDDEN, HIDDEN), "Q8_0"),
        RawTensor(f"blk.{layer}.ffn_gate_inp.weight", (NUM_EXPERTS, HIDDEN), "F32"),
        RawTensor(f"blk.{layer}.ffn_gate_exps.weight", up, "Q4_0"),
        RawTensor(f"blk.{layer}.ffn_up_exps.weight", up, "Q4_0"),
        RawTensor(f"blk.{layer}.ffn_down_exps.weight", down, "Q4_0"),
    ]


def _number_key(name: str, value: int) -> bytes:
    text = string_key(name, "")  # name, type, an empty string's length
    return text[:-12] + (4).to_bytes(4, "little") + value.to_bytes(4, "little")


def random_stats(source: SourceModel, forms: tuple[str, ...] = (DROP,)) -> ExpertStats:
    """Losses that mean nothing: experts that stay lie scattered, as they do in practice."""
    spec = source.spec
    info = StatsInfo(
        version=STATS_VERSION,
        edge_moe_version="",
        model_type=spec.model_type,
        model_fingerprint=source.fingerprint,
        tokenizer_fingerprint="",
        data_fingerprint="",
        tasks=("synthetic",),
        window_tokens=1,
        num_windows=1,
        windows=(0,),
        num_tokens=1,
        moe_layer_ids=spec.moe_layer_ids,
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        forms=forms,
    )
    stats = ExpertStats.zeros(info)
    shape = stats.routed_tokens.shape
    stats.form_loss.add(np.random.default_rng(1).uniform(1, 2, (*shape, len(forms))))
    stats.layer_sums["residual_square"].add(np.ones(shape[0]))
    stats.routed_tokens += 1000
    return stats


def plan_keeping(model: GgufModel, share: float) -> Plan:
    """A plan that keeps about this share of the experts' bytes."""
    stats = random_stats(model)

    def planned(budget_bytes: int) -> Plan:
        return make_plan(
            *(model, stats, budget_bytes),
            model=str(model.path),
            target="gguf",
            runtime=(0, "assumed"),
        )

    whole = planned(10**15)
    experts = whole.term("experts").num_bytes
    return planned(non_expert_bytes(whole.terms) + int(share * experts))


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as handle:
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, output: Path) -> None:
    """The rival: what `cp` does, and a flush."""
    shutil.copyfile(source, output)
    with output.open("rb+") as handle:
        os.fsync(handle.fileno())


def rate(source: Path, output: Path, work: Callable[[], object]) -> float:
    """Bytes written per second, from a cold cache to the flushed file, which is removed."""
    forget(source)
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    num_bytes = output.stat().st_size
    output.unlink()
    return num_bytes / seconds


def measure(source: Path, rounds: int) -> dict[str, list[float]]:
    """Name -> bytes per second of every round."""
    model = GgufModel(source)
    output = source.with_name("out.gguf")
    whole, half = plan_keeping(model, 1.0), plan_keeping(model, 0.5)
    jobs: dict[str, Callable[[], object]] = {
        "copy": lambda: copy(source, output),
        "slice, all kept": lambda: slice_gguf(whole, model, output),
        "slice, half kept": lambda: slice_gguf(half, model, output),
    }
    rates: dict[str, list[float]] = {name: [] for name in jobs}
    order = list(jobs)
    for _ in range(rounds):
        for name in order:
            rates[name].append(rate(source, output, jobs[name]))
        order = [*order[1:], order[0]]  # what came before leaves its mark on page cache and disk
    return rates


def summary(rates: dict[str, list[float]], file_bytes: int) -> dict[str, Any]:
    """What is printed and kept."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {name: medians[name] / medians["copy"] for name in medians if name != "copy"}
    return {
        "file_bytes": file_bytes,
        "bytes_per_second": rates,
        "median_bytes_per_second": medians,
        "ratio_to_copy": ratios,
        "bound": BOUND,
        "holds": all(ratio >= BOUND for ratio in ratios.values()),
        "peak_process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = synthetic_gguf(Path(folder) / "source.gguf", int(options.gigabytes * 1e9))
        file_bytes = source.stat().st_size
        found = summary(measure(source, options.rounds), file_bytes)
    for name, value in found["median_bytes_per_second"].items():
        ratio = found["ratio_to_copy"].get(name)
        against = "" if ratio is None else f"  {ratio:.2f} of copy, bound {BOUND}"
        print(f"{name:<18}{value / 1e6:8.0f} MB/s{against}")
    print(f"peak memory of the process {found['peak_process_bytes'] / 1e6:.0f} MB")
    found["provenance"] = Provenance.published().model_dump(mode="json")
    write_text(options.output, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    _main()
