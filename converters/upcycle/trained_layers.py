"""Trained layers as tensors of the folder: routed experts in 16 bits, which hold them exactly."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from edge_moe.converters.safetensors_writer import TensorEntry
from edge_moe.converters.slicing import FORM_OF_DTYPE
from edge_moe.converters.upcycle.dense_model import PROJECTIONS, DenseModel
from edge_moe.converters.upcycle.moe_modules import array
from edge_moe.converters.upcycle.routed_weights import Quantiser
from edge_moe.converters.upcycle.stored_tensor import StoredTensor, from_values
from edge_moe.converters.upcycle.student import Student, UpcycleSettings, new_router
from edge_moe.converters.upcycle.target import Matrices, MoeLayer, MoeShape
from edge_moe.errors import InputError
from edge_moe.formats import form_bits, get_form
from edge_moe.formats.ternary import TERNARY_FORMS
from edge_moe.tensor_info import FloatArray


def ternary_forms(group: int) -> list[str]:
    """Forms that hold trits with one scale per `group` weights exactly, fewest bits first."""
    fitting = [name for name in TERNARY_FORMS if group % get_form(name).block_size == 0]
    return sorted(fitting, key=form_bits)


def require_rows(hidden: int, width: int, group: int) -> None:
    """Refuse ternary experts whose rows are no whole runs of `group` weights.

    Raises:
        InputError: names the sizes, and the groups that fit.
    """
    if not ternary_forms(group):
        smallest = min(get_form(name).block_size for name in TERNARY_FORMS)
        raise InputError(
            f"--group is {group}, and no ternary form has blocks that divide it: use a multiple of "
            f"{smallest}; 256 packs into tq1_0"
        )
    if hidden % group == 0 and width % group == 0:
        return
    sizes = sorted({get_form(name).block_size for name in TERNARY_FORMS}, reverse=True)
    others = [size for size in sizes if hidden % size == 0 and width % size == 0]
    if others:
        form = ternary_forms(others[0])[0]
        remedy = f"use --group {others[0]}, which packs as {form} ({form_bits(form):g} bits)"
    else:
        remedy = f"no block of {', '.join(map(str, sizes))} divides both: leave --ternary away"
    raise InputError(
        f"rows of {hidden} (hidden_size) and {width} (intermediate_size) weights are no whole runs "
        f"of {group} that share a scale: {remedy}"
    )


def trained_layers(
    student: Student, dense: DenseModel, shape: MoeShape, settings: UpcycleSettings
) -> list[MoeLayer]:
    """Every MoE block, read from `student` when it is written."""
    return [
        _layer(student, dense, shape, settings, layer_id)
        for layer_id in range(dense.config.num_layers)
    ]


def untrained_layers(
    dense: DenseModel, shape: MoeShape, settings: UpcycleSettings
) -> list[MoeLayer]:
    """What `trained_layers` starts from, without a student: one matrix in memory."""
    hidden = dense.config.hidden_size

    def matrix(source: StoredTensor, is_down: bool) -> StoredTensor:
        def read() -> FloatArray:
            values = torch.from_numpy(source.read())
            quantiser = Quantiser(settings.group_of(values.shape[1]), settings.is_ternary)
            scale = quantiser.fitted_scale(values)
            used = quantiser.used(values, torch.zeros_like(scale) if is_down else scale)
            found: FloatArray = used.numpy()
            return found

        return StoredTensor(routed_entry(source, settings), read)

    layers = []
    for layer_id in range(dense.config.num_layers):
        gate, up, down = dense.ffn(layer_id)
        expert = matrix(gate, False), matrix(up, False), matrix(down, True)
        rows = new_router(shape.num_experts, hidden, layer_id, settings.seed)
        router = from_values("", "F32", rows)
        layers.append(MoeLayer(router, (gate, up, down), [expert] * shape.num_experts))
    return layers


def routed_entry(dense: StoredTensor, settings: UpcycleSettings) -> TensorEntry:
    """How an expert's matrix that starts as `dense` is stored: 16 bits wherever those hold it."""
    dtype = "F16" if settings.is_ternary and dense.dtype == "F32" else dense.dtype
    return TensorEntry("", dtype, dense.shape)


def _layer(
    student: Student, dense: DenseModel, shape: MoeShape, settings: UpcycleSettings, layer_id: int
) -> MoeLayer:
    router = from_values("", "F32", student.router(layer_id))
    gate, up, down = dense.ffn(layer_id)
    if settings.trains_shared:
        gate, up, down = (
            StoredTensor(matrix.entry, partial(student.shared, layer_id, projection))
            for projection, matrix in zip(PROJECTIONS, (gate, up, down), strict=True)
        )
    experts = [
        _expert(student, dense, settings, layer_id, expert_id)
        for expert_id in range(shape.num_experts)
    ]
    return MoeLayer(router, (gate, up, down), experts)


def _expert(
    student: Student, dense: DenseModel, settings: UpcycleSettings, layer_id: int, expert_id: int
) -> Matrices:
    def read(projection: str, dtype: str) -> FloatArray:
        matrix = student.experts(layer_id).matrix(projection)
        values = array(matrix.expert(expert_id))
        if settings.is_ternary:
            require_lossless(values, settings.group, dtype)
        return values

    entries = [routed_entry(matrix, settings) for matrix in dense.ffn(layer_id)]
    gate, up, down = (
        StoredTensor(entry, partial(read, projection, entry.dtype))
        for projection, entry in zip(PROJECTIONS, entries, strict=True)
    )
    return gate, up, down


def require_lossless(values: FloatArray, group: int, dtype: str) -> None:
    """Refuse `values` [R, C] that change a bit when stored in `dtype` or packed.

    Raises:
        InputError: a scale that float16 does not hold.
    """
    for name in (FORM_OF_DTYPE[dtype], ternary_forms(group)[0]):
        form = get_form(name)
        if not np.array_equal(form.unpack(form.pack(values), values.shape[1]), values):
            raise InputError(
                f"trained weights of magnitude {np.abs(values).max():g} do not fit {name}: train "
                "with a lower --lr"
            )
