"""A model larger than its memory: edge-moe's paging of a GGUF beside llama.cpp's mapping.

    python benchmarks/paging_model.py --folder /big/disk
    python benchmarks/paging.py --folder /big/disk [--caps 0.75 0.5 0.25] [--rounds 3]

Every run is a process of its own in a memory cgroup (v1) of a share of the file's bytes; the file's
cached pages are dropped before it. Engines take turns; tokens are given, so all compute the same.
`ram` has no cap. Ratios are medians of rounds, of decoding from the second half of the tokens on.

The limit of a token's time is the larger of what the same engine takes without a cap, and what the
disk takes for the same pieces in the same order right afterwards, where nobody computes: reading
and computing wholly at the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from memory_cgroup import memory_cgroup, peak_bytes, run_in
from paging_model import FACTS_NAME, TEXT_NAME
from paging_worker import REARRANGED_FOLDER
from rich.console import Console
from rich.table import Table

from edge_moe.files import write_text
from edge_moe.measurement import Provenance

WORKER = Path(__file__).with_name("paging_worker.py")
RESULT = Path(__file__).parent / "results" / "paging.json"
ENGINES = ("edge-moe", "rearranged", "lru", "willneed", "random", "stock")
UNCAPPED = ("ram", "edge-moe", "rearranged")
FEWER_TOKENS = {"stock": 6, "random": 20}
"""Of the slow: seconds per token."""


def drop_cached(path: Path) -> None:
    """Pages that other processes cached would not be charged to the cgroup."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def run(
    engine: str, path: Path, cap_bytes: int | None, prompt_tokens: int, num_tokens: int
) -> dict[str, Any]:
    """One run; `cap_bytes` None has no cap."""
    for file in (path, *path.parent.glob(f"{REARRANGED_FOLDER}/*")):
        drop_cached(file)
    command = [sys.executable, str(WORKER), engine, str(path), str(path.parent / TEXT_NAME)]
    command += [str(cap_bytes or 0), str(prompt_tokens), str(num_tokens)]
    with nullcontext() if cap_bytes is None else memory_cgroup(cap_bytes) as group:
        done = run_in(group, command, timeout_seconds=None)
        if done.returncode:
            raise RuntimeError(f"{engine}: {done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        if group is not None and cap_bytes is not None:
            peak = peak_bytes(group)
            found |= {"cap_bytes": cap_bytes, "cgroup_peak_bytes": peak}
            if peak > cap_bytes:
                raise RuntimeError(f"{engine}: the cap of {cap_bytes} did not hold: {peak}")
    again = found["facts"].pop("warm_reads_again_seconds", None)
    if again is not None:
        found["warm_reads_again_seconds_per_token"] = again / (num_tokens - num_tokens // 2)
    return found


def limits(runs: list[dict[str, Any]]) -> Table:
    """How far from the limit a token's time is, term by term, in milliseconds."""
    columns = ("measured", "compute", "reading", "GB/s", "limit", "share of the limit")
    shown = Table("cap", "engine", *columns)
    for share in dict.fromkeys(each["share"] for each in runs if each["share"]):
        for engine in ("edge-moe", "rearranged"):
            speed = _median(runs, share, engine, "warm_tokens_per_second")
            alone = _median(runs, None, engine, "warm_tokens_per_second")
            if not speed or not alone:
                continue
            read = _median(runs, share, engine, "warm_reads_again_seconds_per_token")
            num_bytes = _median(runs, share, engine, "warm_read_bytes_per_token")
            limit = max(1 / alone, read)
            shown.add_row(
                f"{share:.0%}",
                engine,
                *(f"{1e3 * value:.0f}" for value in (1 / speed, 1 / alone, read)),
                f"{num_bytes / read / 1e9:.2f}" if read else "-",
                f"{1e3 * limit:.0f}",
                f"{limit * speed:.0%}",
            )
    return shown


def table(runs: list[dict[str, Any]], file_bytes: int) -> Table:
    """Medians over rounds, by cap and engine."""
    columns = ("cap", "engine", "tok/s", "x of ram", "prefill", "first token", "MB/token", "peak")
    shown = Table(*columns)
    in_ram = _median(runs, None, "ram", "warm_tokens_per_second")
    caps = list(dict.fromkeys(each["share"] for each in runs))
    for share in caps:
        for engine in dict.fromkeys(each["engine"] for each in runs if each["share"] == share):
            speed = _median(runs, share, engine, "warm_tokens_per_second")
            peak = _median(runs, share, engine, "cgroup_peak_bytes" if share else "peak_bytes")
            shown.add_row(
                "-" if share is None else f"{share:.0%}",
                engine,
                f"{speed:.2f}",
                f"{speed / in_ram:.2f}" if in_ram else "-",
                f"{_median(runs, share, engine, 'prefill_tokens_per_second'):.1f}",
                f"{_median(runs, share, engine, 'first_token_seconds'):.1f} s",
                f"{_median(runs, share, engine, 'warm_read_bytes_per_token') / 1e6:.0f}",
                f"{peak / file_bytes:.0%}",
            )
    return shown


def routing(facts: dict[str, Any]) -> Table:
    """How the model is routed, beside the demo model."""
    columns = [name for name, values in facts.items() if isinstance(values, dict)]
    shown = Table("routing", *columns)
    for name in facts[columns[0]]:
        shown.add_row(name, *(f"{facts[column][name]:.3f}" for column in columns))
    return shown


def _median(runs: list[dict[str, Any]], share: float | None, engine: str, name: str) -> float:
    found = [each[name] for each in runs if (each["share"], each["engine"]) == (share, engine)]
    return statistics.median(found) if found else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--caps", type=float, nargs="*", default=[0.75, 0.5, 0.25])
    parser.add_argument("--engines", nargs="*", default=ENGINES, choices=ENGINES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--write", action="store_true", help=f"keep the runs in {RESULT.name}")
    arguments = parser.parse_args()
    path, console = arguments.folder / "paging.gguf", Console(stderr=True)
    file_bytes, runs = path.stat().st_size, []
    for _ in range(arguments.rounds):
        for share in [None, *arguments.caps]:
            for engine in UNCAPPED if share is None else arguments.engines:
                cap = None if share is None else int(share * file_bytes)
                tokens = FEWER_TOKENS.get(engine, arguments.tokens)
                found = run(engine, path, cap, arguments.prompt_tokens, tokens)
                runs.append({"share": share, "num_tokens": tokens, **found})
                console.print(share, engine, round(found["warm_tokens_per_second"], 2))
    facts = json.loads((arguments.folder / FACTS_NAME).read_text())
    Console(width=140).print(routing(facts))
    Console(width=140).print(table(runs, file_bytes))
    Console(width=140).print(limits(runs))
    if arguments.write:
        content = {
            "provenance": Provenance.published().model_dump(mode="json"),
            "file_bytes": file_bytes,
            "prompt_tokens": arguments.prompt_tokens,
            "routing": facts,
            "runs": runs,
        }
        text = json.dumps(content, indent=1).replace(str(arguments.folder), "FOLDER")
        write_text(RESULT, text + "\n")


if __name__ == "__main__":
    main()
