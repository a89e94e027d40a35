"""Which source byte ranges make up each output tensor when experts are dropped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from edge_moe.checkpoint import Checkpoint, expert_axis
from edge_moe.converters.safetensors_writer import TensorEntry
from edge_moe.converters.source_bytes import read_all, read_float32, rows
from edge_moe.errors import TargetError
from edge_moe.formats import get_form
from edge_moe.plan import Plan, Target
from edge_moe.spec import ModelSpec
from edge_moe.tensor_info import TensorInfo

_MIN_EXPERTS_PER_GROUP = 2  # a group's score is the sum of its best two
DTYPE_OF_FORM = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
FORM_OF_DTYPE = {dtype: form for form, dtype in DTYPE_OF_FORM.items()}
"""Forms that are plain numbers, and how safetensors spells them."""


@dataclass(frozen=True)
class SlicedTensor:
    """One output tensor, and the source ranges it is made of."""

    entry: TensorEntry
    pieces: tuple[TensorInfo, ...]
    form: str | None = None
    """Plain form to convert the pieces to; None copies their bytes."""

    def chunks(self) -> Iterator[bytes]:
        """The tensor's bytes. Memory: one chunk, or one piece in float32 when converting.

        Raises:
            CheckpointError: NaN, infinity, or a file that ends early.
        """
        if self.form is None:
            yield from read_all(self.pieces)
            return
        form = get_form(self.form)
        for piece in self.pieces:
            yield form.pack(read_float32(piece)).tobytes()


def slice_experts(
    info: TensorInfo, expert_ids: list[int], num_experts: int, form: str | None = None
) -> SlicedTensor:
    """The rows of some of `num_experts` experts, in their own dtype or converted to plain `form`.

    Experts lie along the first axis, or along the second after an axis of one row.
    """
    is_row = expert_axis(info, num_experts) == 1
    column = replace(info, shape=info.shape[::-1]) if is_row else info
    dtype = info.dtype if form is None else DTYPE_OF_FORM[form]
    shape = (1, len(expert_ids)) if is_row else (len(expert_ids), *info.shape[1:])
    return SlicedTensor(TensorEntry(info.name, dtype, shape), rows(column, expert_ids), form)


def dense_tensors(plan: Plan, checkpoint: Checkpoint) -> list[SlicedTensor]:
    """Everything but routed experts, in file order; routers keep the rows of kept experts."""
    kept = {
        name: plan.kept(row)
        for layer_id, row in zip(plan.moe_layer_ids, plan.forms, strict=True)
        for name in checkpoint.spec.router_tensor_names(layer_id)
    }
    return [
        slice_experts(info, kept[info.name], checkpoint.spec.num_experts)
        if info.name in kept
        else whole_tensor(info)
        for info in checkpoint.dense_tensors
    ]


def whole_tensor(
    info: TensorInfo, name: str | None = None, form: str | None = None
) -> SlicedTensor:
    """`info` as it is, possibly under another name or converted to plain `form`."""
    dtype = info.dtype if form is None else DTYPE_OF_FORM[form]
    return SlicedTensor(TensorEntry(name or info.name, dtype, info.shape), (info,), form)


def check_groups(layer_id: int, kept: list[int], spec: ModelSpec, target: Target) -> None:
    """Groups are equal consecutive runs of experts: dropping must keep them so.

    Raises:
        TargetError: names the layer and what its groups keep.
    """
    router = spec.router
    if router.num_groups == 1:
        return
    group_width = spec.num_experts // router.num_groups
    members = [expert_id // group_width for expert_id in kept]
    counts = [members.count(group) for group in range(router.num_groups)]
    if len(set(counts)) != 1 or counts[0] < _MIN_EXPERTS_PER_GROUP:
        raise TargetError(
            f"target {target} needs the same number of experts, at least "
            f"{_MIN_EXPERTS_PER_GROUP}, in each of the router's {router.num_groups} groups; the "
            f"plan keeps {counts} in layer {layer_id}: plan again with --target {target}"
        )
    if counts[0] * router.top_groups < spec.top_k:
        raise TargetError(
            f"target {target}: layer {layer_id} keeps {counts[0]} experts per group, so "
            f"{router.top_groups} groups hold fewer than top_k={spec.top_k}: keep more experts"
        )


def data_bytes(tensors: Iterable[SlicedTensor]) -> int:
    """Output bytes of `tensors`, without headers."""
    return sum(tensor.entry.num_bytes for tensor in tensors)
