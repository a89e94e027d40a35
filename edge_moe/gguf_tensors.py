"""Which tensors of a GGUF model hold one row or one matrix per routed expert.

llama.cpp's names (src/llama-arch.cpp): `blk.N.ffn_{gate,up,gate_up,down}_exps` with `.weight`
[E, ., .], `.bias` [E, .], `.scale` and
`.input_scale` [E]; the router `blk.N.ffn_gate_inp` with `.weight` [E, H]
and `.bias` [E]; its selection bias `blk.N.exp_probs_b` [E], in older files with `.bias`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edge_moe.errors import CheckpointError
from edge_moe.gguf_header import GgufTensorInfo

EXPERT_MATRIX = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps\.weight")
_PER_EXPERT = re.compile(
    r"blk\.(\d+)\.(?:ffn_(?:gate|up|down|gate_up)_exps\.(?:weight|bias|scale|input_scale)"
    r"|ffn_gate_inp\.(?:weight|bias)|exp_probs_b(?:\.bias|\.weight)?)"
)
_SELECTION_BIAS = re.compile(r"blk\.\d+\.exp_probs_b(?:\.bias|\.weight)?")
_NOT_PER_EXPERT = re.compile(
    r"blk\.\d+\.(?:ffn_gate_inp_shexp\..*|ffn_gate_inp\.scale|ffn_norm_exps\..*|.*_shexp\..*)"
)
_LOOKS_PER_EXPERT = re.compile(r"blk\.\d+\..*(?:exp|gate_inp|router)")
_GATED = ({"gate", "up", "down"}, {"gate_up", "down"}), "gate, up and down, or gate_up and down"
_GATELESS = ({"up", "down"},), "up and down"
_ONE_BY_ONE = re.compile(r"blk\.\d+\.ffn_(?:gate|up|down)\.\d+\.weight")


@dataclass(frozen=True)
class LayerTensors:
    """The matrices of one layer's experts."""

    gate: GgufTensorInfo | None
    """[E, I, H]; None where `gate_up` holds it, or where experts have no gate."""
    up: GgufTensorInfo | None
    gate_up: GgufTensorInfo | None
    """[E, 2I, H], gate rows first."""
    down: GgufTensorInfo
    """[E, H, I]."""

    @property
    def stacks(self) -> tuple[GgufTensorInfo, ...]:
        """Every tensor there is, each once."""
        found = (self.gate, self.up, self.gate_up, self.down)
        return tuple(info for info in found if info is not None)

    @property
    def projections(self) -> tuple[GgufTensorInfo, GgufTensorInfo, GgufTensorInfo]:
        """The tensors that hold (gate_proj, up_proj, down_proj).

        Without a gate, what would be its tensor is that of up_proj, of which it has no rows.
        """
        if self.gate_up is not None:
            return self.gate_up, self.gate_up, self.down
        assert self.up is not None
        return self.gate or self.up, self.up, self.down


def layer_of(name: str) -> int | None:
    """The layer of a tensor called `blk.N...`; None for others."""
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def is_per_expert(info: GgufTensorInfo, num_experts: int) -> bool:
    """Whether the slowest axis of a tensor counts routed experts.

    Raises:
        CheckpointError: it looks as if it did, under a name that is not known, or a known name has
            another shape.
    """
    if _PER_EXPERT.fullmatch(info.name):
        if info.shape[:1] != (num_experts,):
            raise CheckpointError(
                f"{info.path}: {info.name!r} has shape {list(info.shape)}, but there are "
                f"{num_experts} experts: download or export the file again"
            )
        return True
    if _ONE_BY_ONE.fullmatch(info.name):
        raise CheckpointError(
            f"{info.path}: {info.name!r} is stored expert by expert, as llama.cpp did before 2024: "
            "convert the model again with a current llama.cpp"
        )
    if _NOT_PER_EXPERT.fullmatch(info.name):
        return False
    if num_experts in info.shape and _LOOKS_PER_EXPERT.match(info.name):
        raise CheckpointError(
            f"{info.path}: {info.name!r} of shape {list(info.shape)} may hold one row per expert, "
            "and edge-moe does not know it: give the Hugging Face folder that it was made from"
        )
    return False


def has_selection_bias(names: Iterable[str]) -> bool:
    """Whether a tensor decides the choice of experts without changing their weights."""
    return any(_SELECTION_BIAS.fullmatch(name) for name in names)


def expert_layers(tensors: Mapping[str, GgufTensorInfo], has_gate: bool) -> dict[int, LayerTensors]:
    """Layer -> its experts' matrices, for every layer that has some, ascending.

    Raises:
        CheckpointError: a layer lacks a matrix, or has one twice.
    """
    found: dict[int, dict[str, GgufTensorInfo]] = {}
    for name, info in tensors.items():
        match = EXPERT_MATRIX.fullmatch(name)
        if match is not None:
            found.setdefault(int(match.group(1)), {})[match.group(2)] = info
    return {layer_id: _layer(layer_id, found[layer_id], has_gate) for layer_id in sorted(found)}


def _layer(layer_id: int, parts: dict[str, GgufTensorInfo], has_gate: bool) -> LayerTensors:
    wanted, words = _GATED if has_gate else _GATELESS
    if set(parts) not in wanted:
        info = next(iter(parts.values()))
        raise CheckpointError(
            f"{info.path}: layer {layer_id} stores its experts as {', '.join(sorted(parts))}; "
            f"llama.cpp's graph of this architecture needs {words}: a part may be missing, "
            "download or export the file again"
        )
    return LayerTensors(parts.get("gate"), parts.get("up"), parts.get("gate_up"), parts["down"])
