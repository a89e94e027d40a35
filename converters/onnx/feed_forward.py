"""What a layer does to every token by itself: routed experts and a shared one, or a dense MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.onnx.activations import read_activation
from edge_moe.converters.onnx.branches import branch_experts
from edge_moe.converters.onnx.data_files import ExpertFile, ExpertStack, StoredTensor
from edge_moe.converters.onnx.experts import ExpertLayer, contrib_experts
from edge_moe.converters.onnx.layouts import Layout
from edge_moe.converters.onnx.operations import Operations
from edge_moe.converters.onnx.routing import Routing
from edge_moe.converters.onnx.weights import Weights


class FeedForward:
    """That of every layer."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Any,
        layout: Layout,
        weights: Weights,
        experts: Mapping[int, ExpertFile],
        kept: Mapping[int, Sequence[int]],
        *,
        is_exact: bool,
    ) -> None:
        """`experts` are the files and `kept` the experts of each MoE layer, by its id."""
        self._spec = checkpoint.spec
        self._config = config
        self._layout = layout
        self._weights = weights
        self._experts = experts
        self._kept = kept
        self._is_exact = is_exact
        self._activation = read_activation(self._spec, config, layout.up_offset)

    def add(self, operations: Operations, layer_id: int, prefix: str, inputs: str) -> str:
        """[b, s, H] -> [b, s, H] in the layer whose tensors start with `prefix`."""
        if layer_id in self._kept:
            return self._mixture(operations, layer_id, inputs)
        return self.mlp(operations, f"{prefix}.{self._layout.mlp}", inputs)

    def _mixture(self, operations: Operations, layer_id: int, inputs: str) -> str:
        """Routed experts, and the shared one where there is one."""
        spec, weights = self._spec, self._weights
        prefix, hidden = spec.moe_prefix(layer_id), inputs
        if spec.latent_width:
            hidden = weights.linear(operations, f"{prefix}.fc1_latent_proj", inputs)
        output = self.experts(operations, layer_id, inputs, hidden)
        if spec.latent_width:
            output = weights.linear(operations, f"{prefix}.fc2_latent_proj", output)
        shared = self._shared_expert(operations, prefix, inputs)
        return operations.graph.op("Add", [output, shared]) if shared else output

    def experts(self, operations: Operations, layer_id: int, routed_by: str, hidden: str) -> str:
        """The sum of routed experts of `hidden` [b, s, H], chosen by `routed_by` [b, s, H]."""
        layer = self._expert_layer(operations, layer_id, routed_by, hidden)
        has_node = self._activation.has_kernel and not operations.graph.is_standard
        add = contrib_experts if has_node else branch_experts
        return add(operations, layer, is_exact=self._is_exact)

    def _expert_layer(
        self, operations: Operations, layer_id: int, routed_by: str, hidden: str
    ) -> ExpertLayer:
        spec, graph, weights = self._spec, operations.graph, self._weights
        kept = self._kept[layer_id]
        router, *others = spec.router_tensor_names(layer_id)
        logits = operations.linear(routed_by, weights.rows(router, kept))
        router_bias = router.removesuffix("weight") + "bias"
        if router_bias in others:
            logits = graph.op("Add", [logits, graph.weight(weights.rows(router_bias, kept))])
        selection_bias = others[-1] if spec.router.has_selection_bias else ""
        factors = [name for name in others if name.endswith(".per_expert_scale")]
        biases = [name for name in others if name.endswith("_proj_bias")]
        stacks = tuple(self._experts[layer_id].stacks)
        return ExpertLayer(
            hidden,
            operations.reshape(logits, -1, len(kept)),
            graph.weight(weights.rows(selection_bias, kept)) if selection_bias else "",
            self._routing(kept),
            stacks,
            self._activation,
            tuple(self._biases(stack, biases) for stack in stacks) if biases else (),
            graph.weight(weights.rows(factors[0], kept)) if factors else "",
        )

    def _routing(self, kept: Sequence[int]) -> Routing:
        spec = self._spec
        return Routing(
            *(spec.router, spec.top_k, spec.num_experts, tuple(kept)),
            added_sum=self._layout.added_sum,
            least_sum=getattr(self._config, "moe_norm_min", 0.0),
        )

    def _biases(
        self, stack: ExpertStack, names: Sequence[str]
    ) -> tuple[StoredTensor, StoredTensor]:
        """[E, 2I], gates and ups taking turns, and [E, H] of the experts in a stack."""
        first, second = (
            self._weights.rows(name, stack.expert_ids, label=stack.form) for name in names
        )
        return first, second

    def _shared_expert(self, operations: Operations, prefix: str, inputs: str) -> str:
        """The expert that every token goes through, gated where there is a gate; "" for none."""
        tensors, op = self._weights.tensors, operations.graph.op
        for name in ("shared_expert", "shared_experts"):
            if f"{prefix}.{name}.{self._layout.projections[-1]}.weight" in tensors:
                output = self.mlp(operations, f"{prefix}.{name}", inputs)
                gate = f"{prefix}.{name}_gate"
                if f"{gate}.weight" not in tensors:
                    return output
                share = op("Sigmoid", [self._weights.linear(operations, gate, inputs)])
                return op("Mul", [output, share])
        return ""

    def mlp(self, operations: Operations, prefix: str, inputs: str) -> str:
        """A dense MLP whose tensors start with `prefix`."""
        *inner, down = self._layout.projections
        parts = [self._weights.linear(operations, f"{prefix}.{name}", inputs) for name in inner]
        hidden = self._activation.add(operations, parts[0], parts[-1])
        return self._weights.linear(operations, f"{prefix}.{down}", hidden)
