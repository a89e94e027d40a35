"""Fitting a `LinearMap`: ridge regression of what routers rank by on the block input before.

With centred inputs X [N, H] of a MoE block and scores Y [N, E] of the next router,

    B = (X'X + r I)^-1 X'Y,  r = ridge x trace(X'X) / H

needs sums only: [H, H] and [H, E] per layer in float64. As many layers as fit `limit_bytes` are
summed in one pass over the text; the text is read again for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_moe.errors import InputError
from edge_moe.runtime.linear_map import LinearMap, LinearMapInfo
from edge_moe.runtime.moe_block import MoeBlock
from edge_moe.runtime.session import Session
from edge_moe.spec import ModelSpec
from edge_moe.units import format_bytes

LIMIT_BYTES = 10**9
RIDGE = 0.01
Float64 = npt.NDArray[np.float64]


class Moments:
    """Sums over tokens of one pair of layers."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        self.num_tokens = 0
        self._x: Float64 = np.zeros(hidden_size)
        self._y: Float64 = np.zeros(num_experts)
        self._yy: Float64 = np.zeros(num_experts)
        self._xx: Float64 = np.zeros((hidden_size, hidden_size))
        self._xy: Float64 = np.zeros((hidden_size, num_experts))

    def add(self, inputs: npt.NDArray[np.float32], scores: npt.NDArray[np.float32]) -> None:
        """[T, H] and [T, E] of the same tokens."""
        self.num_tokens += len(inputs)
        self._x += inputs.sum(axis=0, dtype=np.float64)
        self._y += scores.sum(axis=0, dtype=np.float64)
        self._yy += np.square(scores, dtype=np.float64).sum(axis=0)
        self._xx += inputs.T @ inputs
        self._xy += inputs.T @ scores

    def solve(self, ridge: float) -> tuple[Float64, Float64, float]:
        """([E, H] map, [E] offset, share of the variance of the scores that they explain)."""
        count = self.num_tokens
        mean_x, mean_y = self._x / count, self._y / count
        xx = self._xx - count * np.outer(mean_x, mean_x)
        xy = self._xy - count * np.outer(mean_x, mean_y)
        weight = ridge * np.trace(xx) / len(xx)
        solved = np.linalg.solve(xx + max(weight, 1e-12) * np.eye(len(xx)), xy)
        total = float((self._yy - count * mean_y**2).sum())
        residual = total - 2 * float((solved * xy).sum()) + float((solved * (xx @ solved)).sum())
        explained = 1 - residual / total if total > 0 else 1.0
        return solved.T, mean_y - mean_x @ solved, explained


def moment_bytes(hidden_size: int, num_experts: int) -> int:
    """Of one pair of layers."""
    return 8 * (hidden_size * (hidden_size + num_experts + 1) + 2 * num_experts)


def fit_linear(
    session: Session,
    windows: Sequence[Sequence[int]],
    tasks: Sequence[str],
    *,
    ridge: float = RIDGE,
    limit_bytes: int = LIMIT_BYTES,
    advance: Callable[[], None] = lambda: None,
) -> LinearMap:
    """Fit a map on `windows` of text, each a sequence of its own.

    `advance` is called after each window of each pass, see `num_passes`.

    Raises:
        InputError: no text, sums that do not fit, or a model whose experts have a latent input.
    """
    spec, kept = session.spec, session.kept
    require_states(spec)
    if not any(windows) or ridge < 0:
        raise InputError("a linear map needs text, and a --ridge of at least 0: give both")
    solved = []
    for layers in passes(spec, limit_bytes):
        moments = {layer: Moments(spec.hidden_size, len(kept[layer])) for layer in layers}
        with torch.inference_mode(), _watched(session, moments):
            for window in windows:
                session.new_loop().prefill(window)
                advance()
        solved += [moments[layer].solve(ridge) for layer in layers]
    info = LinearMapInfo(
        model_fingerprint=session.fingerprint,
        hidden_size=spec.hidden_size,
        kept=tuple(map(tuple, kept)),
        tasks=tuple(tasks),
        num_tokens=sum(map(len, windows)),
        ridge=ridge,
        explained=tuple(explained for _, _, explained in solved),
    )
    maps = [matrix.astype(np.float32) for matrix, _, _ in solved]
    return LinearMap(info, maps, [offset.astype(np.float32) for _, offset, _ in solved])


def passes(spec: ModelSpec, limit_bytes: int) -> list[range]:
    """MoE layers whose sums are taken in each pass over the text.

    Raises:
        InputError: not even one fits.
    """
    one = moment_bytes(spec.hidden_size, spec.num_experts)
    if one > limit_bytes:
        raise InputError(
            f"the sums of one layer take {format_bytes(one)}: raise --memory from "
            f"{format_bytes(limit_bytes)}"
        )
    step, last = limit_bytes // one, spec.num_moe_layers
    return [range(start, min(start + step, last)) for start in range(1, last, step)]


def require_states(spec: ModelSpec) -> None:
    """Raise InputError where experts are not given what the next router would be."""
    if spec.latent_width:
        raise InputError(
            f"experts of {spec.model_type} have an input of their own, which says nothing to the "
            "next router: use predictors that need no state, such as transitions"
        )


@contextmanager
def _watched(session: Session, moments: dict[int, Moments]) -> Iterator[None]:
    """While the model runs, every block's input and the next one's scores go into `moments`."""
    blocks, spec = session.blocks, session.spec
    inputs: dict[int, torch.Tensor] = {}
    scores: dict[int, torch.Tensor] = {}

    def rank(layer: int) -> Callable[[torch.Tensor], None]:
        return lambda logits: scores.__setitem__(layer, ranked_by(blocks[layer], logits, spec))

    def enter(layer: int) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden = arguments[0] if arguments else named["hidden_states"]
            inputs[layer] = hidden.flatten(0, -2)
            if layer in moments:
                found = scores.pop(layer).flatten(0, -2)
                moments[layer].add(_numpy(inputs.pop(layer - 1)), _numpy(found))

        return hook

    with ExitStack() as stack:
        for layer, block in enumerate(blocks):
            stack.callback(block.on_logits(rank(layer)).remove)
            hook = block.experts.register_forward_pre_hook(enter(layer), with_kwargs=True)
            stack.callback(hook.remove)
        yield


def ranked_by(block: MoeBlock, logits: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """[T, E] what the choice goes by, groups aside: logits, or scores where a bias is added."""
    if not spec.router.has_selection_bias:
        return logits
    bias = block.selection_bias.to(logits.device).flatten().float()
    values = logits.float()
    is_sigmoid = spec.router.score_function == "sigmoid"
    return (values.sigmoid() if is_sigmoid else values.softmax(dim=-1)) + bias


def _numpy(values: torch.Tensor) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = values.float().cpu().numpy()
    return found
