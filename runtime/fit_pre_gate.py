"""Training a `PreGate`: distillation of the routers' own choices on text.

The model runs once over the text and routes by itself; what its first MoE block is given and what
every later router chose, and with which weights, is kept in memory:

    loss = mean over tokens and layers of  - sum_e share_e log softmax(score)_e

share_e is the weight of the chosen expert e as a share of those of all chosen (0 for the others).
Adam, cosine to zero, on standardised inputs, whose mean and deviation go into the first matrix in
the end. Every eighth window judges after each epoch, and the best epoch's weights are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_moe.errors import InputError
from edge_moe.runtime.pre_gate import PreGate, PreGateInfo
from edge_moe.runtime.pre_gated_routing import require_pre_gateable
from edge_moe.runtime.session import Session
from edge_moe.units import MAX_SEED, format_bytes

LIMIT_BYTES = 2 * 10**9
_JUDGE_EVERY = 8
_SMALLEST_DEVIATION = 1e-6


@dataclass(frozen=True)
class PreGateSettings:
    """How one is trained. The defaults were chosen on the demo model."""

    width: int = 512
    """Of the hidden layer."""
    epochs: int = 20
    batch_tokens: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    seed: int = 0

    def check(self) -> None:
        """Raise InputError for a value that means nothing."""
        for name in ("width", "epochs", "batch_tokens"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} is {getattr(self, name)}: use 1 or more")
        if not 0 <= self.seed <= MAX_SEED:
            raise InputError(f"--seed is {self.seed}: use 0 to {MAX_SEED}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"--learning-rate is {self.learning_rate}: use a number above 0")


@dataclass(frozen=True)
class Choices:
    """What the routers chose; N tokens, L MoE layers, k top_k."""

    inputs: Tensor
    """[N, H] of the first MoE block."""
    rows: Tensor
    """[N, L - 1, k]"""
    shares: Tensor
    """[N, L - 1, k] of each token's and layer's weights; they sum to 1."""
    is_training: Tensor
    """[N] bool; the others judge."""

    def part(self, is_training: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(inputs, rows, shares) of the tokens that train, or judge."""
        found = self.is_training == is_training
        return self.inputs[found], self.rows[found], self.shares[found]


def fit_pre_gate(
    session: Session,
    windows: Sequence[Sequence[int]],
    tasks: Sequence[str],
    settings: PreGateSettings | None = None,
    *,
    limit_bytes: int = LIMIT_BYTES,
    advance: Callable[[], None] = lambda: None,
) -> PreGate:
    """Train a pre-gate for the model of `session` on `windows` of text, each a sequence of its own.

    `advance` is called after each window and after each epoch. The session's model must route by
    itself.

    Raises:
        InputError: too little text, a model that no pre-gate can choose for, settings that mean
            nothing, or more than `limit_bytes` of states.
    """
    settings = settings or PreGateSettings()
    settings.check()
    require_pre_gateable(session.spec)
    if session.pre_gate:
        raise InputError("a pre-gate learns from the routers: open the model without one")
    if sum(map(bool, windows)) < 2:
        raise InputError(
            f"the text gives {len(windows)} window, but one must be learned from and another "
            "judge: use a smaller --window-tokens or more text"
        )
    _require_room(session, windows, limit_bytes)
    choices = gather(session, windows, advance)
    num_rows = [len(kept) for kept in session.kept[1:]]
    training = _Training(choices, num_rows, settings)
    for _ in range(settings.epochs):
        training.epoch()
        advance()
    info = PreGateInfo(
        model_fingerprint=session.fingerprint,
        hidden_size=session.spec.hidden_size,
        kept=tuple(map(tuple, session.kept)),
        tasks=tuple(tasks),
        num_tokens=int(choices.is_training.sum()),
        width=settings.width,
        epochs=training.best_epoch,
        agreement=tuple(training.best_agreement),
    )
    return training.best(info)


def states_bytes(session: Session, num_tokens: int) -> int:
    """What `gather` keeps of so many tokens, and training doubles for a moment."""
    per_layer = session.spec.top_k * (8 + 4)
    one = 4 * session.spec.hidden_size + per_layer * (session.spec.num_moe_layers - 1)
    return 2 * num_tokens * one


def gather(
    session: Session, windows: Sequence[Sequence[int]], advance: Callable[[], None] = lambda: None
) -> Choices:
    """Run the text through the model, every window from an empty context."""
    inputs: list[Tensor] = []
    with torch.inference_mode(), _watched(session, inputs), session.tracing() as recorder:
        for window in windows:
            session.new_loop().prefill(window)
            advance()
    trace = recorder.finish(session.trace_info())
    weights = torch.from_numpy(trace.weights[:, 1:].astype("float32")).abs()
    smallest = torch.finfo(weights.dtype).tiny
    shares = (weights + smallest) / (weights + smallest).sum(dim=2, keepdim=True)
    judges = torch.tensor([index % _JUDGE_EVERY == 1 for index in range(len(windows))])
    lengths = torch.tensor([len(window) for window in windows])
    return Choices(
        inputs=torch.cat(inputs).clone(),
        rows=torch.from_numpy(trace.rows[:, 1:].astype("int64")),
        shares=shares,
        is_training=~judges.repeat_interleave(lengths),
    )


class _Training:
    """The network on standardised inputs, and its best weights so far."""

    def __init__(
        self, choices: Choices, num_rows: Sequence[int], settings: PreGateSettings
    ) -> None:
        self._num_rows = list(num_rows)
        self._settings = settings
        self._data = choices.part(True)
        self._judged = choices.part(False)
        self._mean = self._data[0].mean(dim=0)
        self._deviation = self._data[0].std(dim=0).clamp(min=_SMALLEST_DEVIATION)
        self._generator = torch.Generator().manual_seed(settings.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self._inner = nn.Linear(self._data[0].shape[1], settings.width)
            self._scores = nn.Linear(settings.width, sum(num_rows))
        self._network = nn.Sequential(self._inner, nn.SiLU(), self._scores)
        self._optimiser = torch.optim.AdamW(
            self._network.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        steps = settings.epochs * math.ceil(len(self._data[0]) / settings.batch_tokens)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimiser, steps)
        self._epoch = 0
        self.best_epoch = 0
        self.best_agreement: list[float] = []
        """By layer."""
        self._best: dict[str, Tensor] = {}

    def epoch(self) -> None:
        """Every token once, then the judgement."""
        inputs, rows, shares = self._data
        order = torch.randperm(len(inputs), generator=self._generator)
        for part in torch.split(order, self._settings.batch_tokens):
            self._optimiser.zero_grad()
            loss = self._loss(self._scored(inputs[part]), rows[part], shares[part])
            torch.autograd.backward(loss)
            self._optimiser.step()
            self._schedule.step()
        self._epoch += 1
        self._judge()

    def best(self, info: PreGateInfo) -> PreGate:
        """The kept weights, for inputs as they come."""
        state = self._best
        if not state or not all(torch.isfinite(each).all() for each in state.values()):
            raise InputError("training diverged: use a lower --learning-rate")
        inner = state["0.weight"] / self._deviation
        return PreGate(
            info,
            inner,
            state["0.bias"] - inner @ self._mean,
            [each.contiguous() for each in torch.split(state["2.weight"], self._num_rows)],
            [each.contiguous() for each in torch.split(state["2.bias"], self._num_rows)],
        )

    def _scored(self, inputs: Tensor) -> list[Tensor]:
        """[n, E_l] of every layer."""
        scores: Tensor = self._network((inputs - self._mean) / self._deviation)
        return list(torch.split(scores, self._num_rows, dim=1))

    def _loss(self, scores: Sequence[Tensor], rows: Tensor, shares: Tensor) -> Tensor:
        losses = [
            -(functional.log_softmax(each, dim=1).gather(1, rows[:, layer]) * shares[:, layer])
            for layer, each in enumerate(scores)
        ]
        return torch.stack([each.sum(dim=1).mean() for each in losses]).mean()

    @torch.no_grad()
    def _judge(self) -> None:
        inputs, rows, _ = self._judged
        top_k = rows.shape[2]
        found = [
            (each.topk(top_k, dim=1).indices[:, :, None] == rows[:, layer, None]).any(dim=1)
            for layer, each in enumerate(self._scored(inputs))
        ]
        agreement = [float(each.float().mean()) for each in found]
        if sum(agreement) > sum(self.best_agreement):
            self.best_epoch, self.best_agreement = self._epoch, agreement
            self._best = {name: value.clone() for name, value in self._network.state_dict().items()}


def _require_room(session: Session, windows: Sequence[Sequence[int]], limit_bytes: int) -> None:
    needed = states_bytes(session, sum(map(len, windows)))
    if needed > limit_bytes:
        raise InputError(
            f"what the routers see and choose on this text takes {format_bytes(needed)}: raise "
            f"--memory from {format_bytes(limit_bytes)}, or lower --max-windows"
        )


@contextmanager
def _watched(session: Session, inputs: list[Tensor]) -> Iterator[None]:
    """While the model runs, what the first router is given goes into `inputs`, [T, H] each."""

    def keep(module: Any, arguments: tuple[Any, ...]) -> None:
        inputs.append(arguments[0].flatten(0, -2).float().cpu())

    hook = session.blocks[0].router.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        hook.remove()
