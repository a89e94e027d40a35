"""The MoE architectures that a dense model becomes part of, value for value.

qwen2_moe adds sigmoid(w . x) * shared(x) to its routed experts. A gate w of 1e-30 everywhere makes
the sigmoid exactly one half in float32 (0 would do, but llama.cpp computes silu(z) / z), and the
shared expert's down_proj is stored doubled, which loses no bit. It has no norms of queries and keys
and, in llama.cpp, only attention as wide as the hidden state.

glm4_moe has both, and adds its shared experts as they are; its experts are weighted by sigmoids.

Letters: E experts, H hidden_size, I expert_width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from edge_moe.converters.upcycle.dense_config import DenseConfig
from edge_moe.converters.upcycle.dense_model import PROJECTIONS, DenseModel
from edge_moe.converters.upcycle.stored_tensor import StoredTensor, from_values
from edge_moe.errors import InputError
from edge_moe.families import FAMILIES

_NEUTRAL_GATE = 1e-30
Matrices = tuple[StoredTensor, StoredTensor, StoredTensor]
"""gate_proj [I, H], up_proj [I, H], down_proj [H, I] of one expert, under any name."""


@dataclass(frozen=True)
class MoeShape:
    """What the dense model does not decide."""

    num_experts: int
    top_k: int
    expert_width: int
    shared_width: int

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise InputError(
                f"top_k is {self.top_k} of {self.num_experts} experts: use 1 to {self.num_experts}"
            )


@dataclass(frozen=True)
class MoeLayer:
    """The weights of one MoE block; `shared` as a dense layer that is added has it."""

    router: StoredTensor
    """[E, H]"""
    shared: Matrices
    experts: Sequence[Matrices]


class Target(ABC):
    """An architecture with a shared expert: how its folder spells what it is given."""

    model_type: ClassVar[str]
    shared_module: ClassVar[str]
    shared_down_factor: ClassVar[float]
    """What the shared down_proj is stored times, so that the block adds it as it is."""
    fewest_experts: ClassVar[int] = 1
    most_experts: ClassVar[int] = 1024
    """llama.cpp's LLAMA_MAX_EXPERTS, as llama-cpp-python 0.3.36 has it: it stops at more."""
    is_softmax: ClassVar[bool]
    """Scores are a softmax over all experts; else a sigmoid each."""
    needs_whole_shared: ClassVar[bool] = False
    """The shared width is stated as a multiple of the experts'."""

    @property
    def architecture(self) -> str:
        """Its class in transformers."""
        return FAMILIES[self.model_type].architecture

    @abstractmethod
    def equal_weight(self, num_experts: int) -> float:
        """What each chosen expert is multiplied with where all router logits are 0."""

    @abstractmethod
    def _config(self, dense: DenseModel, shape: MoeShape) -> dict[str, Any]:
        """The architecture's own keys of config.json."""

    def _extra(self, prefix: str, dense: DenseModel, shape: MoeShape) -> list[StoredTensor]:
        """Tensors that are the same whatever was learned."""
        return []

    def check(self, shape: MoeShape) -> None:
        """Refuse a shape that the architecture cannot state.

        Raises:
            InputError: says which, and what to do.
        """
        if shape.num_experts < self.fewest_experts:
            raise InputError(
                f"{self.architecture} needs at least {self.fewest_experts} experts, not "
                f"{shape.num_experts}: raise --experts"
            )
        if shape.num_experts > self.most_experts:
            raise InputError(
                f"--experts is {shape.num_experts}, and llama.cpp loads no model with more than "
                f"{self.most_experts} per layer: lower it so that the folder can become a GGUF file"
            )

    def config(self, dense: DenseModel, shape: MoeShape, *, is_tied: bool) -> dict[str, Any]:
        """config.json of the MoE."""
        config, rope = dense.config, dense.config.rope
        dtype = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dense.dtype]
        older = {key: value for key, value in rope.items() if key != "rope_theta"}
        is_scaled = rope.get("rope_type", "default") != "default"
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **config.carried,
            "attention_dropout": 0.0,
            "tie_word_embeddings": is_tied,
            "rope_parameters": rope,
            "rope_theta": rope["rope_theta"],
            "rope_scaling": older if is_scaled else None,
            "num_experts_per_tok": shape.top_k,
            "moe_intermediate_size": shape.expert_width,
            "norm_topk_prob": False,
            "output_router_logits": False,
            "dtype": dtype,
            "torch_dtype": dtype,
            **self._config(dense, shape),
        }

    def tensors(
        self, layer_id: int, layer: MoeLayer, dense: DenseModel, shape: MoeShape
    ) -> list[StoredTensor]:
        """The tensors of one MoE block under their names in the folder."""
        prefix = f"model.layers.{layer_id}.mlp"
        gate, up, down = layer.shared
        shared = gate, up, down.scaled(self.shared_down_factor)
        found = [layer.router.named(f"{prefix}.gate.weight")]
        found += self._extra(prefix, dense, shape)
        found += _matrices(f"{prefix}.{self.shared_module}", shared)
        for expert_id, matrices in enumerate(layer.experts):
            found += _matrices(f"{prefix}.experts.{expert_id}", matrices)
        return found


class Qwen2MoeTarget(Target):
    """Softmax router over all experts; a shared expert behind a sigmoid."""

    model_type = "qwen2_moe"
    shared_module = "shared_expert"
    shared_down_factor = 2.0
    is_softmax = True

    def equal_weight(self, num_experts: int) -> float:
        return 1.0 / num_experts

    def _config(self, dense: DenseModel, shape: MoeShape) -> dict[str, Any]:
        return {
            "num_experts": shape.num_experts,
            "shared_expert_intermediate_size": shape.shared_width,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "router_aux_loss_coef": 0.001,
            "qkv_bias": dense.has_qkv_bias,
            "use_sliding_window": False,
        }

    def _extra(self, prefix: str, dense: DenseModel, shape: MoeShape) -> list[StoredTensor]:
        gate = np.full((1, dense.config.hidden_size), _NEUTRAL_GATE, np.float32)
        dtype = "F32" if dense.dtype == "F16" else dense.dtype  # float16 has nothing so small
        return [from_values(f"{prefix}.shared_expert_gate.weight", dtype, gate)]


class Glm4MoeTarget(Target):
    """A sigmoid per expert; shared experts that are simply added."""

    model_type = "glm4_moe"
    shared_module = "shared_experts"
    shared_down_factor = 1.0
    is_softmax = False
    needs_whole_shared = True
    fewest_experts = 2  # its router adds up the best two of a group

    def equal_weight(self, num_experts: int) -> float:
        return 0.5

    def check(self, shape: MoeShape) -> None:
        super().check(shape)
        if shape.shared_width % shape.expert_width:
            raise InputError(
                f"{self.architecture} states the shared width, {shape.shared_width}, as a multiple "
                f"of the experts', {shape.expert_width}: choose one that divides it"
            )

    def _config(self, dense: DenseModel, shape: MoeShape) -> dict[str, Any]:
        rope = {**dense.config.rope, "partial_rotary_factor": 1.0}
        return {
            "rope_parameters": rope,
            "partial_rotary_factor": 1.0,
            "head_dim": dense.config.head_width,
            "use_qk_norm": dense.config.has_qk_norm,
            "attention_bias": dense.has_qkv_bias,
            "n_routed_experts": shape.num_experts,
            "n_shared_experts": shape.shared_width // shape.expert_width,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "num_nextn_predict_layers": 0,
        }

    def _extra(self, prefix: str, dense: DenseModel, shape: MoeShape) -> list[StoredTensor]:
        bias = np.zeros(shape.num_experts, np.float32)
        return [from_values(f"{prefix}.gate.e_score_correction_bias", "F32", bias)]


def choose_target(config: DenseConfig) -> Target:
    """The architecture that holds the dense model exactly."""
    if config.has_qk_norm or not config.is_as_wide_as_hidden:
        return Glm4MoeTarget()
    return Qwen2MoeTarget()


def _matrices(prefix: str, matrices: Matrices) -> list[StoredTensor]:
    pairs = zip(PROJECTIONS, matrices, strict=True)
    return [matrix.named(f"{prefix}.{projection}.weight") for projection, matrix in pairs]
