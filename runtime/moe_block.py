"""The parts of one MoE layer inside a transformers model, whatever the family calls them.

Letters: T tokens, E experts, H hidden_size, I expert_width, k top_k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_moe.spec import ModelSpec

_COUNT_ATTRIBUTES = ("num_experts", "num_local_experts", "n_routed_experts")
EXPERT_STACKS = ("gate_up_proj", "down_proj")
"""What edge-moe calls an experts module's matrices; without a gate the first holds up_proj."""
MODULE_STACKS = (*EXPERT_STACKS, "up_proj")
"""Parameters of transformers' experts modules that hold them."""


class MoeBlock:
    """Router, experts and everything with one row per expert. Holds modules, no copies."""

    def __init__(self, model: Any, spec: ModelSpec, layer_id: int) -> None:
        """`model` is transformers' causal language model of `spec`'s family."""
        family = spec.family
        self.module: Any = model.get_submodule(spec.moe_module(layer_id))
        self.router: Any = self.module.get_submodule(family.router)
        self.experts: Any = self.module.experts
        self.logits_module: Any = None
        if family.logits_module:
            self.logits_module = self.module.get_submodule(family.logits_module)
        self.output_module: Any = self.module.get_submodule(family.moe_output)
        self._names = spec.router_module_names(layer_id)

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, E] raw logits for [T, H]."""
        found: list[Tensor] = []
        if self.logits_module is None:
            logits: Tensor = self.router(hidden, *self._bias_argument())[0]
            return logits
        hook = self.logits_module.register_forward_hook(lambda *call: found.append(call[2]))
        try:
            self.choose(hidden)
        finally:
            hook.remove()
        return found[0]

    def on_logits(self, receive: Callable[[Tensor], None]) -> Any:
        """`receive` raw logits [T, E] whenever the router runs; remove() the handle in the end."""
        if self.logits_module is not None:
            return self.logits_module.register_forward_hook(lambda *call: receive(call[2]))
        return self.router.register_forward_hook(lambda *call: receive(call[2][0]))

    @property
    def selection_bias(self) -> Tensor:
        """[E] what is added to scores before the choice, where a family does so."""
        return self.tensor(self._names[-1])

    @property
    def weight(self) -> Tensor:
        """[E, H] the router's matrix."""
        return self.tensor(self._names[0])

    @property
    def expert_scale(self) -> Tensor | None:
        """[E] factors on the experts' final weights; None where a family has none."""
        scale: Tensor | None = getattr(self.router, "per_expert_scale", None)
        return scale

    def tensors(self) -> dict[str, Tensor]:
        """Everything with one row per expert but the experts' matrices, by name in the block."""
        return {name: self.tensor(name) for name in self._names}

    def tensor(self, name: str) -> Tensor:
        """One of `tensors()`."""
        module, leaf = self._place(name)
        value: Tensor = getattr(module, leaf)
        return value.detach() if isinstance(value, nn.Parameter) else value

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Put `value` in the place of one of `tensors()`."""
        module, leaf = self._place(name)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value

    def set_num_experts(self, num_experts: int) -> None:
        """Tell block, router and experts how many experts this layer has."""
        for module in (self.module, self.router, self.experts):
            for name in _COUNT_ATTRIBUTES:
                if hasattr(module, name):
                    setattr(module, name, num_experts)

    def choose(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(ids, weights), [T, k] each, of the router's choice for [T, H]."""
        _, weights, ids = self.router(hidden, *self._bias_argument())
        return ids, weights

    def ranked(self, hidden: Tensor, width: int) -> list[int]:
        """Rows for one token [1, H]: the router's choice, then the others of the largest logits.

        At most `width` of them; a bias that decides the choice does not order the others.
        """
        ids, _ = self.choose(hidden)
        logits = self.logits(hidden)[0]
        chosen: list[int] = ids[0].tolist()
        order = logits.topk(min(width, len(logits))).indices.tolist()
        return [*chosen, *(row for row in order if row not in chosen)][:width]

    def _bias_argument(self) -> tuple[Tensor, ...]:
        """The selection bias where it belongs to the block, which hands it to the router."""
        return tuple(self.tensor(name) for name in self._names if "." not in name)

    def choose_more(self, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """(ids, weights) of the router's choice of one expert more, given its `arguments`."""
        holder, name = top_k_holder(self.router)
        top_k = getattr(holder, name)
        setattr(holder, name, top_k + 1)
        try:
            _, weights, ids = self.router(*arguments)
        finally:
            setattr(holder, name, top_k)
        return ids, weights

    def _place(self, name: str) -> tuple[Any, str]:
        path, _, leaf = name.rpartition(".")
        return self.module.get_submodule(path), leaf


def top_k_holder(router: Any) -> tuple[Any, str]:
    """(object, attribute): where a router reads its top_k at every call."""
    if hasattr(router, "top_k"):
        return router, "top_k"
    return router.config, "top_k_experts"


def select_experts(tensor: Tensor, expert_ids: Sequence[int] | Tensor) -> Tensor:
    """The rows of the given experts, in that order; experts may lie behind an axis of one row."""
    chosen = torch.as_tensor(expert_ids, dtype=torch.long, device=tensor.device)
    if tensor.ndim == 2 and tensor.shape[0] == 1:
        return tensor[:, chosen]
    return tensor[chosen]


def expert_inner(experts: Any, inputs: Tensor, gate_up: Tensor, row: int) -> Tensor:
    """[n, H] -> [n, I], what down_proj of the expert in `row` multiplies.

    `experts` is transformers' module, `gate_up` [2I, H] holds gate_proj over up_proj.
    """
    return apply_gate(experts, F.linear(inputs, gate_up), row)


def apply_gate(experts: Any, hidden: Tensor, rows: int | Tensor) -> Tensor:
    """[n, 2I] -> [n, I], from gate_proj's outputs beside up_proj's; [n, I] -> [n, I] without gate.

    `rows` says which expert they are of: one for all, or [n].
    """
    if not experts.is_concatenated:  # such modules want gate and up values taking turns
        width = hidden.shape[1] // 2
        hidden = hidden.view(-1, 2, width).transpose(1, 2).reshape(-1, 2 * width)
    if experts.has_bias:
        hidden = hidden + experts.gate_up_proj_bias[rows].to(hidden.dtype)
    inner: Tensor = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
    return inner


def expert_output(experts: Any, inputs: Tensor, gate_up: Tensor, down: Tensor, row: int) -> Tensor:
    """Un-gated output [n, H] of one expert; gate_up [2I, H], down [H, I]."""
    return add_down_bias(experts, F.linear(expert_inner(experts, inputs, gate_up, row), down), row)


def add_down_bias(experts: Any, output: Tensor, rows: int | Tensor) -> Tensor:
    """[n, H] plus down_proj's bias where the family has one; `rows` as for `apply_gate`."""
    if not experts.has_bias:
        return output
    biased: Tensor = output + experts.down_proj_bias[rows].to(output.dtype)
    return biased
