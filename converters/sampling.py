"""Running a MoE block of the layer stream while keeping what its router did.

The block is transformers' own; an experts implementation registered under `SAMPLE` computes what
the block needs and leaves ids and weights behind. Letters: T tokens of one window, H hidden_size,
E experts, k top_k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.stacked_experts import empty_stacks, put_expert, run_stacked
from edge_moe.converters.transforms.base import LayerSamples, LayerWeights
from edge_moe.runtime.moe_block import MoeBlock

SAMPLE = "edge_moe_sample"
"""Name of the experts implementation."""


@dataclass(frozen=True)
class WindowSample:
    """One window in one MoE block."""

    inputs: Tensor
    """[T, H]"""
    expert_ids: Tensor
    """[T, k]"""
    gates: Tensor
    """[T, k]"""
    logits: Tensor
    """[T, E]"""


class BlockSampler:
    """Attach to one MoE block; `samples` holds one entry per forward pass of one window."""

    def __init__(self, block: MoeBlock) -> None:
        self._block = block
        self._logits: Tensor | None = None
        self.samples: list[WindowSample] = []

    def __enter__(self) -> BlockSampler:
        self._hook = self._block.router.register_forward_hook(self._after_router)
        self._block.experts.sampler = self
        return self

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()
        del self._block.experts.sampler

    def record(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Called by the experts: [T, H], [T, k], [T, k]."""
        if self._logits is None:
            raise RuntimeError("the router did not run before the experts")
        self.samples.append(WindowSample(hidden, ids, weights, self._logits))
        self._logits = None

    def join(self) -> LayerSamples:
        """All windows together; the entries are given up."""
        parts, self.samples = self.samples, []
        return LayerSamples(
            inputs=torch.cat([part.inputs for part in parts]),
            expert_ids=torch.cat([part.expert_ids for part in parts]),
            gates=torch.cat([part.gates for part in parts]).double(),
            logits=torch.cat([part.logits for part in parts]).float(),
            window_tokens=tuple(len(part.inputs) for part in parts),
            block=self._block,
        )

    def _after_router(self, router: nn.Module, arguments: object, output: Any) -> None:
        self._logits = output[0]


def block_weights(block: MoeBlock) -> LayerWeights:
    """The weights of a loaded MoE block; the same memory, not a copy."""
    return LayerWeights(
        block.experts.gate_up_proj.data, block.experts.down_proj.data, block.tensors()
    )


def install(block: MoeBlock, weights: LayerWeights) -> None:
    """Give a loaded MoE block other weights, and as many experts as they hold."""
    experts = block.experts
    experts.gate_up_proj = nn.Parameter(weights.gate_up, requires_grad=False)
    experts.down_proj = nn.Parameter(weights.down, requires_grad=False)
    for name, rows in weights.router.items():
        block.set_tensor(name, rows)
    block.set_num_experts(weights.num_experts)


def read_weights(checkpoint: Checkpoint, layer_id: int) -> LayerWeights:
    """The weights of one layer's experts and router from disk. Memory: themselves and one expert.

    Raises:
        CheckpointError: a tensor is missing, or holds NaN or infinity.
    """
    spec = checkpoint.spec
    stacks = empty_stacks(spec, spec.num_experts)
    for expert_id in range(spec.num_experts):
        put_expert(stacks, expert_id, checkpoint.expert(layer_id, expert_id))
    names = zip(spec.router_module_names(layer_id), spec.router_tensor_names(layer_id), strict=True)
    router = {name: torch.from_numpy(checkpoint.read(stored)) for name, stored in names}
    return LayerWeights(*stacks, router)


def _sampled_experts(experts: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The experts' forward pass, [T, H], [T, k], [T, k] -> [T, H]."""
    sampler = getattr(experts, "sampler", None)
    if sampler is not None:
        sampler.record(hidden, ids, weights)
    return run_stacked(experts, hidden, ids, weights)


ALL_EXPERTS_FUNCTIONS.register(SAMPLE, _sampled_experts)
