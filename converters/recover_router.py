"""Router calibration: the shrunken model's routers choose what the original's routers chose.

After EAC-MoE (ACL 2025), which finds that half of a quantised MoE's loss is misrouting: layer by
layer, with earlier layers calibrated already, the router's rows are fitted on the inputs that the
shrunken model really gives it, against the original's distribution on the same text. The paper
looks at the chosen experts' logits; here it is the divergence of the whole distribution, which is
convex in the rows (softmax regression) and needs no learning rate. Where experts were dropped, the
original's distribution is the one over the kept experts.

    min over R'  mean_t KL(p(x_t R^T) || p(x'_t R'^T)) + ridge / 2 |R' - R|^2 mean_t |x'_t|^2 / H

with x the original's router inputs and x' the shrunken model's. p is softmax over the experts, for
sigmoid routers one Bernoulli per expert; a selection bias stays as it is. Rows that do not lower
the divergence on held-out windows are not kept. Letters: T tokens, R rows, H hidden_size, k top_k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.layer_stream import LayerStream
from edge_moe.converters.recover_student import (
    EXPERTS_IMPLEMENTATION,
    PackageSource,
    PackageStream,
)
from edge_moe.errors import InputError
from edge_moe.files import atomic_path
from edge_moe.package import Package

RIDGE = 1e-3
MAX_ITERATIONS = 100


class RouterFit(BaseModel):
    """What calibration did to one router, measured on held-out windows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer_id: int
    divergence_before: float
    """Nats per token."""
    divergence_after: float
    overlap_before: float
    """Share of the original's top_k (among kept experts) that is chosen."""
    overlap_after: float
    is_kept: bool
    """Whether the fitted rows replace the old ones."""


@dataclass(frozen=True)
class RouterInputs:
    """What one layer's router is given on all windows."""

    original: Tensor
    """[T, H]"""
    shrunken: Tensor
    """[T, H]"""
    is_training: Tensor
    """[T] bool; the other tokens judge."""


def calibrate_routers(
    package: Package,
    original: Checkpoint,
    windows: Sequence[Sequence[int]],
    is_training: Sequence[bool],
    folder: Path,
    advance: Callable[[], None] = lambda: None,
) -> tuple[dict[int, Tensor], list[RouterFit]]:
    """New rows [R, H] float32 by layer id, for the layers where they help, and what was measured.

    One file per layer in `folder`: a killed run goes on at the first layer without one. `advance`
    is called once per decoder layer. Memory: one layer of each model and 4 [T, H] float32.

    Raises:
        InputError, CheckpointError, PackageError: damaged files.
    """
    folder.mkdir(exist_ok=True)
    source = PackageSource(package)
    run = _Run(original, source, windows, is_training, folder)
    with torch.no_grad():
        for layer_id in range(package.spec.num_layers):
            run.layer(layer_id)
            advance()
    source.close()
    return run.rows, run.fits


class _Run:
    """Both models in step, layer by layer, over all windows."""

    def __init__(
        self,
        original: Checkpoint,
        source: PackageSource,
        windows: Sequence[Sequence[int]],
        is_training: Sequence[bool],
        folder: Path,
    ) -> None:
        self._teacher = LayerStream(original, EXPERTS_IMPLEMENTATION)
        self._student = PackageStream(source)
        self._router = source.spec.router
        self._moe_layer_ids = source.spec.moe_layer_ids
        self._folder = folder
        self._lengths = [len(window) for window in windows]
        self._is_training = torch.tensor(list(is_training))
        self._wanted = [self._teacher.embed(window) for window in windows]
        self._found = [self._student.embed(window) for window in windows]
        self.rows: dict[int, Tensor] = {}
        self.fits: list[RouterFit] = []

    def layer(self, layer_id: int) -> None:
        """Calibrate one layer and run it, so that the next one sees what it does now."""
        with self._student.loaded(layer_id):
            if layer_id in self._moe_layer_ids:
                self._calibrate(layer_id)
            else:
                self._wanted, _ = self._run_teacher(layer_id)
            self._found = [self._student.run(layer_id, hidden) for hidden in self._found]

    def _calibrate(self, layer_id: int) -> None:
        gate = self._student.moe_block(layer_id).router
        state = self._folder / f"router_{layer_id:04}.safetensors"
        self._wanted, original = self._run_teacher(layer_id)
        if not state.exists():
            shrunken = self._router_inputs(self._student, layer_id, self._found)[1]
            is_training = torch.repeat_interleave(self._is_training, torch.tensor(self._lengths))
            inputs = RouterInputs(original, shrunken, is_training)
            is_sigmoid = self._router.score_function == "sigmoid"
            _save(state, *fit_router(gate, inputs, layer_id, is_sigmoid=is_sigmoid))
        rows, fit = _load(state)
        self.fits.append(fit)
        if fit.is_kept:
            self.rows[layer_id] = rows
            gate.weight.copy_(rows)

    def _run_teacher(self, layer_id: int) -> tuple[list[Tensor], Tensor]:
        with self._teacher.loaded(layer_id):
            return self._router_inputs(self._teacher, layer_id, self._wanted)

    def _router_inputs(
        self, stream: LayerStream, layer_id: int, hidden: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """(outputs of the layer, what its router was given [T, H]; empty without a router)."""
        seen: list[Tensor] = []
        hook = None
        if layer_id in self._moe_layer_ids:
            hook = stream.moe_block(layer_id).router.register_forward_pre_hook(
                lambda _, inputs: seen.append(inputs[0].flatten(0, -2).clone())
            )
        outputs = [stream.run(layer_id, each) for each in hidden]
        if hook is not None:
            hook.remove()
        return outputs, torch.cat(seen) if seen else torch.empty(0)


def fit_router(
    gate: Any, inputs: RouterInputs, layer_id: int, *, is_sigmoid: bool
) -> tuple[Tensor, RouterFit]:
    """(rows [R, H], what they do). `gate` is transformers' router with the rows to start from."""
    judged = ~inputs.is_training
    wanted_logits, _, wanted_ids = gate(inputs.original)
    before_logits, _, before_ids = gate(inputs.shrunken)
    start: Tensor = gate.weight.detach().clone()
    fitted = fit_rows(
        start,
        inputs.shrunken[inputs.is_training],
        wanted_logits[inputs.is_training],
        is_sigmoid=is_sigmoid,
    )
    gate.weight.copy_(fitted)
    after_logits, _, after_ids = gate(inputs.shrunken)
    gate.weight.copy_(start)

    def judge(logits: Tensor) -> float:
        return float(router_divergence(logits[judged], wanted_logits[judged], is_sigmoid))

    before, after = judge(before_logits), judge(after_logits)
    fit = RouterFit(
        layer_id=layer_id,
        divergence_before=before,
        divergence_after=after,
        overlap_before=overlap(before_ids[judged], wanted_ids[judged]),
        overlap_after=overlap(after_ids[judged], wanted_ids[judged]),
        is_kept=after < before,
    )
    return fitted, fit


def fit_rows(start: Tensor, inputs: Tensor, wanted_logits: Tensor, *, is_sigmoid: bool) -> Tensor:
    """Router rows [R, H] that minimise the module's objective, from `start` by L-BFGS.

    `inputs` [T, H] of the shrunken model, `wanted_logits` [T, R] of the original.
    """
    rows = start.clone().requires_grad_(True)
    weight = RIDGE / 2 * inputs.square().mean()
    optimiser = torch.optim.LBFGS([rows], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = router_divergence(F.linear(inputs, rows), wanted_logits, is_sigmoid)
        loss = loss + weight * (rows - start).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimiser.step(closure)  # type: ignore[no-untyped-call]
    return rows.detach()


def router_divergence(logits: Tensor, wanted_logits: Tensor, is_sigmoid: bool) -> Tensor:
    """Mean KL(wanted || found) in nats per token; both [T, R]."""
    if is_sigmoid:
        wanted = wanted_logits.sigmoid()
        found = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        least = F.binary_cross_entropy_with_logits(wanted_logits, wanted, reduction="none")
        return (found - least).sum(dim=1).mean()
    wanted_log = F.log_softmax(wanted_logits, dim=1)
    return (wanted_log.exp() * (wanted_log - F.log_softmax(logits, dim=1))).sum(dim=1).mean()


def overlap(found_ids: Tensor, wanted_ids: Tensor) -> float:
    """Share of `wanted_ids` [T, k] that are among `found_ids` [T, k] of the same token."""
    return float((wanted_ids[:, :, None] == found_ids[:, None, :]).any(dim=2).double().mean())


def _save(path: Path, rows: Tensor, fit: RouterFit) -> None:
    with atomic_path(path) as temporary:
        save_file({"rows": rows}, temporary, metadata={"fit": fit.model_dump_json()})


def _load(path: Path) -> tuple[Tensor, RouterFit]:
    try:
        with safe_open(path, framework="pt") as handle:
            return handle.get_tensor("rows"), RouterFit.model_validate_json(
                handle.metadata()["fit"]
            )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): remove it and start again") from None
