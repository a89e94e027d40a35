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
from edge_moe.runtime.llama_api import TESTED_VERSION
from edge_moe.spec import ModelSpec

FloatArray = npt.NDArray[np.float32]

_LOGIT_BYTES = 2**27
"""llama.cpp keeps a row of logits per token of a batch: pieces of a window stay below this."""
_FEWEST_TOKENS = 32
_SMALLEST_SUM = np.float32(6.103515625e-5)
"""llama.cpp divides by no smaller sum of weights."""


# nodes of build_moe_ffn
RANKING = "ffn_moe_argsort"
WEIGHTS, _NORMED, _SCALED = "ffn_moe_weights", "ffn_moe_weights_norm", "ffn_moe_weights_scaled"
_SOFTMAXED = "ffn_moe_weights_softmax"
_FOREIGN = (
    "ffn_moe_logits_biased",
    _SOFTMAXED,
    "ffn_moe_up_clamped",
    "ffn_moe_up_scaled",
    "ffn_moe_gate_scaled",
    "ffn_moe_gate_up_scaled",
    "ffn_moe_down_scaled",
    "ffn_moe_up_biased",
    "ffn_moe_gate_biased",
    "ffn_moe_gate_up_biased",
    "ffn_moe_down_biased",
)
"""A graph with one of these computes more than the statistics know of, but for the architectures
that are known to."""
_BIASED = ("ffn_moe_up_biased", "ffn_moe_gate_biased", "ffn_moe_down_biased")


@dataclass(frozen=True)
class BlockNodes:
    """How the graph of one architecture names what goes into a MoE block and what comes out.

    A tensor that is named twice goes by its last name.
    """

    output: str = "ffn_moe_out"
    """Sum of the routed and the shared experts."""
    inputs: str = "ffn_norm"
    hidden: str = "l_out"
    """The hidden state after the layer."""
    logits: str = "ffn_moe_logits"
    """Of the router, its bias included."""
    experts: str = "ffn_moe_down"
    """What each chosen expert gives, before it is weighed."""
    softmaxes_chosen: bool = False
    """Weights are a softmax over the logits of the chosen experts."""
    has_biases: bool = False
    """Experts add biases."""
    has_expert_scale: bool = False
    """`experts` holds a factor per expert, `ffn_down_exps.scale`, which belongs to its weight."""
    foreign: tuple[str, ...] = ()
    """Nodes of variants of this architecture that are not understood."""


_POST_NORM = "attn_post_norm"
# llama.cpp 0c1e57098, src/models/<architecture>.cpp; all call build_moe_ffn of src/llama-graph.cpp.
# `ffn_out` is something else in `llama`: the residual stream behind the block.
ARCHITECTURES = {
    "qwen3moe": BlockNodes(),
    "olmoe": BlockNodes(),
    "llama": BlockNodes(),
    "minimax-m2": BlockNodes(),
    "granitemoe": BlockNodes(foreign=("ffn_shexp",)),
    "qwen2moe": BlockNodes(output="ffn_out"),
    "deepseek2": BlockNodes(output="ffn_out"),
    "ernie4_5-moe": BlockNodes(output="ffn_out"),
    "qwen3next": BlockNodes(output="ffn_out", inputs=_POST_NORM),
    "qwen35moe": BlockNodes(output="ffn_out", inputs=_POST_NORM),
    "glm4moe": BlockNodes(output="ffn_out", inputs="post_attn_norm"),
    "lfm2moe": BlockNodes(inputs="model.layers.{}.ffn_out"),
    "nemotron_h_moe": BlockNodes(output="l_out", inputs="attn_norm", hidden="nemotron_h_block_out"),
    "gpt-oss": BlockNodes(
        inputs=_POST_NORM,
        logits="ffn_moe_probs",
        experts="ffn_moe_down_biased",
        softmaxes_chosen=True,
        has_biases=True,
    ),
    "gemma4": BlockNodes(inputs="ffn_norm_2", experts="ffn_moe_down_scaled", has_expert_scale=True),
}


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


def real_gates(weights: FloatArray, nodes: BlockNodes, spec: ModelSpec) -> FloatArray:
    """[T, k] scores of the chosen experts -> the weights llama.cpp multiplies with, in float32."""
    gates = weights
    if nodes.softmaxes_chosen:
        powers: FloatArray = np.exp(weights - weights.max(axis=1, keepdims=True))
        total: FloatArray = powers.sum(axis=1, keepdims=True)
        return powers / total
    if spec.router.renormalises:
        sums = weights.sum(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
        gates = gates / np.maximum(sums, _SMALLEST_SUM)
    if spec.router.scale != 1.0:
        gates = gates * np.float32(spec.router.scale)
    return gates


def check_architecture(path: Path, architecture: str) -> None:
    """Refuse what has not been tested.

    Raises:
        SpecError: names the architecture.
    """
    if architecture not in ARCHITECTURES:
        raise SpecError(
            f"{path}: calibration on llama.cpp is tested for {', '.join(ARCHITECTURES)}, not for "
            f"{architecture!r}: calibrate the Hugging Face checkpoint"
        )


class GraphNodes:
    """Which nodes of the graph are wanted, and whether the graph is the expected one."""

    def __init__(self, names: BlockNodes, spec: ModelSpec) -> None:
        self.names = names
        self._spec = spec
        self._slots = num_slots(spec)
        self.final_weights = _final_weights(names, spec)
        kinds = {names.inputs, names.logits, RANKING, WEIGHTS, self.final_weights, names.experts}
        self._kinds = {*kinds, names.output, names.hidden}
        expected = {*self._kinds, *(_BIASED if names.has_biases else ())}
        if spec.router.renormalises and not names.softmaxes_chosen:
            expected.add(_NORMED)
        self._unexpected = {_NORMED, _SCALED, *_FOREIGN, *names.foreign} - expected
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
                f"llama-cpp-python is not known here, install {TESTED_VERSION}"
            )

    def require_all(self, path: Path) -> None:
        """Refuse a graph that lacks a node.

        Raises:
            CheckpointError: names the first one.
        """
        if self._missing:
            raise CheckpointError(
                f"{path}: llama.cpp's graph has no node {min(self._missing)!r}: this version of "
                f"llama-cpp-python is not known here, install {TESTED_VERSION}"
            )

    def shape(self, kind: str, num_tokens: int) -> tuple[int, ...]:
        """numpy's shape of a node."""
        spec = self._spec
        if kind in (self.names.logits, RANKING):
            return num_tokens, spec.num_experts
        if kind in (WEIGHTS, self.final_weights):
            return num_tokens, self._slots
        if kind == self.names.experts:
            return num_tokens, self._slots, spec.expert_hidden
        return num_tokens, spec.hidden_size


def _final_weights(names: BlockNodes, spec: ModelSpec) -> str:
    """The node that outputs are multiplied with."""
    if names.softmaxes_chosen:
        return _SOFTMAXED
    if spec.router.scale != 1.0:
        return _SCALED
    return _NORMED if spec.router.renormalises else WEIGHTS
