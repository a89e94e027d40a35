"""What each quantiser leaves of the experts' outputs on held-out text, and how fast it packs.

    python benchmarks/quantisers.py [--model FOLDER] [--task code] [--every 2] [-o results.json]

Moments come from the task's calibration text, errors from its held-out text: the sum over routed
tokens of (g |f - f_form|)^2 as a share of that of (g |f|)^2, over every `--every`-th expert of all
MoE layers. Hidden states are those of the original model in both. `gptq` runs with hessians
weighted by 1, by g (MoEQuant), by g^2, and with every token through every expert, alike or by the
router's score p. Weights per second of processor time are of packing on one core, moments given;
set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.block_sums import WindowObservation
from edge_moe.converters.layer_stream import LayerStream
from edge_moe.converters.observe import OBSERVE, BlockObserver, router_scores_of
from edge_moe.converters.second_moments import ExpertMoments, Weighting, expert_moments
from edge_moe.demo import demo_model_dir
from edge_moe.formats import unpack_expert
from edge_moe.formats.quantise import get_quantiser, pack_expert_with
from edge_moe.measurement import this_machine
from edge_moe.runtime.moe_block import expert_output
from edge_moe.tasks import task_windows

FORMS = ("tq1_0", "q2_0", "q2_k", "q3_k", "q4_0", "q4_k", "q5_k", "q6_k", "q8_0")
METHODS = {
    "nearest": ("nearest", "none"),
    "imatrix": ("imatrix", "none"),
    "imatrix, g^2": ("imatrix", "gate_square"),
    "weighted": ("weighted", "none"),
    "weighted, g^2": ("weighted", "gate_square"),
    "refit, squares": ("refit", "squares"),
    "refit": ("refit", "none"),
    "gptq": ("gptq", "none"),
    "gptq, g": ("gptq", "gate"),
    "gptq, g^2": ("gptq", "gate_square"),
    "gptq, all tokens": ("gptq", "all"),
    "gptq, all tokens, p": ("gptq", "all_scores"),
    "gptq_refit": ("gptq_refit", "none"),
    "gptq_refit, g": ("gptq_refit", "gate"),
    "gptq_refit, g^2": ("gptq_refit", "gate_square"),
    "gptq_refit, all tokens": ("gptq_refit", "all"),
    "gptq_refit_all": ("gptq_refit_all", "all_scores"),
    "absmean": ("absmean", "none"),
    "lloyd": ("lloyd", "none"),
}
"""Row -> (quantiser, which moments)."""
MOMENTS: dict[str, tuple[Weighting, bool]] = {
    "none": ("none", False),
    "gate": ("gate", False),
    "gate_square": ("gate_square", False),
    "all": ("none", True),
    "all_scores": ("gate", True),
}
"""Name -> (weighting, whether every token counts)."""


@dataclass
class Total:
    """Sums over experts."""

    error: float = 0.0
    energy: float = 0.0
    num_weights: int = 0
    seconds: float = 0.0


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=demo_model_dir())
    parser.add_argument("--task", default="code")
    parser.add_argument("--windows", type=int, default=32, help="windows of each split")
    parser.add_argument("--window-tokens", type=int, default=256)
    parser.add_argument("--every", type=int, default=2, help="measure one expert out of this many")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    totals: dict[tuple[str, str], Total] = defaultdict(Total)
    for layer in _layers(arguments):
        _measure_layer(layer, arguments.every, totals)
    _print(totals)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(_record(totals, arguments), indent=1) + "\n")


@dataclass
class Layer:
    """One MoE layer with its weights, and what it saw."""

    experts: Any
    calibration: list[WindowObservation]
    heldout: list[WindowObservation]
    scores: list[torch.Tensor]
    """[T, E] of each calibration window."""
    name: str


def _layers(arguments: argparse.Namespace) -> Iterator[Layer]:
    checkpoint = Checkpoint(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    counts = [arguments.window_tokens, arguments.windows]
    texts = [
        task_windows([arguments.task], split, tokenizer, *counts)
        for split in ("calibration", "heldout")
    ]
    stream = LayerStream(checkpoint, OBSERVE)
    with torch.inference_mode():
        hidden = [[stream.embed(text) for text in split] for split in texts]
        for layer_id in range(checkpoint.spec.num_layers):
            with stream.loaded(layer_id):
                if layer_id not in checkpoint.spec.moe_layer_ids:
                    hidden = [[stream.run(layer_id, x) for x in split] for split in hidden]
                    continue
                block = stream.moe_block(layer_id)
                seen: list[list[WindowObservation]] = []
                with BlockObserver(block, checkpoint.spec) as observer:
                    for index, split in enumerate(hidden):
                        outputs = []
                        seen.append([])
                        for x in split:
                            outputs.append(stream.run(layer_id, x))
                            seen[-1].append(observer.take(outputs[-1]))
                        hidden[index] = outputs
                scores = [router_scores_of(block, each.inputs, checkpoint.spec) for each in seen[0]]
                yield Layer(block.experts, seen[0], seen[1], scores, f"layer {layer_id}")


def _measure_layer(layer: Layer, every: int, totals: dict[tuple[str, str], Total]) -> None:
    num_experts = len(layer.experts.down_proj)
    console = Console(stderr=True)
    for expert_id in track(range(0, num_experts, every), layer.name, console=console):
        moments = {
            name: expert_moments(
                *(layer.experts, expert_id, layer.calibration),
                weighting=weighting,
                token_scores=layer.scores if is_every else None,
            )
            for name, (weighting, is_every) in MOMENTS.items()
        }
        moments["squares"] = moments["none"]
        heldout = _Heldout(layer.experts, expert_id, layer.heldout)
        for form in FORMS:
            for method, (quantiser, weighting) in METHODS.items():
                forms = get_quantiser(quantiser).forms
                if forms is not None and form not in forms:
                    continue
                _add(
                    totals[form, method],
                    heldout,
                    form,
                    quantiser,
                    moments[weighting],
                    weighting != "squares",
                )


class _Heldout:
    """One expert's weights and its held-out tokens."""

    def __init__(self, experts: Any, expert_id: int, windows: Sequence[WindowObservation]) -> None:
        self._experts = experts
        self._expert_id = expert_id
        gate_up, down = experts.gate_up_proj[expert_id], experts.down_proj[expert_id]
        self.matrices = [part.numpy().copy() for part in (*gate_up.chunk(2), down)]
        found = [(window.expert_ids == expert_id).nonzero(as_tuple=True) for window in windows]
        pairs = list(zip(windows, found, strict=True))
        self._inputs = torch.cat([window.inputs[token] for window, (token, _) in pairs])
        self._gates = torch.cat([window.gates[token, slot] for window, (token, slot) in pairs])
        self._exact = expert_output(experts, self._inputs, gate_up, down, expert_id)
        self.energy = self._gated(self._exact)

    def error(self, form: str, record: Any) -> float:
        """Sum over tokens of (g |f - f_form|)^2."""
        width, hidden_size = self.matrices[0].shape
        gate, up, down = map(torch.from_numpy, unpack_expert(form, record, hidden_size, width))
        gate_up = torch.cat([gate, up])
        stored = expert_output(self._experts, self._inputs, gate_up, down, self._expert_id)
        return self._gated(stored - self._exact)

    def _gated(self, outputs: torch.Tensor) -> float:
        return float((self._gates.square() * outputs.double().square().sum(dim=1)).sum())


def _add(
    total: Total,
    heldout: _Heldout,
    form: str,
    quantiser: str,
    known: ExpertMoments,
    with_hessians: bool,
) -> None:
    gate, up, down = heldout.matrices
    started = time.thread_time()
    record = pack_expert_with(
        form,
        gate,
        up,
        down,
        quantiser,
        input_squares=known.input_squares,
        inner_squares=known.inner_squares,
        hessians=known.hessians if with_hessians else None,
        routed_tokens=known.num_tokens,
    )
    total.seconds += time.thread_time() - started
    total.num_weights += sum(matrix.size for matrix in heldout.matrices)
    total.error += heldout.error(form, record)
    total.energy += heldout.energy


def _record(totals: dict[tuple[str, str], Total], arguments: argparse.Namespace) -> dict[str, Any]:
    rows = [
        {
            "form": form,
            "method": method,
            "error_share": total.error / total.energy,
            "weights_per_core_second": total.num_weights / total.seconds,
        }
        for (form, method), total in totals.items()
    ]
    return {
        "task": arguments.task,
        "windows": arguments.windows,
        "window_tokens": arguments.window_tokens,
        "every": arguments.every,
        "machine": this_machine().model_dump(),
        "rows": rows,
    }


def _print(totals: dict[tuple[str, str], Total]) -> None:
    console = Console(width=150)
    cells: dict[str, Callable[[Total], str]] = {
        "held-out error of the gated output, share": lambda each: f"{each.error / each.energy:.3g}",
        "packed, million weights per second of one core": lambda each: (
            f"{each.num_weights / each.seconds / 1e6:.2g}"
        ),
    }
    for title, cell in cells.items():
        table = Table(title=title)
        table.add_column("quantiser")
        for form in FORMS:
            table.add_column(form, justify="right")
        for method in METHODS:
            found = [totals.get((form, method)) for form in FORMS]
            table.add_row(method, *("" if total is None else cell(total) for total in found))
        console.print(table)


if __name__ == "__main__":
    main()
