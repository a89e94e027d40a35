"""Random checkpoints of any size, for measuring speed: quality says nothing there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.safetensors_writer import TensorEntry, safetensors_file
from edge_moe.demo import demo_model_dir


@dataclass(frozen=True)
class Sizes:
    """What differs from the demo model."""

    num_layers: int
    hidden_size: int
    expert_width: int
    num_experts: int

    def config(self) -> dict[str, int]:
        """Keys of config.json."""
        return {
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "moe_intermediate_size": self.expert_width,
            "num_experts": self.num_experts,
            "num_local_experts": self.num_experts,
        }


def synthetic_checkpoint(folder: Path, sizes: Sizes) -> Path:
    """A random checkpoint of the demo's architecture and tokenizer, in other sizes."""
    demo = demo_model_dir()
    folder.mkdir()
    for path in demo.glob("*.json"):
        shutil.copyfile(path, folder / path.name)
    config = json.loads((demo / "config.json").read_text()) | sizes.config()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generator = np.random.default_rng(0)
    entries = list(synthetic_entries(Checkpoint(demo), sizes))
    with safetensors_file(folder / "model.safetensors", entries) as writer:
        for entry in entries:
            writer.write(entry.name, [random_bfloat16(entry.shape, generator)])
    return folder


def synthetic_entries(demo: Checkpoint, sizes: Sizes) -> Iterator[TensorEntry]:
    """The demo's tensors, with its sizes replaced."""
    hidden, width = sizes.hidden_size, sizes.expert_width
    num_experts, old_hidden = sizes.num_experts, demo.spec.hidden_size
    for info in demo.dense_tensors:
        if info.name.startswith("model.layers.") and not info.name.startswith("model.layers.0."):
            continue
        shape = tuple(hidden if size == old_hidden else size for size in info.shape)
        if ".self_attn." in info.name:
            shape = attention_shape(info.name, info.shape, hidden)
        if info.name.endswith(".mlp.gate.weight"):
            shape = (num_experts, hidden)
        for layer_id in range(sizes.num_layers):
            name = info.name.replace("layers.0.", f"layers.{layer_id}.")
            if name != info.name or layer_id == 0:
                yield TensorEntry(name, "BF16", shape)
    for layer_id in range(sizes.num_layers):
        for expert_id in range(num_experts):
            gate, up, down = demo.spec.expert_tensor_names(layer_id, expert_id)
            yield TensorEntry(gate, "BF16", (width, hidden))
            yield TensorEntry(up, "BF16", (width, hidden))
            yield TensorEntry(down, "BF16", (hidden, width))


def attention_shape(name: str, shape: tuple[int, ...], hidden: int) -> tuple[int, ...]:
    """Projections see the wider hidden states on one side; head widths stay."""
    if len(shape) == 1:
        return shape
    return (hidden, shape[1]) if name.endswith("o_proj.weight") else (shape[0], hidden)


def random_bfloat16(shape: tuple[int, ...], generator: np.random.Generator) -> bytes:
    """Normal weights of deviation 0.03; vectors (norms) are ones."""
    if len(shape) == 1:
        values = np.ones(shape, np.float32)
    else:
        values = generator.standard_normal(shape, np.float32) * np.float32(0.03)
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
