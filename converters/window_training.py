"""Training on windows of text: optimiser, schedule, held-out judgement, and a state that survives.

    loss = kl_weight * KL(original || student) + lm_weight * next-token cross-entropy + penalty

AdamW, linear warm-up, cosine to a tenth, gradients clipped by their joint norm. Windows come in an
order that depends on the seed and the step alone, so a run that was killed and resumed from its
last state ends where an uninterrupted one ends. Held-out windows choose which state is kept.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from edge_moe.converters.recover_text import TrainText
from edge_moe.converters.safetensors_writer import TensorEntry, safetensors_file
from edge_moe.errors import InputError
from edge_moe.files import atomic_path
from edge_moe.flags import SHORT, flag
from edge_moe.json_files import first_problem
from edge_moe.units import MAX_SEED

_BETAS = (0.9, 0.95)
_MOMENTS = ("exp_avg", "exp_avg_sq")
_STATE_COPIES = 4  # value, best value, two moments


class WindowSettings(BaseModel):
    """How anything is trained on windows of text."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: int = Field(default=300, ge=0)
    batch_windows: int = Field(default=2, gt=0)
    learning_rate: float = Field(default=3e-3, gt=0)
    warmup_steps: int = Field(default=20, ge=0)
    kl_weight: float = Field(default=1.0, ge=0)
    lm_weight: float = Field(default=0.0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    num_judgements: int = Field(default=6, gt=0)
    """How often the held-out windows judge."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)

    @model_validator(mode="after")
    def _require_a_loss(self) -> Self:
        """Without either there is nothing to learn, and no state is better than another."""
        if self.steps and not self.kl_weight and not self.lm_weight:
            raise ValueError(
                f"{flag('kl_weight')} and {flag('lm_weight')} are both 0, which leaves nothing to "
                "learn from: raise one"
            )
        return self

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        cosine = (1 + math.cos(math.pi * step / max(1, self.steps))) / 2
        return self.learning_rate * warm * (0.1 + 0.9 * cosine)

    def is_judged(self, step: int) -> bool:
        """Whether the held-out windows judge after `step` steps."""
        return step == self.steps or step % max(1, self.steps // self.num_judgements) == 0


S = TypeVar("S", bound=WindowSettings)


def checked_settings(kind: type[S], typed: Mapping[str, str] = SHORT, /, **values: Any) -> S:
    """Settings from options, which messages name as `flag` spells them with `typed`.

    Raises:
        InputError: names the first one that is out of range, or those that do not go together.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        first, problem = error.errors()[0], first_problem(error)
        if not first["loc"]:  # it is about several of them
            raise InputError(problem) from None
        name = str(first["loc"][0])
        reason = problem.removeprefix(f"{name}: ")
        raise InputError(f"{flag(name, typed)} is {first['input']!r}: {reason}") from None


class LossRow(BaseModel):
    """One judgement: mean losses in nats per token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    train_divergence: float | None
    """Mean over the steps since the last row; None before the first step."""
    heldout_divergence: float
    """From the original; 0 where none is trained against."""
    heldout_lm_loss: float
    heldout_loss: float
    """Weighted sum of both: what chooses the state that is kept."""
    learning_rate: float
    seconds: float


class JudgedTraining(BaseModel):
    """The part of a record that says how the training went."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    losses: list[LossRow]

    def row(self, step: int | None) -> LossRow | None:
        """The judgement at `step`."""
        return next((row for row in self.losses if row.step == step), None)


class Losses(NamedTuple):
    """Of one window: means over its tokens, in nats."""

    divergence: Tensor
    """KL(original || student); 0 where there is no original."""
    lm_loss: Tensor
    """Next-token cross-entropy."""
    penalty: Tensor
    """Added to what is trained on, weighted already; nothing is judged by it."""


class Objective(Protocol):
    """What is trained."""

    def begin(self) -> None:
        """Parameters have new values."""

    def losses(self, index: int) -> Losses:
        """Of window `index`."""

    def end(self) -> None:
        """All windows of a step went backward: complete the parameters' gradients."""


class WindowOrder:
    """Which window is learned from when: every epoch has an order of its own."""

    def __init__(self, text: TrainText, seed: int) -> None:
        self._indices = text.indices(True)
        self._seed = seed
        self._order_of_epoch: tuple[int, list[int]] = (-1, [])

    def at(self, position: int) -> int:
        """The window at `position`, counted from the start of the training."""
        epoch, place = divmod(position, len(self._indices))
        if self._order_of_epoch[0] != epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._indices))
            self._order_of_epoch = epoch, [self._indices[int(each)] for each in order]
        return self._order_of_epoch[1][place]


def windows_read(text: TrainText, settings: WindowSettings) -> list[int]:
    """Every window that a training learns from or is judged by, ascending."""
    order = WindowOrder(text, settings.seed)
    learned = {order.at(place) for place in range(settings.steps * settings.batch_windows)}
    return sorted(learned | set(text.indices(False)))


def state_bytes(num_weights: int) -> int:
    """Disk bytes of a training's state at most: while it is written, the last one is there too."""
    return 2 * 4 * _STATE_COPIES * num_weights


def missing_state_bytes(path: Path, num_weights: int, steps: int) -> int:
    """Disk bytes that the state in `path` may still take, beyond what it takes already."""
    if not path.exists():
        return state_bytes(num_weights)
    try:
        with safe_open(path, framework="pt") as handle:
            is_over = int(handle.metadata()["step"]) >= steps
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        is_over = False  # damaged: whoever restores it says so
    return 0 if is_over else max(0, state_bytes(num_weights) - path.stat().st_size)


class WindowTraining:
    """Parameters, their optimiser, and the state file that survives a kill."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        objective: Objective,
        text: TrainText,
        settings: WindowSettings,
        state_path: Path,
        log_path: Path | None = None,
    ) -> None:
        """Goes on where `state_path` says, or starts.

        `log_path` gets a JSON line for every step and every judgement.

        Raises:
            InputError: the state file is damaged.
        """
        self._parameters = parameters
        self._objective = objective
        self._text = text
        self._settings = settings
        self._state_path = state_path
        self._lines = LossLog(log_path)
        self._optimiser = torch.optim.AdamW(
            list(parameters.values()),
            lr=settings.learning_rate,
            betas=_BETAS,
            weight_decay=settings.weight_decay,
            foreach=False,  # on CUDA it would hold all parameters once more
        )
        self._order = WindowOrder(text, settings.seed)
        self._best = {name: value.detach().clone() for name, value in parameters.items()}
        self._recent: list[float] = []
        self._seconds = 0.0
        self._is_changing = False
        """Parameters are half new, or a judgement is half noted: no state to save."""
        self._saved_step = 0
        self.step = 0
        self.log: list[LossRow] = []
        if state_path.exists():
            self._restore()
        self._lines.keep_until(self.step)
        objective.begin()

    @property
    def best_row(self) -> LossRow:
        """The judgement of the state that is kept."""
        return min(self.log, key=lambda row: row.heldout_loss)

    def run(
        self,
        advance: Callable[[], None] = lambda: None,
        save_every: int = 25,
        save_seconds: float = 0.0,
    ) -> None:
        """Train to the end; afterwards the parameters hold the state that judged best.

        The state is saved every `save_every` steps where `save_seconds` have passed since, at
        Ctrl-C, and at the end. `advance` is called once per step.
        """
        saved = time.monotonic()
        try:
            self._judge_where_due()
            while self.step < self._settings.steps:
                start = time.perf_counter()
                self._take_step()
                self._seconds += time.perf_counter() - start
                self._judge_where_due()
                is_due = self.step % save_every == 0 or self._is_judged()
                is_last = self.step == self._settings.steps
                if is_due and (is_last or time.monotonic() - saved >= save_seconds):
                    self._save()
                    saved = time.monotonic()
                advance()
        except KeyboardInterrupt:
            if not self._is_changing and self.step > self._saved_step:
                self._save()  # what was learned; what was cut short is done again
            raise
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._best[name])
        self._objective.begin()

    def _take_step(self) -> None:
        settings = self._settings
        for group in self._optimiser.param_groups:
            group["lr"] = settings.rate(self.step)
        first = self.step * settings.batch_windows
        found: list[list[float]] = []
        for position in range(first, first + settings.batch_windows):
            kl, lm, penalty = self._objective.losses(self._order.at(position))
            loss = settings.kl_weight * kl + settings.lm_weight * lm + penalty
            torch.autograd.backward(loss / settings.batch_windows)
            found.append([float(each.detach()) for each in (kl, lm, penalty)])
        self._is_changing = True
        self._objective.end()
        torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), settings.clip_norm)
        rate = settings.rate(self.step)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self._objective.begin()
        self.step += 1
        self._recent += [row[0] for row in found]
        means = np.mean(found, axis=0).tolist()
        self._lines.add(
            step=self.step,
            **dict(zip(Losses._fields, means, strict=True)),
            learning_rate=rate,
            seconds=round(self._seconds, 3),
        )
        self._is_changing = False

    def _is_judged(self) -> bool:
        return bool(self.log) and self.log[-1].step == self.step

    def _judge_where_due(self) -> None:
        """Also where a run was cut short before it had judged its last step."""
        if self._settings.is_judged(self.step) and not self._is_judged():
            self._judge()

    def _judge(self) -> None:
        with torch.no_grad():
            losses = [self._objective.losses(index) for index in self._text.indices(False)]
        kl = sum(float(each.divergence) for each in losses) / len(losses)
        lm = sum(float(each.lm_loss) for each in losses) / len(losses)
        row = LossRow(
            step=self.step,
            train_divergence=float(np.mean(self._recent)) if self._recent else None,
            heldout_divergence=kl,
            heldout_lm_loss=lm,
            heldout_loss=self._settings.kl_weight * kl + self._settings.lm_weight * lm,
            learning_rate=self._settings.rate(self.step),
            seconds=self._seconds,
        )
        self._is_changing = True
        self._recent = []
        self.log.append(row)
        self._lines.add(
            step=self.step, heldout_divergence=kl, heldout_lm_loss=lm, heldout_loss=row.heldout_loss
        )
        if row is self.best_row:
            for name, value in self._parameters.items():
                self._best[name].copy_(value.detach())
        self._is_changing = False

    def _save(self) -> None:
        """Memory: one tensor more than is held."""
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
        entries = [TensorEntry(name, "F32", tuple(value.shape)) for name, value in tensors.items()]
        with safetensors_file(self._state_path, entries, metadata=about) as writer:
            for name, value in tensors.items():
                writer.write(name, [value.cpu().numpy().tobytes()])
        self._saved_step = self.step

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
        self.step = self._saved_step = int(about["step"])
        self._seconds = float(about["seconds"])
        self._recent = list(json.loads(about["recent"]))
        self.log = [LossRow.model_validate(row) for row in json.loads(about["log"])]
        for name, parameter in self._parameters.items():
            with torch.no_grad():
                parameter.copy_(handle.get_tensor(f"now.{name}"))
                self._best[name].copy_(handle.get_tensor(f"best.{name}"))
            moments = {
                moment: handle.get_tensor(f"{moment}.{name}").to(parameter.device)
                for moment in _MOMENTS
            }
            self._optimiser.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}


class LossLog:
    """A file of JSON lines, one per step and judgement."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def add(self, **values: float) -> None:
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(values) + "\n")

    def keep_until(self, step: int) -> None:
        """Forget lines of later steps, which a killed run wrote after its last state."""
        if self._path is None or not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                is_known = json.loads(line)["step"] <= step
            except ValueError:  # the end of a line is missing
                is_known = False
            kept += [line] if is_known else []
        with atomic_path(self._path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
