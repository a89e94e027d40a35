"""Small checkpoints and layers for the tests of transforms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.sampling import SAMPLE, BlockSampler, block_weights
from edge_moe.converters.transforms.base import LayerSamples, LayerTask, Value
from edge_moe.runtime.moe_block import MoeBlock

TEXT = "def f(x):\n    return x + 1\n\nIt was the best of times, it was the worst of times.\n" * 3
TOKENS = torch.arange(3, 67).reshape(2, 32)
MERGING = ("m-smoe", "sub-moe", "ream")


def load(folder: Path) -> nn.Module:
    """The checkpoint in transformers, float32; every tensor found its place."""
    pair: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, experts_implementation="eager"
    )
    model, info = pair
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded: nn.Module = model.eval().requires_grad_(False)
    return loaded


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        result: Tensor = load(folder)(TOKENS).logits
    return result


def block_inputs(folder: Path, layer_id: int, windows: Sequence[Sequence[int]]) -> Tensor:
    """[T, H] what the MoE block of a layer is given, all windows together."""
    model = load(folder)
    seen: list[Tensor] = []
    block = model.get_submodule(Checkpoint(folder).spec.moe_module(layer_id))
    block.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        for window in windows:
            model(torch.tensor([list(window)]), use_cache=False)
    return torch.cat(seen)


def rearranged(folder: Path, order: Sequence[int]) -> Path:
    """Rewrite `folder` in place: expert i becomes a copy of what was expert order[i]."""
    checkpoint = Checkpoint(folder)
    spec = checkpoint.spec
    old = load_file(folder / "model.safetensors")
    new = dict(old)
    for layer_id in spec.moe_layer_ids:
        for name in spec.router_tensor_names(layer_id):
            new[name] = old[name][list(order)]
        for expert_id, source in enumerate(order):
            names = spec.expert_tensor_names(layer_id, expert_id)
            for name, other in zip(names, spec.expert_tensor_names(layer_id, source), strict=True):
                new[name] = old[other].clone()
    save_file(new, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def reorder_hidden_units(folder: Path, expert_ids: Sequence[int], seed: int = 0) -> None:
    """Reorder the hidden units of some experts, which changes nothing that they compute."""
    spec = Checkpoint(folder).spec
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for layer_id in spec.moe_layer_ids:
        for expert_id in expert_ids:
            order = torch.randperm(spec.expert_width, generator=generator)
            gate, up, down = spec.expert_tensor_names(layer_id, expert_id)
            tensors[gate], tensors[up] = tensors[gate][order], tensors[up][order]
            tensors[down] = tensors[down][:, order].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def sampled_block(folder: Path, layer_id: int, windows: int = 3) -> tuple[MoeBlock, LayerSamples]:
    """A MoE block of the checkpoint and what it does with random windows of 24 tokens."""
    block = MoeBlock(load(folder), Checkpoint(folder).spec, layer_id)
    torch.manual_seed(1)
    hidden = Checkpoint(folder).spec.hidden_size
    block.experts.config._experts_implementation = SAMPLE
    with torch.no_grad(), BlockSampler(block) as sampler:
        for _ in range(windows):
            block.module(torch.randn(1, 24, hidden))
        return block, sampler.join()


def layer_task(folder: Path, layer_id: int, num_experts: int, **changes: Any) -> LayerTask:
    """A task on a layer of the checkpoint, with samples."""
    spec = Checkpoint(folder).spec
    block, samples = sampled_block(folder, layer_id)
    settings: dict[str, Value] = {}
    arguments: dict[str, Any] = {
        "layer_id": layer_id,
        "spec": spec,
        "weights": block_weights(block),
        "num_experts": num_experts,
        "expert_width": spec.expert_width,
        "settings": settings,
        "samples": samples,
    }
    return LayerTask(**(arguments | changes))
