"""Trains the demo model from scratch on the CPU; with --dense the dense one that is upcycled.

    python -m edge_moe.demo.corpus    --work DIR
    python -m edge_moe.demo.tokenizer --work DIR
    python -m edge_moe.demo.train     --work DIR --out MODEL --steps 6000 --decay-steps 1500

The learning rate warms up, stays constant and decays linearly over the last steps, so a run can be
made longer or shorter while it goes on: stop it and start it again with other numbers. A stopped
run resumes from its last checkpoint; when the schedule changed after the decay had begun, from the
checkpoint before the decay. The data of a step depends only on (seed, step).

The dense model has its checkpoints in DIR/dense: 4,500 steps, 9 M tokens, in under an hour of two
cores.
"""

from __future__ import annotations

import os

# Before torch starts its threads: idle ones must sleep, or they take the core of the working ones.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
import json
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn

from edge_moe.converters.upcycle.balance import switch_loss
from edge_moe.demo.corpus import DEFAULT_WORK, DOMAINS
from edge_moe.demo.model import new_dense_model, new_model, save_model
from edge_moe.demo.tokenizer import fingerprint, read_tokens
from edge_moe.errors import InputError

SHARES = {
    "code": 0.20,
    "prose": 0.18,
    "facts": 0.13,
    "arithmetic": 0.28,
    "sql": 0.08,
    "dictionary": 0.13,
}
LATEST = "latest.pt"
BEFORE_DECAY = "before-decay.pt"
RESULT_TOKENS = 4  # a space, two digits and the full stop


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a run."""

    steps: int
    decay_steps: int
    seed: int = 0
    learning_rate: float = 2.5e-3
    final_learning_rate: float = 0.05  # as a fraction of `learning_rate`
    warmup_steps: int = 100
    sequences: int = 4
    sequence_tokens: int = 512
    weight_decay: float = 0.05
    balance_weight: float = 0.01
    result_weight: float = 6.0  # of the tokens that follow "=" in the arithmetic domain
    experts_implementation: str = "grouped_mm"
    is_dense: bool = False

    def learning_rate_at(self, step: int) -> float:
        """Warm-up, plateau, linear decay; `step` counts from 0."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        left = (self.steps - step) / max(1, self.decay_steps)
        decay = max(self.final_learning_rate, min(1.0, left))
        return self.learning_rate * warm * decay

    @property
    def decay_start(self) -> int:
        return self.steps - self.decay_steps


class Data:
    """Token streams of the training split, and the batch that belongs to a step."""

    def __init__(self, work: Path, shares: dict[str, float]) -> None:
        self.domains = list(shares)
        self.bounds = np.cumsum(list(shares.values())) / sum(shares.values())
        self.train = {name: read_tokens(work, name, "train") for name in self.domains}
        self.heldout = {name: read_tokens(work, name, "heldout") for name in self.domains}

    def batch(self, recipe: Recipe, step: int) -> tuple[Tensor, list[str]]:
        """One sequence per row, each from a single domain; rows spread over the domains' shares."""
        rng = np.random.default_rng([recipe.seed, step])
        count = recipe.sequences
        points = (rng.random() + np.arange(count)) / count
        picked = np.minimum(np.searchsorted(self.bounds, points), len(self.domains) - 1)
        names = [self.domains[index] for index in picked]
        rows = []
        for name in names:
            stream = self.train[name]
            start = int(rng.integers(0, len(stream) - recipe.sequence_tokens))
            rows.append(stream[start : start + recipe.sequence_tokens])
        return _to_tensor(rows), names

    def heldout_rows(self, name: str, count: int, num_tokens: int) -> Tensor:
        """`count` windows spread evenly over a held-out stream."""
        stream = self.heldout[name]
        starts = np.linspace(0, len(stream) - num_tokens - 1, count).astype(int)
        return _to_tensor([stream[start : start + num_tokens] for start in starts])


def _to_tensor(rows: list[NDArray[np.uint16]]) -> Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def result_weights(tokens: Tensor, equals_id: int, weight: float) -> Tensor:
    """Weight of each target token[1:]: `weight` for the result after an equals sign, else 1."""
    is_equals = tokens == equals_id
    is_result = torch.zeros_like(is_equals)
    for offset in range(1, RESULT_TOKENS + 1):
        is_result[..., offset:] |= is_equals[..., :-offset]
    return 1 + (weight - 1) * is_result[..., 1:].float()


def balance_loss(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Switch load-balancing loss, per layer and then averaged."""
    total = torch.zeros(())
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)  # [T, E]
        total = total + switch_loss(probabilities, probabilities.topk(top_k, -1).indices)
    return total / len(router_logits)


def new_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; norms are not decayed."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=(0.9, 0.98), eps=1e-9, fused=True
    )


class Trainer:
    """Model, optimizer and position of one run, with its checkpoints and log."""

    def __init__(self, work: Path, recipe: Recipe, shares: dict[str, float]) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.folder = state_folder(work, recipe.is_dense)
        self.work = work
        self.shares = shares
        self.data = Data(work, shares)
        tokenizer = Tokenizer.from_file(str(work / "tokenizer/tokenizer.json"))
        equals_id = tokenizer.token_to_id("\u0120=")  # U+0120 stands for a space
        if equals_id is None:
            raise InputError("the tokenizer has no token for an equals sign after a space")
        self.equals_id = equals_id
        self.model: Any = (
            new_dense_model() if recipe.is_dense else new_model(recipe.experts_implementation)
        )
        self.optimizer = new_optimizer(self.model, recipe)
        self.step = 0
        self.seconds = 0.0
        self.losses: dict[str, float] = {}
        self.is_stopping = False

    # -- checkpoints ----------------------------------------------------------------------------

    def save(self, name: str) -> None:
        """Writes a checkpoint in one move, so that a killed run never leaves half of one."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "recipe": asdict(self.recipe),
        }
        partial = self.folder / (name + ".partial")
        torch.save(state, partial)
        partial.replace(self.folder / name)

    def _checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint to go on from, or None for a new run."""
        latest = self.folder / LATEST
        if not latest.exists():
            return None
        state: dict[str, Any] = torch.load(latest, weights_only=True)
        decay_start = state["recipe"]["steps"] - state["recipe"]["decay_steps"]
        is_changed = decay_start != self.recipe.decay_start or (
            state["recipe"]["steps"] != self.recipe.steps
        )
        if is_changed and state["step"] > decay_start:
            state = torch.load(self.folder / BEFORE_DECAY, weights_only=True)
        return state

    def resume(self) -> None:
        state = self._checkpoint()
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.losses = state["losses"]
        self.log({"resumed_at": self.step})

    def log(self, entry: dict[str, Any]) -> None:
        line = json.dumps({"step": self.step, "seconds": round(self.seconds), **entry})
        print(line, flush=True)
        with (self.folder / "training_log.jsonl").open("a") as out:
            out.write(line + "\n")

    # -- the loop -------------------------------------------------------------------------------

    def train_step(self) -> float:
        """One update; returns the balance loss."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(self.step)
        tokens, names = self.data.batch(recipe, self.step)
        extra: dict[str, bool] = {} if recipe.is_dense else {"output_router_logits": True}
        output = self.model(input_ids=tokens, **extra)
        logits = output.logits[:, :-1].flatten(0, 1)
        per_token = F.cross_entropy(logits, tokens[:, 1:].reshape(-1), reduction="none")
        per_token = per_token.view(tokens.shape[0], -1)
        weights = torch.ones_like(per_token)
        for row, name in enumerate(names):
            if name == "arithmetic":
                weights[row] = result_weights(tokens[row], self.equals_id, recipe.result_weight)
        balance = torch.zeros(())
        if not recipe.is_dense:
            balance = balance_loss(output.router_logits, self.model.config.num_experts_per_tok)
        torch.autograd.backward((per_token * weights).mean() + recipe.balance_weight * balance)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for name, loss in zip(names, per_token.mean(1).tolist(), strict=True):
            self.losses[name] = 0.97 * self.losses.get(name, loss) + 0.03 * loss
        self.step += 1
        return float(balance.detach())

    @torch.no_grad()
    def heldout_losses(self, rows: int) -> dict[str, float]:
        """Mean loss per domain in nats per token."""
        self.model.train(False)
        found = {}
        for name in self.data.domains:
            tokens = self.data.heldout_rows(name, rows, self.recipe.sequence_tokens)
            losses = [float(self.model(input_ids=row, labels=row).loss) for row in tokens[:, None]]
            found[name] = round(sum(losses) / rows, 4)
        self.model.train()
        return found

    def run(self, checkpoint_seconds: float) -> None:
        """Trains to the last step, or until it is told to stop."""
        recipe = self.recipe
        per_step = recipe.sequences * recipe.sequence_tokens
        started = last = saved = time.monotonic()
        before = self.seconds
        self.model.train()
        while self.step < recipe.steps and not self.is_stopping:
            balance = self.train_step()
            now = time.monotonic()
            self.seconds = before + now - started
            if self.step == recipe.decay_start:
                self.save(BEFORE_DECAY)
            if self.step % 50 == 0:
                speed = round(50 * per_step / (now - last))
                last = now
                losses = {name: round(loss, 3) for name, loss in self.losses.items()}
                self.log(
                    {"train": losses, "balance": round(balance, 3), "tokens_per_second": speed}
                )
            if now - saved > checkpoint_seconds:
                saved = now
                self.log({"heldout": self.heldout_losses(4)})
                self.save(LATEST)
        self.save(LATEST)

    def stop(self, _signal: int, _frame: FrameType | None) -> None:
        self.is_stopping = True

    def summary(self) -> dict[str, Any]:
        """What is worth knowing about the finished model."""
        per_step = self.recipe.sequences * self.recipe.sequence_tokens
        return {
            "recipe": asdict(self.recipe),
            "history": recipe_history(self.folder),
            "shares": self.shares,
            "tokens": self.step * per_step,
            "step": self.step,
            "seconds": round(self.seconds),
            "heldout_loss": self.heldout_losses(32),
            "data": {
                name: {split: fingerprint(self.work, name, split) for split in ("train", "heldout")}
                for name in DOMAINS
            },
        }


def state_folder(work: Path, is_dense: bool) -> Path:
    """Where checkpoints and log of a run lie."""
    folder = work / "dense" if is_dense else work
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def recipe_history(folder: Path) -> list[dict[str, Any]]:
    """The recipes of a run that was stopped and resumed, each with the step it began at."""
    with (folder / "training_log.jsonl").open() as lines:
        entries = [json.loads(line) for line in lines]
    return [entry for entry in entries if "recipe" in entry]


def parse_shares(text: str) -> dict[str, float]:
    """Reads changes like code=0.2,sql=0.1 and applies them to `SHARES`."""
    shares = dict(SHARES)
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        shares[name] = float(value)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="cache folder")
    parser.add_argument("--out", type=Path, required=True, help="where the finished model goes")
    parser.add_argument("--dense", action="store_true", help="train the dense model")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--decay-steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--experts", default="grouped_mm", help="experts_implementation")
    parser.add_argument("--shares", default="", help="change domain shares: code=0.2,sql=0.1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint-seconds", type=float, default=300)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = Recipe(
        *(args.steps, args.decay_steps, args.seed),
        experts_implementation=args.experts,
        is_dense=args.dense,
    )
    trainer = Trainer(args.work, recipe, parse_shares(args.shares))
    trainer.resume()
    signal.signal(signal.SIGTERM, trainer.stop)
    trainer.log({"recipe": asdict(recipe), "shares": trainer.shares})
    trainer.run(args.checkpoint_seconds)
    if trainer.is_stopping:
        return
    summary = trainer.summary()
    trainer.log({"summary": summary})
    (trainer.folder / "training.json").write_text(json.dumps(summary, indent=1) + "\n")
    save_model(trainer.model, args.work / "tokenizer", args.out)


if __name__ == "__main__":
    main()
