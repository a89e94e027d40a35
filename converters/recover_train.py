"""Training of the low-rank branches against the original's predictions.

    loss = kl_weight * KL(original || shrunken) + lm_weight * next-token cross-entropy

AdamW, linear warm-up, cosine to a tenth, gradients clipped by their joint norm. Windows come in an
order that depends on the seed and the step alone, so a run that was killed and resumed from its
last state ends where an uninterrupted one ends. Held-out windows choose which state is kept.

The next-token loss has the weight 0 unless asked for: on the little text that a task comes with it
is learned by heart (demo model, code: 1.086 x the original's perplexity with weight 0.5, 1.081
without).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edge_moe.converters.recover_student import Branch
from edge_moe.converters.recover_teacher import TeacherCache, divergence
from edge_moe.converters.recover_text import TrainText
from edge_moe.errors import InputError
from edge_moe.files import atomic_path

_BETAS = (0.9, 0.95)
_STATE_NAME = "branches.safetensors"
_FACTORS = ("lora_a", "lora_b")
_MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainSettings(BaseModel):
    """How the branches are trained. The defaults were chosen on the demo model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(default=32, gt=0)
    steps: int = Field(default=300, gt=0)
    batch_windows: int = Field(default=2, gt=0)
    learning_rate: float = Field(default=3e-3, gt=0)
    warmup_steps: int = Field(default=20, ge=0)
    kl_weight: float = Field(default=1.0, ge=0)
    lm_weight: float = Field(default=0.0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    num_judgements: int = Field(default=6, gt=0)
    """How often the held-out windows judge."""
    seed: int = 0

    @property
    def alpha(self) -> float:
        """Branches are not scaled, whatever their rank."""
        return float(self.rank)

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.learning_rate * warm * (0.1 + 0.9 * cosine)

    def is_judged(self, step: int) -> bool:
        """Whether the held-out windows judge after `step` steps."""
        return step == self.steps or step % max(1, self.steps // self.num_judgements) == 0


def train_settings(**values: Any) -> TrainSettings:
    """Settings from options.

    Raises:
        InputError: names the first one that is out of range.
    """
    try:
        return TrainSettings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise InputError(f"{name} is {first['input']!r}: {first['msg']}") from None


class LossRow(BaseModel):
    """One judgement: mean losses in nats per token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    train_divergence: float | None
    """Mean over the steps since the last row; None before the first step."""
    heldout_divergence: float
    heldout_lm_loss: float
    heldout_loss: float
    """Weighted sum of both: what chooses the state that is kept."""
    learning_rate: float
    seconds: float


class BranchTraining:
    """A student with branches, its optimiser, and the state file that survives a kill."""

    def __init__(
        self,
        model: Any,
        branches: dict[str, Branch],
        text: TrainText,
        teacher: TeacherCache,
        settings: TrainSettings,
        folder: Path,
    ) -> None:
        """Goes on where `folder` says, or starts.

        Raises:
            InputError: the state file is damaged.
        """
        self._model = model
        self._text = text
        self._teacher = teacher
        self._settings = settings
        self._state_path = folder / _STATE_NAME
        self._parameters = {
            f"{name}.{factor}": getattr(branch, factor)
            for name, branch in branches.items()
            for factor in _FACTORS
        }
        self._optimiser = torch.optim.AdamW(
            list(self._parameters.values()),
            lr=settings.learning_rate,
            betas=_BETAS,
            weight_decay=settings.weight_decay,
        )
        self._order_of_epoch: tuple[int, list[int]] = (-1, [])
        self._best = self._copy()
        self._recent: list[float] = []
        self._seconds = 0.0
        self.step = 0
        self.log: list[LossRow] = []
        if self._state_path.exists():
            self._restore()

    @property
    def best_row(self) -> LossRow:
        """The judgement of the state that is kept."""
        return min(self.log, key=lambda row: row.heldout_loss)

    def run(self, advance: Callable[[], None] = lambda: None, save_every: int = 25) -> None:
        """Train to the end; afterwards the branches hold the state that judged best.

        Memory is stated by `recover_memory`; `advance` is called once per step.
        """
        settings = self._settings
        if not self.log:
            self._judge()
        while self.step < settings.steps:
            start = time.perf_counter()
            self._take_step()
            self._seconds += time.perf_counter() - start
            if settings.is_judged(self.step):
                self._judge()
            if self.step % save_every == 0 or settings.is_judged(self.step):
                self._save()
            advance()
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._best[name])

    def _take_step(self) -> None:
        settings = self._settings
        for group in self._optimiser.param_groups:
            group["lr"] = settings.rate(self.step)
        first = self.step * settings.batch_windows
        for position in range(first, first + settings.batch_windows):
            kl, lm = self._losses(self._window_at(position))
            loss = settings.kl_weight * kl + settings.lm_weight * lm
            (loss / settings.batch_windows).backward()  # type: ignore[no-untyped-call]
            self._recent.append(float(kl.detach()))
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), settings.clip_norm)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self.step += 1

    def _losses(self, index: int) -> tuple[Tensor, Tensor]:
        """(divergence, next-token cross-entropy) of window `index`, nats per token."""
        ids = torch.tensor([list(self._text.windows[index])])
        logits = self._model(ids, use_cache=False).logits[0]
        return (
            divergence(logits, self._teacher.read(index)),
            F.cross_entropy(logits[:-1].float(), ids[0, 1:]),
        )

    def _window_at(self, position: int) -> int:
        """Which window is learned from at `position`: every epoch in an order of its own."""
        indices = self._text.indices(True)
        epoch, place = divmod(position, len(indices))
        if self._order_of_epoch[0] != epoch:
            order = np.random.default_rng([self._settings.seed, epoch]).permutation(len(indices))
            self._order_of_epoch = epoch, [indices[int(each)] for each in order]
        return self._order_of_epoch[1][place]

    def _judge(self) -> None:
        with torch.no_grad():
            losses = [self._losses(index) for index in self._text.indices(False)]
        kl = sum(float(each) for each, _ in losses) / len(losses)
        lm = sum(float(each) for _, each in losses) / len(losses)
        row = LossRow(
            step=self.step,
            train_divergence=float(np.mean(self._recent)) if self._recent else None,
            heldout_divergence=kl,
            heldout_lm_loss=lm,
            heldout_loss=self._settings.kl_weight * kl + self._settings.lm_weight * lm,
            learning_rate=self._settings.rate(self.step),
            seconds=self._seconds,
        )
        self._recent = []
        self.log.append(row)
        if row is self.best_row:
            self._best = self._copy()

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._parameters.items()}

    def _save(self) -> None:
        tensors = {f"best.{name}": value for name, value in self._best.items()}
        for name, parameter in self._parameters.items():
            tensors[f"now.{name}"] = parameter.detach()
            state = self._optimiser.state[parameter]
            tensors |= {f"{moment}.{name}": state[moment] for moment in _MOMENTS}
        about = {
            "step": str(self.step),
            "seconds": repr(self._seconds),
            "recent": json.dumps(self._recent),
            "log": json.dumps([row.model_dump() for row in self.log]),
        }
        with atomic_path(self._state_path) as temporary:
            save_file(tensors, temporary, metadata=about)

    def _restore(self) -> None:
        try:
            with safe_open(self._state_path, framework="pt") as handle:
                self._read_state(handle)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise InputError(
                f"{self._state_path} is damaged ({error}): remove it and start again"
            ) from None

    def _read_state(self, handle: Any) -> None:
        about = handle.metadata()
        self.step = int(about["step"])
        self._seconds = float(about["seconds"])
        self._recent = list(json.loads(about["recent"]))
        self.log = [LossRow.model_validate(row) for row in json.loads(about["log"])]
        for name, parameter in self._parameters.items():
            with torch.no_grad():
                parameter.copy_(handle.get_tensor(f"now.{name}"))
            self._best[name] = handle.get_tensor(f"best.{name}")
            self._optimiser.state[parameter] = {
                "step": torch.tensor(float(self.step)),
                **{moment: handle.get_tensor(f"{moment}.{name}") for moment in _MOMENTS},
            }
