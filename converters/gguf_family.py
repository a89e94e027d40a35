"""How a family's checkpoint becomes llama.cpp's tensors and keys: the words of `gguf_families`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edge_moe.errors import TargetError
from edge_moe.spec import ModelSpec
from edge_moe.tensor_info import FloatArray

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class GgufSource:
    """What transformations and keys are computed from."""

    spec: ModelSpec
    config: Mapping[str, Any]
    """config.json's values of the language model, with the family's defaults."""
    num_kept: int
    """Experts that every MoE layer keeps."""

    def number(self, key: str) -> Any:
        """A positive number of config.json.

        Raises:
            TargetError: anything else.
        """
        return self.number_of(self.config, key)

    @staticmethod
    def number_of(values: Mapping[str, Any], key: str) -> Any:
        """The same for a part of config.json."""
        value = values.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise TargetError(
                f"config.json: {key} is {value!r}, target gguf needs a positive number"
            )
        return value

    @property
    def rope(self) -> Mapping[str, Any]:
        """Values of rotary positions: transformers 5 keeps them together, older files do not."""
        found = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        at_top = ("rope_theta", "partial_rotary_factor")
        return {key: self.config[key] for key in at_top if key in self.config} | dict(found)

    @property
    def rope_type(self) -> str:
        return str(self.rope.get("rope_type") or self.rope.get("type") or "default")

    @property
    def head_width(self) -> int:
        """Width of a query or key head."""
        return self.spec.query_width // self.spec.num_attention_heads

    @property
    def layer_types(self) -> list[str]:
        """One entry per layer; `full_attention` where config.json has none."""
        types = self.config.get("layer_types") or ["full_attention"] * self.spec.num_layers
        return [str(name) for name in types[: self.spec.num_layers]]


Transform = Callable[[FloatArray, GgufSource], tuple[FloatArray, ...]]
"""Values -> one array per name. Shapes must not depend on values: it is also called on zeros."""
AddKeys = Callable[[Any, GgufSource], None]
"""Adds keys to a gguf.GGUFWriter."""
Check = Callable[[GgufSource], str | None]
"""What llama.cpp's graph does not compute, as it continues `llama.cpp's ARCH has no ...`."""


@dataclass(frozen=True)
class Rule:
    """Where one kind of tensor goes."""

    names: tuple[str, ...]
    """llama.cpp's, without `blk.N.`; those without `.weight` or `.bias` get the source's."""
    transform: Transform | None = None
    """None where the values stay as they are."""
    is_float32: bool = False
    """llama.cpp computes with it in float32 only."""


Names = Mapping[str, "str | Rule"]
"""Name in transformers, without `model.layers.N.`, -> llama.cpp's. A name without `.weight` or
`.bias` stands for both, and so does llama.cpp's then; a complete one goes to complete ones."""

MODEL_NAMES: Names = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


@dataclass(frozen=True)
class GgufFamily:
    """One family's table."""

    layer: Names
    model: Names = field(default_factory=lambda: MODEL_NAMES)
    keys: tuple[AddKeys, ...] = ()
    checks: tuple[Check, ...] = ()
    extra: Callable[[GgufSource], dict[str, FloatArray]] | None = None
    """Tensors that the checkpoint has no counterpart of, float32."""
    needs_output: bool = False
    """llama.cpp wants an output matrix even where it is the embeddings again."""

    def rule(self, spec: ModelSpec, tensor_name: str) -> Rule:
        """Where the checkpoint's tensor goes, with complete names.

        Raises:
            TargetError: llama.cpp has no such tensor.
        """
        name = spec.module_name(tensor_name)
        match = _LAYER.fullmatch(name)
        rest, names = (match.group(2), self.layer) if match else (name, self.model)
        stem = next((rest.removesuffix(end) for end in _SUFFIXES if rest.endswith(end)), rest)
        found = names.get(rest) or names.get(stem)
        if found is None:
            raise TargetError(
                f"target gguf has no place for tensor {tensor_name!r}: use --target native"
            )
        rule = Rule((found,)) if isinstance(found, str) else found
        prefix = f"blk.{match.group(1)}." if match else ""
        suffix = "" if rest in names else rest.removeprefix(stem)
        complete = tuple(f"{prefix}{name}{suffix}" for name in rule.names)
        return Rule(complete, rule.transform, rule.is_float32)
