"""Proof on the demo model: its experts specialise, and pruning by the own task is what works.

Each layer keeps 8 of 16 experts, those with the largest sum of (g|f|)**2 over calibration tokens.
"""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edge_moe.converters.calibrate import calibrate
from edge_moe.demo import task_dir, task_names
from edge_moe.demo.arithmetic import extract_answer
from edge_moe.runtime.heldout import heldout_windows
from edge_moe.stats import ExpertStats

pytestmark = pytest.mark.slow

TASKS = ("code", "prose", "sql")
KEEP = 8
CALIBRATION_WINDOWS = 8
HELDOUT_WINDOWS = 12
NUM_PROBLEMS = 100
ANSWER_TOKENS = 48

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]


class PrunableModel:
    """The demo model in transformers, with routers that can be told to leave experts out."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.eval()
        self._heldout: dict[str, Any] = {}

    def heldout(self, task: str) -> Any:
        """[windows, tokens] ids of full held-out windows."""
        if task not in self._heldout:
            windows = heldout_windows(task, self.tokenizer, 256, HELDOUT_WINDOWS)
            self._heldout[task] = self.torch.tensor([w for w in windows if len(w) == 256])
        return self._heldout[task]

    def perplexity(self, task: str, keep: BoolArray | None = None) -> float:
        """On held-out text, with the experts in `keep` [L, E] only."""
        handles = [] if keep is None else [self._mask(layer, row) for layer, row in enumerate(keep)]
        ids = self.heldout(task)
        with self.torch.inference_mode():
            loss = float(self.model(input_ids=ids, labels=ids).loss)
        for handle in handles:
            handle.remove()
        return math.exp(loss)

    def answers(self, prompts: list[str]) -> list[str]:
        """Greedy continuations of `prompts`, as one batch."""
        self.tokenizer.padding_side = "left"
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True)
        with self.torch.inference_mode():
            output = self.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=ANSWER_TOKENS,
                do_sample=False,
            )
        texts: list[str] = self.tokenizer.batch_decode(
            output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return texts

    def _mask(self, layer_id: int, keep: npt.NDArray[np.bool_]) -> Any:
        """Let layer `layer_id` choose again among the kept experts."""
        dropped = self.torch.from_numpy(~keep)

        def choose(_router: Any, _inputs: Any, output: Any) -> Any:
            logits, weights, chosen = output
            kept = logits.masked_fill(dropped, float("-inf")).float().softmax(-1)
            top = kept.topk(chosen.shape[-1], -1)
            return logits, (top.values / top.values.sum(-1, keepdim=True)).to(weights), top.indices

        return self.model.model.layers[layer_id].mlp.gate.register_forward_hook(choose)


def largest(scores: FloatArray) -> BoolArray:
    """The `KEEP` largest of each row, as a mask."""
    order = np.argsort(-scores, axis=1)[:, :KEEP]
    keep = np.zeros(scores.shape, bool)
    np.put_along_axis(keep, order, True, axis=1)
    return keep


def own_choice(stats: ExpertStats) -> BoolArray:
    return largest(stats.expert_sums["gated_square"].values())


def distance(left: ExpertStats, right: ExpertStats) -> float:
    """Jensen-Shannon distance (root, base 2) of the expert choices, mean over layers."""
    p, q = (s.routed_tokens / s.routed_tokens.sum(1, keepdims=True) for s in (left, right))
    middle = (p + q) / 2

    def divergence(u: FloatArray) -> FloatArray:
        ratio = np.divide(u, middle, out=np.ones_like(u), where=u > 0)
        found: FloatArray = (u * np.log2(ratio)).sum(1)
        return found

    squares = np.maximum((divergence(p) + divergence(q)) / 2, 0)
    return float(np.sqrt(squares).mean())


@pytest.fixture(scope="module")
def model(demo_model: Path) -> PrunableModel:
    return PrunableModel(demo_model)


@pytest.fixture(scope="module")
def stats(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExpertStats]:
    """What calibration measures on every task."""
    folder = tmp_path_factory.mktemp("demo-stats")
    return {
        task: calibrate(
            demo_model, [task], folder / task, max_windows=CALIBRATION_WINDOWS, forms=("drop",)
        )
        for task in task_names()
    }


def test_experts_specialise(stats: dict[str, ExpertStats]) -> None:
    distances = [distance(stats[a], stats[b]) for a, b in combinations(sorted(stats), 2)]
    assert np.mean(distances) > 0.3


@pytest.mark.parametrize("task", TASKS)
def test_own_task_pruning_beats_random_and_another_tasks_choice(
    task: str, model: PrunableModel, stats: dict[str, ExpertStats]
) -> None:
    keep = own_choice(stats[task])
    most_distant = max(stats, key=lambda other: distance(stats[task], stats[other]))
    random_keeps = [largest(np.random.default_rng(seed).random(keep.shape)) for seed in range(2)]

    full = model.perplexity(task)
    own = model.perplexity(task, keep)
    random = np.mean([model.perplexity(task, each) for each in random_keeps])
    other = model.perplexity(task, own_choice(stats[most_distant]))

    print(f"{task}: {full:.2f}, own {own:.2f}, random {random:.2f}, {most_distant} {other:.2f}")
    assert own < 1.5 * full
    assert random > 1.5 * own
    assert other > 1.5 * own


def test_the_full_model_solves_sums(model: PrunableModel) -> None:
    lines = (task_dir("arithmetic") / "problems.jsonl").read_text().splitlines()[:NUM_PROBLEMS]
    problems = [json.loads(line) for line in lines]
    answers = model.answers([problem["prompt"] for problem in problems])
    pairs = zip(answers, problems, strict=True)
    num_right = sum(extract_answer(text) == problem["answer"] for text, problem in pairs)
    assert num_right >= 0.6 * NUM_PROBLEMS
