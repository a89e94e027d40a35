"""Files written byte by byte: what is written is what two readers find."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_moe.formats.ggml_types import GGML_TYPES
from edge_moe.gguf_header import read_gguf_header
from edge_moe.gguf_raw import (
    RawTensor,
    header_bytes,
    integer_key_like,
    offsets,
    string_key,
)

NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=0x4E00, exclude_categories=["Cs"]))
SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=3)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.dictionaries(NAMES.filter(lambda name: len(name) > 3), NAMES, max_size=5),
    tensors=st.dictionaries(
        NAMES.filter(bool),
        st.tuples(SHAPES, st.sampled_from(list(GGML_TYPES.values()))),
        max_size=8,
    ),
    alignment=st.sampled_from([8, 32, 64, 4096]),
)
def test_what_is_written_is_read(
    texts: dict[str, str],
    tensors: dict[str, tuple[list[int], object]],
    alignment: int,
    tmp_path: Path,
) -> None:
    planned = [
        RawTensor(name, (*shape, kind.block_size), kind.name)  # type: ignore[attr-defined]
        for name, (shape, kind) in tensors.items()
    ]
    keys = [string_key("general.architecture", "olmoe"), _alignment_key(alignment)]
    texts = {name: text for name, text in texts.items() if not name.startswith("general.")}
    keys += [string_key(name, text) for name, text in texts.items()]
    *starts, data_bytes = offsets(planned, alignment)
    header = header_bytes(keys, planned, alignment)
    path = tmp_path / "m.gguf"
    path.write_bytes(header + bytes(data_bytes))
    found = read_gguf_header(path)
    assert found.data_start == len(header) and found.alignment == alignment
    assert {name: found.metadata[name] for name in texts} == texts
    assert [found.raw_key(key) for key in found.metadata] == keys
    assert [(t.name, t.shape, t.type_name, t.num_bytes) for t in found.tensors] == [
        (t.name, t.shape, t.type_name, t.num_bytes) for t in planned
    ]
    assert [t.offset - len(header) for t in found.tensors] == starts


def _alignment_key(value: int) -> bytes:
    name = b"general.alignment"
    return struct.pack("<Q", len(name)) + name + struct.pack("<II", 4, value)


@pytest.mark.parametrize(("kind", "code"), [(4, "<I"), (5, "<i"), (10, "<Q"), (2, "<H")])
def test_a_number_keeps_its_type(kind: int, code: str) -> None:
    head = struct.pack("<Q", 1) + b"k" + struct.pack("<I", kind)
    assert integer_key_like(head + struct.pack(code, 128), 7) == head + struct.pack(code, 7)


def test_the_gguf_package_reads_it(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    values = np.arange(12, dtype="<f4").reshape(3, 4)
    tensors = [RawTensor("a.weight", (3, 4), "F32"), RawTensor("b.weight", (2, 32), "Q8_0")]
    keys = [string_key("general.architecture", "olmoe"), string_key("general.name", "Grüße")]
    content = header_bytes(keys, tensors, 32)
    starts = offsets(tensors, 32)
    data = values.tobytes().ljust(starts[1], b"\0") + bytes(starts[2] - starts[1])
    path = tmp_path / "m.gguf"
    path.write_bytes(content + data)
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.name"].contents() == "Grüße"
    np.testing.assert_array_equal(reader.tensors[0].data, values)
    assert [t.name for t in reader.tensors] == ["a.weight", "b.weight"]
