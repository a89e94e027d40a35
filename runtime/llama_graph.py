"""The part of llama.cpp's graphs that a calibration reads: names of nodes, and what they hold.

Letters: T tokens, H hidden_size, E experts, k top_k, K slots, see `num_slots`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_moe.errors import CheckpointError, SpecError
from edge_moe.spec import ModelSpec

FloatArray = npt.NDArray[np.float32]

_LOGIT_BYTES = 2**27
"""llama.cpp keeps a row of logits per token of a batch: pieces of a window stay below this."""
_FEWEST_TOKENS = 32
_SMALLEST_SUM = np.float32(6.103515625e-5)
"""llama.cpp divides by no smaller sum of weights."""


@dataclass(frozen=True)
class BlockNodes:
    """How the graph of one architecture names what goes into a MoE block and what comes out."""

    output: str
    """Sum of the routed and the shared experts."""
    inputs: str = "ffn_norm"
    hidden: str = "l_out"
    """The hidden state after the layer."""


# llama.cpp 0c1e57098, src/models/<architecture>.cpp; all call build_moe_ffn of src/llama-graph.cpp
# with SwiGLU. `ffn_out` is something else in `llama`: the residual stream behind the block.
ARCHITECTURES = {
    "qwen3moe": BlockNodes(output="ffn_moe_out"),
    "olmoe": BlockNodes(output="ffn_moe_out"),
    "llama": BlockNodes(output="ffn_moe_out"),
    "qwen2moe": BlockNodes(output="ffn_out"),
    "deepseek2": BlockNodes(output="ffn_out"),
}

# nodes of build_moe_ffn
LOGITS, RANKING = "ffn_moe_logits", "ffn_moe_argsort"
WEIGHTS, _NORMED, _SCALED = "ffn_moe_weights", "ffn_moe_weights_norm", "ffn_moe_weights_scaled"
EXPERTS = "ffn_moe_down"
_FOREIGN = (
    "ffn_moe_logits_biased",
    "ffn_moe_weights_softmax",
    "ffn_moe_up_clamped",
    "ffn_moe_up_scaled",
    "ffn_moe_gate_scaled",
    "ffn_moe_down_scaled",
    "ffn_moe_up_biased",
    "ffn_moe_gate_biased",
    "ffn_moe_down_biased",
)
"""A graph with one of these computes more than the statistics know of."""


def num_slots(spec: ModelSpec) -> int:
    """K: one more than top_k where the router could choose another expert."""
    router = spec.router
    eligible = router.top_groups * (spec.num_experts // router.num_groups)
    return min(spec.top_k + 1, eligible)


def batch_tokens(spec: ModelSpec, window_tokens: int) -> int:
    """Tokens that llama.cpp computes at a time."""
    return min(window_tokens, max(_FEWEST_TOKENS, _LOGIT_BYTES // (4 * spec.vocab_size)))


def metadata_overrides(architecture: str, spec: ModelSpec) -> dict[str, int]:
    """Ask for one expert more; files that leave the expert width out derive it from top_k."""
    values = {f"{architecture}.expert_used_count": num_slots(spec)}
    if architecture not in ("olmoe", "llama"):  # whose expert width is feed_forward_length
        values[f"{architecture}.expert_feed_forward_length"] = spec.expert_width
    return values


def real_gates(weights: FloatArray, spec: ModelSpec) -> FloatArray:
    """[T, k] scores of the chosen experts -> the weights llama.cpp multiplies with, in float32."""
    gates = weights
    if spec.router.renormalises:
        sums = weights.sum(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
        gates = gates / np.maximum(sums, _SMALLEST_SUM)
    if spec.router.scale != 1.0:
        gates = gates * np.float32(spec.router.scale)
    return gates


def check_architecture(path: Path, architecture: str, spec: ModelSpec) -> None:
    """Refuse what has not been tested.

    Raises:
        SpecError: names the architecture or the activation function.
    """
    if architecture not in ARCHITECTURES:
        raise SpecError(
            f"{path}: calibration on llama.cpp is tested for {', '.join(ARCHITECTURES)}, not for "
            f"{architecture!r}: calibrate the Hugging Face checkpoint"
        )
    if spec.hidden_act != "silu":
        raise SpecError(
            f"{path}: calibration on llama.cpp knows experts with SwiGLU (silu), not "
            f"{spec.hidden_act!r}: calibrate the Hugging Face checkpoint"
        )


class GraphNodes:
    """Which nodes of the graph are wanted, and whether the graph is the expected one."""

    def __init__(self, names: BlockNodes, spec: ModelSpec) -> None:
        self.names = names
        self._spec = spec
        self._slots = num_slots(spec)
        router = spec.router
        self.final_weights = _NORMED if router.renormalises else WEIGHTS
        if router.scale != 1.0:
            self.final_weights = _SCALED
        kinds = {names.inputs, LOGITS, RANKING, WEIGHTS, self.final_weights, EXPERTS}
        self._kinds = {*kinds, names.output, names.hidden}
        unexpected = {_NORMED, _SCALED, *_FOREIGN} - self._kinds
        if router.renormalises:
            unexpected.discard(_NORMED)
        self._unexpected = unexpected
        self._wanted = {
            f"{kind}-{layer_id}" for layer_id in spec.moe_layer_ids for kind in self._kinds
        }
        self._missing: set[str] = set()

    def restart(self) -> None:
        """A new graph is about to be computed."""
        self._missing = set(self._wanted)

    def wants(self, name: str) -> bool:
        """Whether the node is needed.

        Raises:
            CheckpointError: the graph computes what the metadata does not say.
        """
        if name.rpartition("-")[0] in self._unexpected:
            raise CheckpointError(
                f"llama.cpp's graph has a node {name!r}, which the model's metadata does not "
                f"explain ({self._spec.router.describe()}): calibrate the Hugging Face checkpoint"
            )
        if name not in self._wanted:
            return False
        self._missing.discard(name)
        return True

    def require_block(self, found: Iterable[str], name: str) -> None:
        """Refuse a layer that ends, with node `name`, before all its nodes were there.

        Raises:
            CheckpointError: names the first one.
        """
        missing = self._kinds.difference(found)
        if missing:
            raise CheckpointError(
                f"llama.cpp's graph has no node {min(missing)!r} before {name!r}: this version of "
                "llama-cpp-python is not known here, install 0.3.36"
            )

    def require_all(self, path: Path) -> None:
        """Refuse a graph that lacks a node.

        Raises:
            CheckpointError: names the first one.
        """
        if self._missing:
            raise CheckpointError(
                f"{path}: llama.cpp's graph has no node {min(self._missing)!r}: this version of "
                "llama-cpp-python is not known here, install 0.3.36"
            )

    def shape(self, kind: str, num_tokens: int) -> tuple[int, ...]:
        """numpy's shape of a node."""
        spec = self._spec
        if kind in (LOGITS, RANKING):
            return num_tokens, spec.num_experts
        if kind in (WEIGHTS, _NORMED, _SCALED):
            return num_tokens, self._slots
        if kind == EXPERTS:
            return num_tokens, self._slots, spec.hidden_size
        return num_tokens, spec.hidden_size
