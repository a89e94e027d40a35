"""Measures what the demo model learnt and how far its experts specialise.

    python -m edge_moe.demo.analyse [--model DIR] [--quick]

Prints held-out perplexity, the distance between the tasks' expert choices, perplexity with half of
the experts kept, the share of sums solved exactly, and sample texts. It reads shipped files only.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen3MoeForCausalLM

from edge_moe.demo import arithmetic, demo_model_dir, task_dir, task_names

SEQUENCE_TOKENS = 512
BATCH = 4
RANDOM_SEEDS = 3
ANSWER_TOKENS = 40
SAMPLE_TOKENS = 60


@dataclass
class Routing:
    """Watches the routers of a model, and restricts them to `keep` where that is set.

    L = num_layers, E = num_experts
    """

    keep: Tensor | None = None  # [L, E] bool
    counts: Tensor = field(default_factory=lambda: torch.zeros(0))  # [L, E]
    scores: Tensor = field(default_factory=lambda: torch.zeros(0))  # [L, E]

    def hook(self, layer_id: int) -> Any:
        def after_router(
            router: nn.Module, _inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]
        ) -> tuple[Tensor, Tensor, Tensor]:
            logits, weights, chosen = output
            if self.keep is not None:
                logits = logits.masked_fill(~self.keep[layer_id], float("-inf"))
                top = logits.float().softmax(-1).topk(chosen.shape[-1], -1)
                chosen = top.indices
                weights = (top.values / top.values.sum(-1, keepdim=True)).to(weights.dtype)
            flat = chosen.reshape(-1)
            self.counts[layer_id] += torch.bincount(flat, minlength=logits.shape[-1])
            self.scores[layer_id].index_add_(0, flat, weights.reshape(-1).float())
            return logits, weights, chosen

        return after_router


class Bench:
    """The model under test, its tokenizer and its watched routers."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.train(False)
        config = self.model.config
        self.shape = (config.num_hidden_layers, config.num_experts)
        self.routing = Routing()
        self.reset()
        for layer_id, layer in enumerate(self.model.model.layers):
            layer.mlp.gate.register_forward_hook(self.routing.hook(layer_id))

    def reset(self) -> None:
        self.routing.counts = torch.zeros(self.shape)
        self.routing.scores = torch.zeros(self.shape)

    @contextmanager
    def keeping(self, keep: Tensor | None) -> Iterator[None]:
        self.routing.keep = keep
        yield
        self.routing.keep = None

    def rows(self, name: str, file_name: str, count: int) -> tuple[Tensor, int]:
        """Up to `count` token rows of one task file, and the characters they stand for."""
        stream: list[int] = []
        for line in (task_dir(name) / file_name).read_text(encoding="utf-8").splitlines():
            stream += [0, *self.tokenizer(json.loads(line)["text"])["input_ids"]]
        count = min(count, len(stream) // SEQUENCE_TOKENS)
        stream = stream[: count * SEQUENCE_TOKENS]
        chars = len(self.tokenizer.decode(stream, skip_special_tokens=True))
        return torch.tensor(stream).view(count, SEQUENCE_TOKENS), chars

    @torch.no_grad()
    def loss(self, rows: Tensor) -> float:
        """Mean nats per token."""
        parts = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
        total = sum(float(self.model(input_ids=p, labels=p).loss) * len(p) for p in parts)
        return total / len(rows)

    @torch.no_grad()
    def generate(self, prompts: list[str], num_tokens: int, **options: Any) -> list[str]:
        """Continuations of `prompts`, padded on the left."""
        self.tokenizer.padding_side = "left"
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True)
        batch.pop("token_type_ids", None)
        output = self.model.generate(**batch, max_new_tokens=num_tokens, **options)
        width = batch["input_ids"].shape[1]
        texts: list[str] = self.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        return texts


def js_distance(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon distance (root, base 2) along the last dimension: 0 same, 1 disjoint."""
    middle = (p + q) / 2

    def divergence(u: Tensor) -> Tensor:
        return (u * ((u + 1e-12) / (middle + 1e-12)).log2()).sum(-1)

    return ((divergence(p) + divergence(q)) / 2).clamp_min(0).sqrt()


def top_experts(scores: Tensor, count: int) -> Tensor:
    """Mask of the `count` highest-scored experts of each layer."""
    chosen = scores.topk(count, -1).indices
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, chosen, True)


def exact_match(bench: Bench, count: int) -> float:
    """Share of the held-out sums whose answer is right."""
    lines = (task_dir("arithmetic") / "problems.jsonl").read_text().splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    correct = 0
    for start in range(0, len(rows), 50):
        part = rows[start : start + 50]
        texts = bench.generate([row["prompt"] for row in part], ANSWER_TOKENS)
        answers = [arithmetic.extract_answer(text) for text in texts]
        correct += sum(a == row["answer"] for a, row in zip(answers, part, strict=True))
    return correct / len(rows)


def print_perplexity(bench: Bench, heldout: dict[str, tuple[Tensor, int]]) -> dict[str, float]:
    full = {}
    for name, (rows, chars) in heldout.items():
        loss = bench.loss(rows)
        full[name] = math.exp(loss)
        bits = loss / math.log(2) * rows.numel() / chars
        print(f"{name:<11} loss {loss:6.3f} perplexity {full[name]:8.2f} bits/character {bits:.3f}")
    return full


def expert_usage(bench: Bench, count: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Selection shares and router-score sums per task, from the calibration texts."""
    shares, scores = {}, {}
    for name in task_names():
        bench.reset()
        bench.loss(bench.rows(name, "calibration.jsonl", count)[0])
        shares[name] = bench.routing.counts / bench.routing.counts.sum(-1, keepdim=True)
        scores[name] = bench.routing.scores
    return shares, scores


def print_distances(shares: dict[str, Tensor]) -> None:
    print("\nJensen-Shannon distance of expert choices, per layer")
    found = []
    for left, right in combinations(shares, 2):
        distance = js_distance(shares[left], shares[right])
        found.append(distance)
        print(f"{left:<11}{right:<11}", " ".join(f"{d:.3f}" for d in distance.tolist()))
    mean = torch.stack(found).mean(0)
    print("mean", " ".join(f"{d:.3f}" for d in mean.tolist()), f"overall {float(mean.mean()):.3f}")


def print_pruned(
    bench: Bench,
    heldout: dict[str, tuple[Tensor, int]],
    full: dict[str, float],
    scores: dict[str, Tensor],
    keep: int,
) -> None:
    """Perplexity with `keep` experts per layer, chosen for this task, for others, at random."""
    print(f"\nkeep {keep} of {bench.shape[1]} experts: full, own, random, mean of other tasks'")
    for name, (rows, _) in heldout.items():

        def kept(choice: Tensor, rows: Tensor = rows) -> float:
            with bench.keeping(top_experts(choice, keep)):
                return math.exp(bench.loss(rows))

        random_ones = [
            kept(torch.rand(bench.shape, generator=torch.Generator().manual_seed(seed)))
            for seed in range(RANDOM_SEEDS)
        ]
        others = [kept(scores[other]) for other in scores if other != name]
        print(
            f"{name:<11}{full[name]:9.2f}{kept(scores[name]):9.2f}"
            f"{sum(random_ones) / RANDOM_SEEDS:9.2f}{sum(others) / len(others):9.2f}"
        )


def print_samples(bench: Bench) -> None:
    torch.manual_seed(0)
    for name in task_names():
        examples = json.loads((task_dir(name) / "task.json").read_text())["examples"]
        if name == "arithmetic":
            examples += ["Question: What is 7 * 8?\nAnswer:", "Question: What is 14 + 9?\nAnswer:"]
        for prompt in examples:
            (text,) = bench.generate(
                [prompt], SAMPLE_TOKENS, do_sample=name != "arithmetic", temperature=0.7, top_k=20
            )
            print(f"\n[{name}] {prompt}>>>{text}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the demo model.")
    parser.add_argument("--model", type=Path, default=None, help="default: the shipped model")
    parser.add_argument("--quick", action="store_true", help="fewer texts, no pruning, 50 sums")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args.model or demo_model_dir())
    count = 4 if args.quick else 24
    heldout = {name: bench.rows(name, "heldout.jsonl", count) for name in task_names()}
    full = print_perplexity(bench, heldout)
    num_sums = 50 if args.quick else 200
    print(f"\narithmetic exact match {exact_match(bench, num_sums):.3f} of {num_sums}")
    if not args.quick:
        shares, scores = expert_usage(bench, count)
        print_distances(shares)
        for keep in (8, 4):
            print_pruned(bench, heldout, full, scores, keep)
        for name in task_names():
            with bench.keeping(top_experts(scores[name], 8)):
                print(f"sums solved with 8 experts of {name}: {exact_match(bench, num_sums):.3f}")
    print_samples(bench)


if __name__ == "__main__":
    main()
