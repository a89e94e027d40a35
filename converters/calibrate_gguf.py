"""GGUF file + task text -> ExpertStats, on llama.cpp itself. The cousin of `calibrate`.

First every window runs through llama.cpp once, alone, and leaves what its MoE blocks did on disk
(`window_spool`). Then, layer by layer, windows are summed and the experts' forms are measured, with
one expert dequantised at a time. What is measured is what llama.cpp computes, rounded activations
included; only the change that a form makes to an expert's output is computed in float32, from the
dequantised weights.

Cost per token: llama.cpp's own evaluation at top_k + 1 without the output head, and per MoE layer
6HI x k x (1 + lossy forms) floating point operations, and 4HI x k for the moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_moe.converters.block_sums import (
    TokenRecords,
    WindowObservation,
    add_window,
    chosen_experts,
    router_scores,
    summarise,
    token_records,
)
from edge_moe.converters.calibration_memory import state_and_require_memory
from edge_moe.converters.calibration_request import (
    CalibrationRequest,
    Fingerprints,
    checked_forms,
)
from edge_moe.converters.form_loss import FormLosses, add_moments
from edge_moe.converters.gguf_memory import gguf_calibration_terms
from edge_moe.converters.gguf_work import GgufWork, gguf_work
from edge_moe.converters.progress import progress_bar
from edge_moe.converters.rerouting import fill_slots
from edge_moe.converters.stored_experts import GgufExperts, StoredExperts
from edge_moe.converters.window_spool import WindowWriter, spool_bytes
from edge_moe.errors import CheckpointError, InputError
from edge_moe.files import require_free_disk
from edge_moe.formats import DROP, get_form, split_form
from edge_moe.gguf_model import GgufModel
from edge_moe.offer import gguf_forms
from edge_moe.runtime.gguf_logits import gguf_tokenizer
from edge_moe.runtime.llama_capture import BlockCapture, LlamaCapture, require_capturable
from edge_moe.runtime.llama_graph import ARCHITECTURES
from edge_moe.spec import ModelSpec
from edge_moe.stats import ExpertStats, StatsInfo, require_unfinished
from edge_moe.tasks import task_windows


def calibrate_gguf(
    path: Path,
    tasks: Sequence[str],
    output: Path,
    *,
    window_tokens: int = 512,
    max_windows: int | None = None,
    shard: tuple[int, int] = (0, 1),
    forms: Sequence[str] | None = None,
    quantiser: str | None = None,
) -> ExpertStats:
    """Measure every expert of the GGUF file `path` on the calibration text of `tasks`.

    Writes `output` (a folder) and returns what it holds; arguments and meaning are those of
    `calibrate`. A killed run goes on with the window or the layer it was at. The change of an
    expert in a form is measured against the file's own weights: a form that they are stored in
    already costs nothing, and `forms` defaults to candidates that are smaller. `quantiser` defaults
    to `imatrix`, for which `build` needs the second moments alone and runs no text again.
    Memory: `gguf_calibration_terms`. Disk: `spool_bytes` of all windows, while it runs.

    Raises:
        EdgeMoeError: bad model, text, option or output, or not enough memory or disk.
    """
    require_unfinished(output)
    model = GgufModel(path)
    request = CalibrationRequest(
        tuple(tasks),
        window_tokens,
        max_windows,
        shard,
        checked_forms(model.spec, gguf_forms(model) if forms is None else _storable(forms)),
        quantiser or _default_quantiser(shard),
    )
    request.check(model.spec)
    require_capturable(path, model.spec, model.header.architecture, window_tokens)
    info, texts = gguf_calibration_text(model, request)
    lengths = [len(text) for text in texts]
    terms = gguf_calibration_terms(model, info.num_tokens, max(lengths), info.quantiser)
    subject = f"calibrating on {info.num_tokens} tokens in {len(info.windows)} windows"
    state_and_require_memory(subject, terms)
    with gguf_work(output, info, model.spec, lengths) as work:
        stats = _Run(model, info, work, texts).finish()
        work.publish_moments()
        stats.save(output)
        work.remove()
    return stats


def gguf_calibration_text(
    model: GgufModel, request: CalibrationRequest
) -> tuple[StatsInfo, list[list[int]]]:
    """The settings of a run over the request's shard, and its windows, by the file's tokenizer.

    Raises:
        EdgeMoeError: bad text or option.
    """
    request.check(model.spec)
    with gguf_tokenizer(model.path) as tokenizer:
        windows = task_windows(
            request.tasks, "calibration", tokenizer, request.window_tokens, request.max_windows
        )
    fingerprints = Fingerprints(model.fingerprint, model.tokenizer_fingerprint)
    return request.run_over(windows, model.spec, fingerprints)


def _storable(forms: Sequence[str]) -> Sequence[str]:
    """`forms`, which a GGUF file can hold.

    Raises:
        InputError: names those that it cannot, or that are not known.
    """
    others = [
        form
        for form in forms
        if form != DROP and any(get_form(part).ggml_type is None for part in split_form(form))
    ]
    if others:
        raise InputError(
            f"--forms: a GGUF file cannot hold {', '.join(others)}, and a GGUF model is only built "
            "as GGUF: leave them out, or calibrate the Hugging Face folder that it was made from"
        )
    return forms


def _default_quantiser(shard: tuple[int, int]) -> str:
    """Weighing columns needs the whole text."""
    return "imatrix" if shard[1] == 1 else "nearest"


class _Run:
    """The windows that are not run yet, then the layers that are not measured yet."""

    def __init__(
        self,
        model: GgufModel,
        info: StatsInfo,
        work: GgufWork,
        texts: Sequence[Sequence[int]],
    ) -> None:
        self._model = model
        self._spec = model.spec
        self._info = info
        self._work = work
        self._texts = texts
        self._extras = {
            layer_id: LayerExtras.of(model, layer_id) for layer_id in model.spec.moe_layer_ids
        }
        self._form_losses = FormLosses(
            GgufExperts(model), info.forms, info.quantiser, prefers_squares=True
        )
        self._progress = progress_bar()
        num_layers = self._spec.num_moe_layers
        total = num_layers * len(texts) * len(info.forms)
        self._bar = self._progress.add_task("calibrating", total=total)

    def finish(self) -> ExpertStats:
        """The statistics of all layers."""
        with torch.inference_mode(), self._progress:
            self._run_windows()
            for layer_id in self._info.moe_layer_ids:
                if self._work.is_done(layer_id):
                    self._advance(len(self._texts) * (len(self._info.forms) - 1))
                    continue
                self._progress.update(self._bar, description=f"layer {layer_id}")
                self._work.save_layer(self._layer(layer_id))
        return self._work.collect()

    def _advance(self, units: float) -> None:
        self._progress.advance(self._bar, units)

    # ------------------------------------------------------------------ windows

    def _run_windows(self) -> None:
        spool = self._work.spool
        missing = spool.missing()
        num_layers = self._spec.num_moe_layers
        self._advance(num_layers * (len(self._texts) - len(missing)))
        if not missing:
            return
        lengths = [len(self._texts[index]) for index in missing]
        needed_bytes = spool_bytes(self._spec, sum(lengths))
        require_free_disk(self._work.folder, needed_bytes, "calibration")
        architecture, longest = self._model.header.architecture, max(map(len, self._texts))
        with LlamaCapture(self._model.path, self._spec, architecture, longest) as capture:
            for position, index in enumerate(missing, start=1):
                description = f"window {position} of {len(missing)}"
                self._progress.update(self._bar, description=description)
                with spool.writing(index) as writer:
                    self._run_window(capture, index, writer)

    def _run_window(self, capture: LlamaCapture, index: int, writer: WindowWriter) -> None:
        num_tokens = len(self._texts[index])

        def take(layer_id: int, tokens: slice, block: BlockCapture) -> None:
            records = block_records(block, self._spec, self._extras[layer_id])
            writer.put(layer_id, tokens, records)
            self._advance((tokens.stop - tokens.start) / num_tokens)

        capture.run(self._texts[index], take)

    # ------------------------------------------------------------------ layers

    def _layer(self, layer_id: int) -> ExpertStats:
        """Sum the windows, then measure the experts' forms."""
        seen = [self._observation(index, layer_id) for index in range(len(self._texts))]
        experts = StoredExperts(self._model, layer_id)
        stats = self._work.layer_zeros(layer_id)
        step = len(seen) * (len(self._info.forms) - 1) / self._info.num_experts
        try:
            self._work.save_moments(layer_id, add_moments(experts, seen, self._spec))
            form_losses = self._form_losses.measure(
                layer_id, experts, seen, lambda: self._advance(step), lambda: self._scores(layer_id)
            )
            for observation, losses in zip(seen, form_losses, strict=True):
                losses[:, stats.form_index(DROP)] = observation.drop_loss
                add_window(stats, observation, losses)
        except OverflowError as error:
            raise CheckpointError(
                f"{self._model.path}: layer {layer_id}: {error}; its weights are damaged: "
                "download it again"
            ) from None
        return stats

    def _observation(self, index: int, layer_id: int) -> WindowObservation:
        return summarise(self._work.spool.read(index, layer_id), self._spec)

    def _scores(self, layer_id: int) -> list[Tensor]:
        """The router's scores [T, E] on every window."""
        logits = (self._work.spool.read(i, layer_id).logits for i in range(len(self._texts)))
        function = self._spec.router.score_function
        return [router_scores(each.double(), function).float() for each in logits]


@dataclass(frozen=True)
class LayerExtras:
    """What a layer of some architectures does beside its graph's named nodes."""

    expert_scale: Tensor | None = None
    """[E] factors that llama.cpp multiplies outputs with and that belong to the weights."""
    latent: Tensor | None = None
    """[latent, H] makes experts' inputs of the block's. llama.cpp rounds those where this is
    quantised, which the moments and the change by a form then do not know."""

    @classmethod
    def of(cls, model: GgufModel, layer_id: int) -> LayerExtras:
        prefix, latent, scale = f"blk.{layer_id}", None, None
        if ARCHITECTURES[model.header.architecture].has_expert_scale:
            scale = torch.from_numpy(model.read(f"{prefix}.ffn_down_exps.scale"))
        if model.spec.latent_width:
            latent = torch.from_numpy(model.read(f"{prefix}.ffn_latent_down.weight"))
        return cls(scale, latent)


def block_records(block: BlockCapture, spec: ModelSpec, extras: LayerExtras) -> TokenRecords:
    """What to keep of a MoE block at work."""
    expert_scale = extras.expert_scale
    inputs = torch.from_numpy(block.inputs)
    if extras.latent is not None:
        inputs = F.linear(inputs, extras.latent)
    ids = torch.from_numpy(block.expert_ids).long()
    gates, shares = torch.from_numpy(block.gates), torch.from_numpy(block.shares)
    outputs = torch.from_numpy(block.outputs)
    if expert_scale is not None:
        factors = expert_scale[ids]
        gates, shares = gates * factors[:, : spec.top_k], shares * factors
        outputs = torch.where(factors != 0, 1 / factors, 0.0)[..., None] * outputs
    has_next_best = ids.shape[1] > spec.top_k
    slots = fill_slots((ids[:, : spec.top_k], gates), (ids, shares) if has_next_best else None)
    if expert_scale is not None:
        slots = slots.scaled_by(expert_scale)
    if not has_next_best:
        outputs = torch.cat([outputs, outputs.new_zeros(len(outputs), 1, outputs.shape[2])], dim=1)
    chosen = chosen_experts(inputs, slots, outputs, spec)
    return token_records(
        chosen,
        torch.from_numpy(block.logits),
        torch.from_numpy(block.block_output),
        torch.from_numpy(block.hidden),
    )
