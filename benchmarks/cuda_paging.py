"""A model larger than VRAM on a CUDA GPU: edge-moe's engine beside llama.cpp's and accelerate's.

    python benchmarks/cuda_paging.py --package OUT --gguf OUT.gguf --checkpoint FOLDER --text FILE

The three are one model: a native package and a GGUF of the same plan, and the checkpoint they were
made from; engines whose model is not given, or that cannot run here, are left out, and it says so.
Every run is a process of its own under a cap of VRAM, which torch enforces for edge-moe and
accelerate; llama.cpp gets as many layers' experts as fit by their bytes, the rest stays on the CPU
as with --n-cpu-moe, and what it really took is measured. Tokens are given, so all compute the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from edge_moe.files import write_text
from edge_moe.measurement import Provenance
from edge_moe.units import parse_bytes

WORKER = Path(__file__).with_name("cuda_paging_worker.py")
RESULT = Path(__file__).parent / "results" / "cuda_paging.json"
CAPS = ("8GB", "12GB", "16GB")
COPY_BYTES = 256 * 2**20
COPIES = 5


def bandwidths() -> dict[str, float]:
    """Bytes per second of large copies, the best of a few: over the link both ways, and in RAM."""
    import torch

    device = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    pageable = torch.zeros(COPY_BYTES, dtype=torch.uint8)
    pinned = torch.zeros(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    other = torch.zeros(COPY_BYTES, dtype=torch.uint8)
    pairs = {
        "pinned to device": (pinned, device),
        "device to pinned": (device, pinned),
        "pageable to device": (pageable, device),
        "device": (device, torch.empty_like(device)),
        "host": (pageable, other),
    }
    return {name: max(_rates(source, target)) for name, (source, target) in pairs.items()}


def _rates(source: Any, target: Any) -> Iterator[float]:
    import torch

    for _ in range(COPIES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        yield COPY_BYTES / (time.perf_counter() - start)


def contenders(arguments: argparse.Namespace, console: Console) -> dict[str, Path]:
    """Engine -> its model; says what is left out."""
    found: dict[str, Path] = dict.fromkeys(("edge-moe", "fetch", "cpu"), arguments.package)
    reason = _no_llama(arguments.gguf)
    if reason:
        console.print(f"llama.cpp is left out: {reason}")
    else:
        found["llama.cpp"] = arguments.gguf
    if arguments.checkpoint is None or importlib.util.find_spec("accelerate") is None:
        missing = "no --checkpoint" if arguments.checkpoint is None else "pip install accelerate"
        console.print(f"accelerate is left out: {missing}")
    else:
        found["accelerate"] = arguments.checkpoint
    return found


def _no_llama(gguf: Path | None) -> str:
    """Why llama.cpp cannot take part; empty where it can."""
    if gguf is None:
        return "no --gguf"
    if importlib.util.find_spec("llama_cpp") is None:
        return "llama-cpp-python is not installed"
    from llama_cpp import llama_cpp

    if not llama_cpp.llama_supports_gpu_offload():
        return 'built without CUDA: CMAKE_ARGS="-DGGML_CUDA=on" pip install llama-cpp-python'
    return ""


def run(
    engine: str, model: Path, ids: Path, vram_bytes: int, ram_bytes: int, prompt_tokens: int
) -> dict[str, Any]:
    """One run; {"error": ...} where the engine cannot run under the cap."""
    command = [sys.executable, str(WORKER), engine, str(model), str(ids)]
    command += [str(vram_bytes), str(ram_bytes), str(prompt_tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"error": lines[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(runs: list[dict[str, Any]]) -> Table:
    """Medians over rounds, by cap and engine."""
    shown = Table("cap", "engine", "tok/s", "prefill", "VRAM", "same as edge-moe")
    for cap in dict.fromkeys(each["cap"] for each in runs):
        own = [each for each in runs if each["cap"] == cap]
        wanted: list[int] = next((each["chosen"] for each in own if "chosen" in each), [])
        for engine in dict.fromkeys(each["engine"] for each in own):
            of_engine = [each for each in own if each["engine"] == engine]
            good = [each for each in of_engine if "error" not in each]
            if not good:
                shown.add_row(cap, engine, "-", "-", "-", of_engine[0]["error"])
                continue
            pairs = list(zip(good[0]["chosen"], wanted, strict=False))
            same = sum(left == right for left, right in pairs) / max(len(pairs), 1)
            shown.add_row(
                cap,
                engine,
                f"{_median(good, 'warm_tokens_per_second'):.2f}",
                f"{_median(good, 'prefill_tokens_per_second'):.1f}",
                f"{_median(good, 'vram_bytes') / 1e9:.2f} GB",
                f"{same:.1%}",
            )
    return shown


def _median(runs: list[dict[str, Any]], name: str) -> float:
    return float(statistics.median(each[name] for each in runs))


def token_ids(package: Path, text: Path, count: int) -> list[int]:
    """The first tokens of a text.

    Exits where it has too few.
    """
    from edge_moe.runtime.tokenizer import load_tokenizer

    ids: list[int] = load_tokenizer(package)(text.read_text(encoding="utf-8"))["input_ids"]
    if len(ids) < count:
        raise SystemExit(f"{text} has {len(ids)} tokens, {count} are needed: give a longer one")
    return ids[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--package", type=Path, required=True, help="native package")
    parser.add_argument("--gguf", type=Path, help="the same plan as .gguf")
    parser.add_argument("--checkpoint", type=Path, help="what both were built from")
    parser.add_argument("--text", type=Path, required=True, help="text to feed")
    parser.add_argument("--caps", nargs="*", default=CAPS, help="VRAM, such as 8GB")
    parser.add_argument("--ram", type=parse_bytes, default=parse_bytes("32GB"), metavar="SIZE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--write", action="store_true", help=f"keep the runs in {RESULT.name}")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(
            "no CUDA device: torch finds none, and nothing here is worth measuring without one; "
            "run it on a machine with a GPU and a CUDA build of torch"
        )
    console = Console(stderr=True)
    rates = bandwidths()
    for name, rate in rates.items():
        console.print(f"{name}: {rate / 1e9:.1f} GB/s")
    engines, runs = contenders(arguments, console), []
    count = arguments.prompt_tokens + arguments.tokens
    with tempfile.TemporaryDirectory(prefix="edge-moe-bench-") as folder:
        ids = Path(folder) / "ids.npy"
        np.save(ids, np.array(token_ids(arguments.package, arguments.text, count)))
        for number in range(arguments.rounds):
            for cap in arguments.caps:
                for engine, model in engines.items():
                    vram_bytes, prompt = parse_bytes(cap), arguments.prompt_tokens
                    found = run(engine, model, ids, vram_bytes, arguments.ram, prompt)
                    runs.append({"round": number, "cap": cap, "engine": engine, **found})
                    speed = found.get("warm_tokens_per_second", found.get("error"))
                    console.print(cap, engine, speed)
    Console(width=140).print(table(runs))
    if arguments.write:
        provenance = Provenance.here(accelerator=torch.cuda.get_device_name())
        content = {
            "provenance": provenance.model_copy(update={"folder": ""}).model_dump(mode="json"),
            "bytes_per_second": rates,
            "ram_bytes": arguments.ram,
            "runs": runs,
        }
        write_text(RESULT, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
