"""transformers' own model with torch's own autograd: what streamed gradients are compared with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from edge_moe.checkpoint import Checkpoint
from edge_moe.tasks import task_windows


class WholeModel:
    """transformers' own model and torch's own autograd."""

    def __init__(self, folder: Path, task: str, window_tokens: int) -> None:
        self.spec = Checkpoint(folder).spec
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager"
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.windows = task_windows([task], "calibration", tokenizer, window_tokens)

    def gradients(self, window: list[int]) -> tuple[float, dict[int, dict[str, Tensor]]]:
        """(loss, layer id -> what the block saw and the gradient at its output)."""
        found: dict[int, dict[str, Tensor]] = {layer: {} for layer in self.spec.moe_layer_ids}
        hooks = []
        for layer_id, kept in found.items():
            block = self.model.get_submodule(self.spec.moe_module(layer_id))

            def after(_: Any, inputs: Any, output: Tensor, kept: dict[str, Tensor] = kept) -> None:
                output.retain_grad()
                kept["inputs"], kept["output"] = inputs[0].detach()[0], output

            def routed(_: Any, inputs: Any, kept: dict[str, Tensor] = kept) -> None:
                kept["expert_ids"], kept["gates"] = inputs[1], inputs[2].detach()

            hooks.append(block.register_forward_hook(after))
            hooks.append(block.experts.register_forward_pre_hook(routed))
        ids = torch.tensor([window])
        logits = self.model(ids, use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        torch.autograd.backward(loss)
        for hook in hooks:
            hook.remove()
        for kept in found.values():
            gradient = kept["output"].grad
            assert gradient is not None
            kept["gradient"] = gradient.reshape(-1, self.spec.hidden_size)
        return float(loss.detach()), found

    def block(self, layer_id: int) -> Any:
        return self.model.get_submodule(self.spec.moe_module(layer_id))

    def without(self, layer_id: int, expert_id: int) -> Any:
        """The block of layer `layer_id` with one expert and its router row sliced away."""
        block = copy.deepcopy(self.block(layer_id))
        kept = [other for other in range(self.spec.num_experts) if other != expert_id]
        for module, name in [
            (block.gate, "weight"),
            (block.experts, "gate_up_proj"),
            (block.experts, "down_proj"),
        ]:
            setattr(module, name, nn.Parameter(getattr(module, name)[kept]))
        if hasattr(block.gate, "e_score_correction_bias"):
            block.gate.e_score_correction_bias = block.gate.e_score_correction_bias[kept]
        block.gate.num_experts = block.experts.num_experts = len(kept)
        return block
