"""Do pruned Hugging Face folders mean the same to transformers 4.57 as to transformers 5?

    python -m venv old && old/bin/pip install torch 'transformers==4.57.*'
    python benchmarks/transformers4.py --python old/bin/python [--family mixtral]

For every family two tiny checkpoints, one written by each version, are pruned to about half of
their experts. Both versions load both outputs, and the logits are compared. `source` is the same
before pruning: version 4 knows neither `rope_parameters` nor Qwen3-MoE's `num_local_experts`, which
version 5 writes, so edge-moe adds the older keys. Writes benchmarks/results/transformers4.json when
all families were compared.
"""

from __future__ import annotations

import argparse
import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: spinning threads stall

import subprocess
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import transformers
from parity import Subject
from pydantic import BaseModel, ConfigDict
from reference_model import TOKENS, load, logits
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_checkpoint, write_byte_tokenizer

from edge_moe.families import FAMILIES
from edge_moe.files import write_text
from edge_moe.measurement import Provenance
from edge_moe.minimal_model import minimal_config

RESULTS = Path(__file__).resolve().parent / "results" / "transformers4.json"
WORKER = Path(__file__).with_name("transformers4_worker.py")
LARGEST_ERROR = 1e-3
ROPE_THETA = 23456.0
"""No family's default: whoever does not find it computes something else."""
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 16,
}
SCALED = {"gpt_oss": {"rope_scaling": YARN}, "qwen3_moe": {"rope_scaling": YARN}}
"""As gpt-oss is published: its 131072 tokens are 32 x 4096, the minimal model's 512 are 32 x 16."""


class Row(BaseModel):
    """One pruned folder in both versions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: str
    written_by: str
    """The transformers that wrote the checkpoint before it was pruned."""
    error: float | None = None
    """Largest absolute difference of a logit between the two versions."""
    source_error: float | None = None
    """The same before pruning."""
    wrong_names: list[str] = []
    """Tensors that the older version misses or does not expect."""
    reason: str = ""
    """Why there is no error: what the older version said."""

    @property
    def holds(self) -> bool:
        return self.error is not None and self.error <= LARGEST_ERROR and not self.wrong_names


class Comparison(BaseModel):
    """benchmarks/results/transformers4.json"""

    model_config = ConfigDict(extra="forbid", frozen=True)

    provenance: Provenance
    older: str
    newer: str
    rows: list[Row]


class Older:
    """Another Python, with the older transformers."""

    def __init__(self, python: Path, work: Path) -> None:
        self._work = work
        (work / "tokens.json").write_text(json.dumps(TOKENS))
        self._process = subprocess.Popen(
            [str(python), str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": "", "TRANSFORMERS_VERBOSITY": "error"},
        )
        self.version: str = self._ask("logits", "no such folder", "", "")["version"]

    def close(self) -> None:
        """Let it end."""
        self._process.communicate()

    def make(self, family: str, folder: Path) -> str:
        """Write a tiny checkpoint of `family`; returns the reason where that fails."""
        config = self._work / "config.json"
        config.write_text(json.dumps(older_config(family)))
        answer = self._ask("make", family, str(config), str(folder))
        if "problem" in answer:
            return str(answer["problem"])
        write_byte_tokenizer(folder)
        return ""

    def compare(self, folder: Path) -> tuple[float | None, list[str], str]:
        """(largest difference from this process's logits, wrong names, reason) of a checkpoint."""
        path = self._work / "answer.npz"
        answer = self._ask("logits", str(folder), str(self._work / "tokens.json"), str(path))
        if "problem" in answer:
            return None, [], answer["problem"]
        with np.load(path) as found:
            error = float(np.abs(found["logits"] - logits(load(folder))).max())
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
        return error, [name for kind in kinds for name in answer[kind]], ""

    def _ask(self, *arguments: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{WORKER.name} ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def older_config(family: str) -> dict[str, Any]:
    """The minimal model's config.json as transformers 4 states it."""
    values = minimal_config(family)
    values.pop("rope_parameters", None)
    return values | {"rope_theta": ROPE_THETA} | SCALED.get(family, {})


def newer_config(family: str) -> dict[str, Any]:
    """config.json values that say the same to transformers 5, beside the minimal model's."""
    scaled = SCALED.get(family, {}).get("rope_scaling", {"rope_type": "default"})
    if family in SCALED or "rope_parameters" in minimal_config(family):
        return {"rope_parameters": scaled | {"rope_theta": ROPE_THETA}}
    return {"rope_theta": ROPE_THETA}


def compare(family: str, older: Older, work: Path) -> list[Row]:
    """One row per version that wrote a checkpoint of `family`, or one that says why not."""
    before, after = work / "older", work / "newer"
    before.mkdir(parents=True)
    reason = older.make(family, before / "model")
    if reason:
        return [Row(family=family, written_by=older.version, reason=reason)]
    after.mkdir()
    make_tiny_checkpoint(after / "model", family, **newer_config(family))
    raise_biases(after / "model")
    return [
        _row(family, older.version, older, before),
        _row(family, transformers.__version__, older, after),
    ]


def raise_biases(folder: Path) -> None:
    """Add 1 to all selection biases, which changes no choice in transformers 5.

    Version 4 gives the experts of groups that lost the score 0, not minus infinity: there they win
    against experts whose own score and bias are together below 0 (DeepSeek-V3, GLM-4-MoE).
    """
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensors[name] = tensor + 1
    save_file(tensors, path, metadata={"format": "pt"})


def _row(family: str, written_by: str, older: Older, work: Path) -> Row:
    source_error, _, _ = older.compare(work / "model")
    pruned = Subject(work / "model", work).built("hf", "pruned")
    error, names, reason = older.compare(pruned)
    return Row(
        family=family,
        written_by=written_by,
        error=error,
        source_error=source_error,
        wrong_names=names,
        reason=reason,
    )


def show(found: Sequence[Row], console: Console) -> None:
    console.print(
        "| family | written by | pruned | source | |\n|---|---|---|---|---|", markup=False
    )
    for row in found:
        errors = ["-" if x is None else f"{x:.1e}" for x in (row.error, row.source_error)]
        said = row.reason or ", ".join(row.wrong_names)
        console.print(
            f"| {row.family} | {row.written_by} | {' | '.join(errors)} | {said} |", markup=False
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", type=Path, required=True, help="one with transformers 4.57")
    parser.add_argument("--family", action="append", choices=sorted(FAMILIES), help="repeatable")
    arguments = parser.parse_args()
    rows: list[Row] = []
    with TemporaryDirectory(prefix="edge-moe-") as name:
        with closing(Older(arguments.python, Path(name))) as older:
            for family in arguments.family or sorted(FAMILIES):
                rows += compare(family, older, Path(name) / family)
    show(rows, Console(width=200))
    if arguments.family:
        return
    found = Comparison(
        provenance=Provenance.published(),
        older=older.version,
        newer=transformers.__version__,
        rows=rows,
    )
    write_text(RESULTS, found.model_dump_json(indent=1) + "\n")


if __name__ == "__main__":
    main()
