"""One dense tensor of the checkpoint -> its tensors in GGUF."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from edge_moe.converters.gguf_family import GgufSource, Rule, Transform
from edge_moe.converters.gguf_writer import GgufTensor
from edge_moe.converters.slicing import DTYPE_OF_FORM, SlicedTensor
from edge_moe.converters.source_bytes import read_float32
from edge_moe.formats import get_form
from edge_moe.tensor_info import FloatArray


def dense_tensors(
    rule: Rule, sliced: SlicedTensor, source: GgufSource, form: str
) -> Iterator[GgufTensor]:
    """The tensors that `sliced` becomes, in plain `form`; float32 if they are vectors."""
    if rule.transform is None:
        (name,) = rule.names
        yield _as_it_is(name, sliced, _form(sliced.entry.shape, rule, form))
        return
    zeros = np.broadcast_to(np.float32(0), sliced.entry.shape)  # takes no memory
    shapes = [part.shape for part in rule.transform(zeros, source)]
    for index, (name, shape) in enumerate(zip(rule.names, shapes, strict=True)):
        own = _form(shape, rule, form)
        chunks = partial(_transformed, sliced, rule.transform, source, index, own)
        yield GgufTensor(name, shape, own, chunks)


def _form(shape: tuple[int, ...], rule: Rule, form: str) -> str:
    return "f32" if rule.is_float32 or len(shape) < 2 else form


def _as_it_is(name: str, sliced: SlicedTensor, form: str) -> GgufTensor:
    is_same = all(piece.dtype == DTYPE_OF_FORM[form] for piece in sliced.pieces)
    source = replace(sliced, form=None if is_same else form)
    return GgufTensor(name, sliced.entry.shape, form, source.chunks)


def _transformed(
    sliced: SlicedTensor, transform: Transform, source: GgufSource, index: int, form: str
) -> Iterator[bytes]:
    """Bytes of one of the results. Memory: the tensor in float32, its results, and one packed."""
    values: FloatArray = np.concatenate(
        [read_float32(piece).reshape(-1) for piece in sliced.pieces]
    ).reshape(sliced.entry.shape)
    result = np.ascontiguousarray(transform(values, source)[index], dtype=np.float32)
    yield get_form(form).pack(result.reshape(-1, result.shape[-1])).tobytes()
