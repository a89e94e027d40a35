"""What a process takes before any weights: measured once per machine, architecture and versions.

The probe runs in its own processes, so that this module needs no torch.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edge_moe import __version__
from edge_moe.files import write_text
from edge_moe.gguf_header import GgufHeader
from edge_moe.plan import Device, Source

ASSUMED_BYTES = {"cpu": 480_000_000, "cuda": 600_000_000}
"""Where the runtime cannot be started here: a process measured on Linux with torch 2.13."""
TRITON_BYTES = 65_000_000
"""torch's compiler loads triton where it is installed, whether anything is compiled or not, and
transformers loads that compiler: 60 to 63 MB measured at the peak, with triton 3.9."""
ASSUMED_GGUF_BYTES = 80_000_000
PAGING_BYTES = 1_000_000
"""Threads that read, and who is in memory: the probe pages nothing. 0.4 to 0.6 MB measured."""
SPREAD = 0.015
"""Peaks of equal runs differ by about this share: allocator arenas, page cache, thread timing."""
TOKENIZER_FACTOR = 15
VOCABULARY_FACTOR = 8
_GGUF = "gguf"
"""Stands for a model type where llama.cpp runs it: the process is the same for all."""
_PROBE = "edge_moe.runtime.overhead"
_PROBE_SECONDS = 300
_PROBE_VERSION = 3
"""Other probes measured other numbers."""


def runtime_overhead(model_type: str, device: Device) -> tuple[int, Source]:
    """(bytes, `measured` or `assumed`) of a running process without the model's own memory.

    `SPREAD` is added to what was measured, for a budget is a cap and not a mean.
    """
    known = known_overhead(model_type, device)
    if known[1] == "measured":
        return known
    measured = _measure(model_type, device)
    if measured is None:
        return known
    _write_cache({**_read_cache(), _key(model_type, device): measured})
    return measured, "measured"


def gguf_overhead(header: GgufHeader, *, is_measured: bool) -> tuple[int, Source]:
    """(bytes, source) of `edge-moe run` with llama.cpp, without weights but with the vocabulary.

    What was measured before is used; `is_measured` starts the probe where nothing was.
    """
    find = runtime_overhead if is_measured else known_overhead
    process, source = find(_GGUF, "cpu")
    return process + PAGING_BYTES + vocabulary_bytes(header), source


def vocabulary_bytes(header: GgufHeader) -> int:
    """llama.cpp's tables of tokens and merges: about 8 times the keys that they are made of.

    Measured with 150,000 tokens and as many merges (6.8 MB of keys): 55 MB at the peak.
    """
    spans = (span for key, span in header.key_spans.items() if key.startswith("tokenizer."))
    return VOCABULARY_FACTOR * sum(span.num_bytes for span in spans)


def known_overhead(model_type: str, device: Device) -> tuple[int, Source]:
    """What an earlier `runtime_overhead` measured, or the assumed figure; starts nothing."""
    known = _read_cache().get(_key(model_type, device))
    if isinstance(known, int) and known > 0:
        return known, "measured"
    if model_type == _GGUF:
        return ASSUMED_GGUF_BYTES, "assumed"
    return ASSUMED_BYTES[device] + triton_bytes(), "assumed"


def triton_bytes() -> int:
    """What triton adds to a process that runs transformers' models, where it is installed."""
    return 0 if _installed("triton") == "missing" else TRITON_BYTES


def probed_bytes(runtime_bytes: int, folder: Path) -> int:
    """What the probe measured of a bill's measured `runtime` term, without what `SPREAD` adds."""
    tokenizer = tokenizer_bytes(folder)
    return round((runtime_bytes - tokenizer) / (1 + SPREAD)) + tokenizer


def tokenizer_bytes(folder: Path) -> int:
    """Memory of the tokenizer in `folder`: about 15 times its tokenizer.json.

    Measured with a vocabulary of 150,000 (13.7 MB of JSON): 205 MB at the peak of loading it.
    """
    path = folder / "tokenizer.json"
    return TOKENIZER_FACTOR * path.stat().st_size if path.exists() else 0


def cache_path() -> Path:
    """File that remembers measurements; `XDG_CACHE_HOME` moves it."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "edge-moe" / "overhead.json"


def _measure(model_type: str, device: Device) -> int | None:
    """Run the probe: one process makes a minimal model, another runs it and reports its peak."""
    with tempfile.TemporaryDirectory(prefix="edge-moe-probe-") as folder:
        if _run([sys.executable, "-m", _PROBE, "make", folder, model_type]) is None:
            return None
        peaks = []
        for _ in range(2):  # the larger of two: page-cache state moves a few MB
            what = _GGUF if model_type == _GGUF else device
            output = _run([sys.executable, "-m", _PROBE, "measure", folder, what])
            if output is None:
                return None
            peaks.append(int(json.loads(output.splitlines()[-1])["overhead_bytes"]))
        return round(max(peaks) * (1 + SPREAD))


def _run(command: list[str]) -> str | None:
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_SECONDS, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _key(model_type: str, device: Device) -> str:
    parts = [__version__, f"probe {_PROBE_VERSION}", model_type, device]
    parts += [platform.python_version(), sys.executable]
    native = ("torch", "transformers", "triton")  # see `TRITON_BYTES`
    names = ("llama-cpp-python",) if model_type == _GGUF else native
    parts += [f"{name} {_installed(name)}" for name in names]
    parts.append(f"threads {os.environ.get('OMP_NUM_THREADS', 'default')}")
    return " | ".join(parts)


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _read_cache() -> dict[str, object]:
    try:
        cached = json.loads(cache_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cached if isinstance(cached, dict) else {}


def _write_cache(cached: dict[str, object]) -> None:
    try:
        cache_path().parent.mkdir(parents=True, exist_ok=True)
        write_text(cache_path(), json.dumps(cached, indent=1) + "\n")
    except OSError:
        return  # a read-only home costs a new measurement next time, nothing else
