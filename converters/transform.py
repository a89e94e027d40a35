"""Checkpoint + task text -> a smaller checkpoint of the same architecture, one layer at a time.

A method (`edge_moe.converters.transforms`) gives every MoE layer fewer or narrower experts, the
same number and width in every layer, so that transformers, vLLM, GGUF and this project's own
calibrate, plan and build load the result like any other checkpoint.

Every stage survives kill -9, and the result has the same bytes however often it was killed:

    .NAME.building/stats      calibration of the original: saliency, and super experts to protect
    .NAME.building/gradients  instead, for methods that rank by the loss gradient
    .NAME.building/samples    hidden states that enter the next layer, for methods that run layers
    .NAME.building/output     the checkpoint; the shards of finished layers are the progress
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from edge_moe.converters.calibration_memory import hidden_file_bytes, state_and_require_memory
from edge_moe.converters.calibration_work import CalibrationWork, HiddenWriter, calibration_work
from edge_moe.converters.layer_stream import LayerStream
from edge_moe.converters.progress import progress_bar
from edge_moe.converters.sampling import (
    SAMPLE,
    BlockSampler,
    block_weights,
    install,
    read_weights,
)
from edge_moe.converters.sidecar import CARD_NAME
from edge_moe.converters.staging import BuildFolder, build_folder
from edge_moe.converters.transform_memory import FEWER_TOKENS, transform_terms
from edge_moe.converters.transform_output import TransformOutput
from edge_moe.converters.transform_record import (
    LayerRecord,
    TransformRecord,
    make_record,
    transform_card,
)
from edge_moe.converters.transform_request import Request, TextLimits, check_request
from edge_moe.converters.transform_scores import Scores, given_scores, measure_scores
from edge_moe.converters.transforms import get_method
from edge_moe.converters.transforms.base import (
    LayerResult,
    LayerSamples,
    LayerTask,
    LayerWeights,
    Value,
)
from edge_moe.files import require_new_output, write_text

_NO_LIMITS = TextLimits()


def transform(
    model: Path,
    tasks: Sequence[str],
    output: Path,
    method: str,
    *,
    num_experts: int | None = None,
    expert_width: int | None = None,
    settings: Mapping[str, Value] | None = None,
    limits: TextLimits = _NO_LIMITS,
    stats: Path | None = None,
    name: str | None = None,
) -> TransformRecord:
    """Write checkpoint `model`, made smaller by `method` for `tasks`, to the new folder `output`.

    Give `num_experts` per layer or `expert_width`, whichever the method lowers. `stats` are
    statistics of this model that exist already, whose tasks the record then states; without them it
    is calibrated first. `name` is how the record names the source. A killed run resumes when it is
    started again with the same arguments. Memory: `transform_terms`; for what is measured first,
    `calibration_terms` or `gradient_terms`. Disk: the output and, meanwhile, twice the hidden
    states.

    Raises:
        EdgeMoeError: bad model, method, setting, text or output, not enough memory or disk, or
            `stats` of another model, or of another task for a method that runs layers on text.
    """
    require_new_output(output)
    request = check_request(
        model,
        name or str(model),
        get_method(method),
        settings or {},
        tasks,
        limits,
        num_experts,
        expert_width,
    )
    _require_memory(request)
    given = given_scores(request, stats)
    with build_folder(output, request.fingerprint(given.fingerprint if given else None)) as work:
        files = TransformOutput(request.checkpoint, work, request.num_experts, request.expert_width)
        files.config_text()  # refuses what config.json cannot state before any work is done
        hidden_bytes = hidden_file_bytes(
            request.checkpoint.spec.hidden_size, request.info.num_tokens
        )
        files.require_disk(2 * hidden_bytes)
        scores = given or measure_scores(request, work.scratch)
        run = _Run(request, work, files, scores)
        run.layers()
        return run.finish()


class _Run:
    """One pass over the layers that are not done yet."""

    def __init__(
        self, request: Request, work: BuildFolder, files: TransformOutput, scores: Scores
    ) -> None:
        self._request = request
        self._work = work
        self._files = files
        self._scores = scores
        self._spec = request.checkpoint.spec
        self._progress = progress_bar()
        self._bar = self._progress.add_task("transforming", total=self._units())

    def layers(self) -> None:
        """Write every MoE layer."""
        with torch.inference_mode(), self._progress:
            if self._request.method.needs_samples:
                self._stream_layers()
                return
            for layer_id in self._spec.moe_layer_ids:
                self._describe(layer_id)
                if self._files.layer_facts(layer_id) is None:
                    weights = read_weights(self._request.checkpoint, layer_id)
                    self._write(layer_id, self._transform(layer_id, weights, None))
                self._progress.advance(self._bar)

    def finish(self) -> TransformRecord:
        """Write the rest and the record."""
        sizes = self._files.finish()
        layers = [
            LayerRecord(layer_id=layer_id, **(self._files.layer_facts(layer_id) or {}))
            for layer_id in self._spec.moe_layer_ids
        ]
        record = make_record(self._request, self._scores, layers)
        record.save(self._work.path)
        card = transform_card(
            record, self._request.checkpoint.folder, self._work.output.name, sizes
        )
        write_text(self._work.path / CARD_NAME, card)
        return record

    def _stream_layers(self) -> None:
        """Run the sampled windows through every layer, transforming MoE layers on the way."""
        request, folder = self._request, self._work.scratch / "samples"
        stream = LayerStream(request.checkpoint, SAMPLE)
        lengths = [len(text) for text in request.texts]
        with calibration_work(folder, request.sample_info(), lengths) as samples:
            if samples.next_layer is None:
                with samples.committing(0, self._spec.hidden_size) as writer:
                    for text in request.texts:
                        writer.write(stream.embed(text))
            first_layer = samples.next_layer or 0
            self._progress.advance(self._bar, first_layer * len(lengths))
            for layer_id in range(first_layer, self._spec.num_layers):
                self._describe(layer_id)
                self._stream_layer(layer_id, stream, samples)

    def _stream_layer(self, layer_id: int, stream: LayerStream, samples: CalibrationWork) -> None:
        is_moe = layer_id in self._spec.moe_layer_ids
        is_sequential = is_moe and self._request.method.is_sequential
        with (
            stream.loaded(layer_id),
            samples.committing(layer_id + 1, self._spec.hidden_size) as writer,
        ):
            outputs = _Outputs(stream, samples, layer_id, len(self._request.texts), self._advance)
            if not is_moe:
                outputs.write(writer)
                return
            block = stream.moe_block(layer_id)
            with BlockSampler(block) as sampler:
                outputs.write(None if is_sequential else writer)
            weights = block_weights(block)
            result = self._transform(layer_id, weights, sampler.join())
            self._write(layer_id, result)
            if is_sequential:
                install(block, self._files.as_stored(layer_id, result.weights))
                outputs.write(writer)

    def _transform(
        self, layer_id: int, weights: LayerWeights, samples: LayerSamples | None
    ) -> LayerResult:
        row = self._spec.moe_layer_ids.index(layer_id)
        scores, request = self._scores, self._request
        task = LayerTask(
            layer_id=layer_id,
            spec=self._spec,
            weights=weights,
            num_experts=request.num_experts,
            expert_width=request.expert_width,
            settings=request.settings,
            stats=scores.stats,
            protected=None if scores.protected is None else scores.protected[row],
            samples=samples,
            neuron_scores=None if scores.neurons is None else scores.neurons[row],
        )
        return request.method.run(task)

    def _write(self, layer_id: int, result: LayerResult) -> None:
        facts = {"members": result.members, "facts": result.facts}
        self._files.write_layer(layer_id, result.weights, facts)

    def _units(self) -> int:
        """Progress units: windows run through a layer, or layers where none is run."""
        method, spec = self._request.method, self._spec
        if not method.needs_samples:
            return spec.num_moe_layers
        passes = spec.num_layers + (spec.num_moe_layers if method.is_sequential else 0)
        return passes * len(self._request.sampled)

    def _describe(self, layer_id: int) -> None:
        description = f"layer {layer_id + 1} of {self._spec.num_layers}"
        self._progress.update(self._bar, description=description)

    def _advance(self) -> None:
        self._progress.advance(self._bar)


@dataclass(frozen=True)
class _Outputs:
    """What leaves a loaded layer, window by window."""

    stream: LayerStream
    samples: CalibrationWork
    layer_id: int
    num_windows: int
    advance: Callable[[], None]

    def write(self, writer: HiddenWriter | None) -> None:
        """Run the layer on every window; with a writer, keep what comes out."""
        hidden = self.samples.hidden(self.layer_id)
        for index in range(self.num_windows):
            output = self.stream.run(self.layer_id, hidden.read(index))
            if writer is not None:
                writer.write(output)
            self.advance()


def _require_memory(request: Request) -> None:
    """State the memory needed on stderr, and refuse when it is not there."""
    spec, method = request.checkpoint.spec, request.method
    new_weights = request.num_experts * 3 * spec.hidden_size * request.expert_width
    longest = max(map(len, request.texts), default=0)
    terms = transform_terms(
        request.checkpoint,
        request.sample_tokens,
        longest,
        new_weights,
        method.scratch_bytes(spec, request.sample_tokens),
    )
    subject = f"{method.name}: layers run on {request.sample_tokens} tokens"
    state_and_require_memory(subject, terms, FEWER_TOKENS)
