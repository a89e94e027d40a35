"""Dense model -> Mixture-of-Experts checkpoint, one decoder layer at a time.

Two copies of the calibration text flow through the layers. The dense one shows which neurons fire
together and what the router should predict. The other one flows through the experts as they are
written, so each layer's down_proj is refitted on the inputs it will really get, to what the dense
FFN makes of them.

Memory: one layer, the embedding, and per calibration token 8 rows of H and 5 rows of F floats:
49 kB for SmolLM2, 0.6 GB for the default text; 1.4 GB was measured for the whole process. Every
finished layer is a shard in a hidden folder beside the output, with the text's hidden states: a
killed run goes on at the layer it stopped in.
"""

from __future__ import annotations

import hashlib
import json
import resource
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor

from edge_moe.converters.safetensors_writer import (
    TensorEntry,
    safetensors_file,
    shard_names,
    write_index,
)
from edge_moe.converters.staging import BuildFolder, build_folder
from edge_moe.converters.upcycle.split_layer import split_layer
from edge_moe.demo import task_names
from edge_moe.errors import InputError
from edge_moe.files import atomic_path, require_free_disk, write_text
from edge_moe.measurement import Provenance
from edge_moe.safetensors_header import read_header
from edge_moe.tasks import task_windows, windows_fingerprint
from smollm2.block import ROUTER_SPREAD, block_tensors, moe_config
from smollm2.layer import DenseLayer, refit_down
from smollm2.source import DenseModel

RECORD_NAME = "conversion.json"
NEURONS_NAME = "neurons.json"
_CODE_VERSION = 1
"""Raise it with every change that alters the output: unfinished runs of older code start anew."""


@dataclass(frozen=True)
class Settings:
    """What is made of every dense FFN, and from how much text."""

    num_experts: int = 16
    expert_width: int = 64
    top_k: int = 8
    refit: bool = True
    num_windows: int = 24
    window_tokens: int = 512
    seed: int = 0
    router_ridge: float = 1e-2
    refit_ridge: float = 2e-2

    def check(self, ffn_width: int) -> None:
        """Raise `InputError` for counts that make no Mixture of Experts."""
        routed = self.num_experts * self.expert_width
        if not 0 < routed < ffn_width:
            raise InputError(
                f"{self.num_experts} experts of {self.expert_width} neurons are {routed} of the "
                f"dense FFN's {ffn_width}: use fewer, some neurons must stay always on"
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise InputError(f"top_k is {self.top_k}: use 1 to {self.num_experts}")


@dataclass
class Streams:
    """Hidden states of the calibration text in front of a layer, [B, W, H] each."""

    dense: Tensor
    moe: Tensor


def convert(dense: DenseModel, output: Path, settings: Settings) -> None:
    """Write the checkpoint, `conversion.json` (how it was made) and `neurons.json` (the split).

    Raises:
        EdgeMoeError: bad settings, an output that exists, or too little disk.
    """
    config = dense.config
    settings.check(config.intermediate_size)
    windows = calibration_windows(dense, settings)
    origin = {
        "code_version": _CODE_VERSION,
        "dense_fingerprint": dense.fingerprint,
        "data_fingerprint": windows_fingerprint(windows),
        "settings": asdict(settings),
    }
    fingerprint = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
    output_bytes = 2 * config.vocab_size * config.hidden_size + config.num_hidden_layers * (
        8 * config.hidden_size * (config.hidden_size + config.intermediate_size)
    )
    stream_bytes = 8 * sum(map(len, windows)) * config.hidden_size
    require_free_disk(output.parent, output_bytes + 2 * stream_bytes, f"output {output.name}")
    with build_folder(output, fingerprint) as work, torch.no_grad():
        layers = _Conversion(dense, settings, torch.tensor(windows), work).run()
        record = {
            "provenance": Provenance.here(seed=settings.seed).model_dump(mode="json"),
            **origin,
            "calibration_tokens": sum(map(len, windows)),
            "router_spread": ROUTER_SPREAD,
            "layers": [facts["measured"] for facts in layers],
        }
        neurons = [facts["neurons"] for facts in layers]
        write_text(work.path / NEURONS_NAME, json.dumps({"layers": neurons}) + "\n")
        write_text(work.path / RECORD_NAME, json.dumps(record, indent=1) + "\n")


def calibration_windows(dense: DenseModel, settings: Settings) -> list[list[int]]:
    """Full windows of all shipped tasks' calibration text, one task after another by turns."""
    windows = task_windows(
        task_names(), "calibration", dense.tokenizer, window_tokens=settings.window_tokens
    )
    full = [window for window in windows if len(window) == settings.window_tokens]
    if len(full) < settings.num_windows:
        raise InputError(
            f"the calibration text has {len(full)} full windows, not {settings.num_windows}"
        )
    return full[: settings.num_windows]


class _Conversion:
    """The pass over the layers that are not done yet."""

    def __init__(
        self, dense: DenseModel, settings: Settings, windows: Tensor, work: BuildFolder
    ) -> None:
        self.dense = dense
        self.settings = settings
        self.windows = windows
        self.work = work
        self.layer = DenseLayer(dense.config, settings.window_tokens)
        self.shards = shard_names(dense.config.num_hidden_layers + 1)
        """First what is outside the layers, then one shard per layer."""

    def run(self) -> list[dict[str, Any]]:
        """Facts of every layer."""
        num_layers = self.dense.config.num_hidden_layers
        self._write_outside()
        is_done = [self.work.finished(name) is not None for name in self.shards[1:]]
        first = is_done.index(False) if False in is_done else num_layers
        with _progress() as bar:
            task = bar.add_task("converting", total=num_layers, completed=first)
            for layer_id in range(first, num_layers):
                bar.update(task, description=f"layer {layer_id + 1} of {num_layers}")
                self._convert_layer(layer_id)
                bar.advance(task)
        write_index(self.work.path, [_entries(self.work.path / name) for name in self.shards])
        facts: Any = [self.work.finished(name) for name in self.shards[1:]]
        return list(facts)

    def _convert_layer(self, layer_id: int) -> None:
        start, cpu_start, settings = time.perf_counter(), time.process_time(), self.settings
        streams = self._load_streams(layer_id)
        weights = self.dense.layer(layer_id)
        ffn = self.layer.load(weights)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + layer_id)

        residual, inputs = self.layer.attend(streams.dense)
        activations = ffn.activations(inputs)
        layer = split_layer(
            ffn,
            inputs,
            activations,
            num_experts=settings.num_experts,
            expert_width=settings.expert_width,
            top_k=settings.top_k,
            ridge=settings.router_ridge,
            spread=ROUTER_SPREAD,
            generator=generator,
        )
        dense_hidden = residual + (activations @ ffn.down.T).view_as(residual)
        del activations

        residual, inputs = self.layer.attend(streams.moe)
        ridge = settings.refit_ridge if settings.refit else None
        refit = refit_down(ffn, layer, inputs, settings.top_k, ridge)
        moe_hidden = residual + refit.outputs.view_as(residual)

        block = block_tensors(replace(ffn, down=refit.down), layer.split, layer.router, generator)
        tensors = {name: value for name, value in weights.items() if not name.startswith("mlp.")}
        tensors |= {f"mlp.{name}": value for name, value in block.items()}
        measured = {
            "router_recall": layer.recall,
            "error_before_refit": refit.error_before,
            "error_after_refit": refit.error_after,
            "stream_error": _relative_error(moe_hidden, dense_hidden),
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu_start,
            "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }
        self._save_streams(layer_id + 1, Streams(dense_hidden, moe_hidden))
        named = {f"model.layers.{layer_id}.{name}": value for name, value in tensors.items()}
        split = layer.split
        neurons = {"shared": split.shared.tolist(), "experts": split.experts.tolist()}
        facts = {"measured": measured, "neurons": neurons}
        self._write_shard(self.shards[layer_id + 1], named, facts)
        self._streams_path(layer_id).unlink(missing_ok=True)

    def _write_outside(self) -> None:
        """The shard of embedding and last norm, config.json and the tokenizer."""
        settings, config = self.settings, self.dense.config
        name = self.shards[0]
        if self.work.finished(name) is not None:
            return
        moe = moe_config(config, settings.num_experts, settings.expert_width, settings.top_k)
        write_text(self.work.path / "config.json", json.dumps(moe, indent=2) + "\n")
        self.dense.tokenizer.save_pretrained(self.work.path)
        tensors = {
            "model.embed_tokens.weight": self.dense.embedding(),
            "model.norm.weight": self.dense.final_norm(),
        }
        self._write_shard(name, tensors, True)

    def _write_shard(self, name: str, tensors: dict[str, Tensor], facts: Any) -> None:
        entries = [TensorEntry(key, "BF16", tuple(tensor.shape)) for key, tensor in tensors.items()]
        with safetensors_file(self.work.path / name, entries) as writer:
            for key, tensor in tensors.items():
                stored = tensor.bfloat16().contiguous().view(torch.int16)
                writer.write(key, [stored.numpy().tobytes()])
        self.work.add(name, facts)

    def _streams_path(self, layer_id: int) -> Path:
        return self.work.path.parent / f"hidden-{layer_id}.safetensors"

    def _load_streams(self, layer_id: int) -> Streams:
        """Hidden states in front of `layer_id`; the first layer's are embedded."""
        if layer_id == 0:
            embedded = self.dense.embedding()[self.windows]
            return Streams(embedded, embedded)
        return Streams(**load_file(self._streams_path(layer_id)))

    def _save_streams(self, layer_id: int, streams: Streams) -> None:
        with atomic_path(self._streams_path(layer_id)) as temporary:
            save_file({"dense": streams.dense, "moe": streams.moe}, temporary)


def _entries(shard: Path) -> list[TensorEntry]:
    return [TensorEntry(t.name, t.dtype, t.shape) for t in read_header(shard)[0].values()]


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)
