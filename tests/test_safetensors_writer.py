"""The streaming safetensors writer, against bytes written by hand and against the library."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load

from edge_moe.converters.safetensors_writer import (
    TensorEntry,
    file_bytes,
    header,
    safetensors_file,
    shard_names,
    split_into_shards,
    write_index,
)
from edge_moe.errors import CheckpointError
from edge_moe.safetensors_header import read_header

ENTRIES = [TensorEntry("a", "F16", (2, 1)), TensorEntry("b", "U8", (3,))]


def test_bytes_of_a_small_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with safetensors_file(path, ENTRIES, with_sha256=True) as writer:
        writer.write("a", [b"\x01\x02", b"\x03\x04"])
        writer.write("b", [b"xyz"])
    text = (
        b'{"__metadata__":{"format":"pt"},'
        b'"a":{"dtype":"F16","shape":[2,1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"U8","shape":[3],"data_offsets":[4,7]}}'
    )
    text += b" " * (-len(text) % 8)
    expected = len(text).to_bytes(8, "little") + text + b"\x01\x02\x03\x04xyz"
    assert path.read_bytes() == expected
    assert file_bytes(ENTRIES) == len(expected)
    assert writer.sha256 == hashlib.sha256(expected).hexdigest()


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda name: name != "__metadata__"
)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
entry_lists = st.lists(
    st.builds(TensorEntry, names, st.sampled_from(["U8", "F16", "F32", "I64"]), shapes),
    max_size=5,
    unique_by=lambda entry: entry.name,
)


@given(entries=entry_lists, alignment_bytes=st.sampled_from([8, 64, 4096]))
def test_library_reads_any_header(entries: list[TensorEntry], alignment_bytes: int) -> None:
    start = header(entries, alignment_bytes)
    assert len(start) % alignment_bytes == 0
    data = [bytes(range(entry.num_bytes % 256)).ljust(entry.num_bytes, b"\0") for entry in entries]
    loaded = load(start + b"".join(data))
    for entry, raw in zip(entries, data, strict=True):
        assert loaded[entry.name].shape == entry.shape
        assert loaded[entry.name].tobytes() == raw


def test_own_reader_agrees_on_offsets(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    entries = [TensorEntry(f"t{i}", "U8", (4096,)) for i in range(3)]
    with safetensors_file(path, entries, alignment_bytes=4096) as writer:
        for index, entry in enumerate(entries):
            writer.write(entry.name, [bytes([index]) * 4096])
    tensors, _ = read_header(path)
    assert all(info.offset % 4096 == 0 for info in tensors.values())
    with safe_open(path, "np") as opened:
        np.testing.assert_array_equal(opened.get_tensor("t2"), np.full(4096, 2, np.uint8))


@pytest.mark.parametrize(
    ("name", "data"), [("b", b"xyz"), ("a", b"toolong"), ("a", b"x"), ("unknown", b"")]
)
def test_wrong_tensor_leaves_no_file(tmp_path: Path, name: str, data: bytes) -> None:
    with (
        pytest.raises(ValueError, match=name),
        safetensors_file(tmp_path / "x.safetensors", ENTRIES) as writer,
    ):
        writer.write(name, [data])
    assert not list(tmp_path.iterdir())


def test_missing_tensor_leaves_no_file(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="'b' was never written"),
        safetensors_file(tmp_path / "x.safetensors", ENTRIES) as writer,
    ):
        writer.write("a", [b"1234"])
    assert not list(tmp_path.iterdir())


def test_unknown_dtype_is_named() -> None:
    with pytest.raises(CheckpointError, match="'w' has the dtype F8_E5M2"):
        file_bytes([TensorEntry("w", "F8_E5M2", (2,))])


@given(sizes=st.lists(st.integers(0, 20), min_size=1), shard_bytes=st.integers(1, 40))
def test_shards_are_full_but_not_over_full(sizes: list[int], shard_bytes: int) -> None:
    entries = [TensorEntry(str(i), "U8", (size,)) for i, size in enumerate(sizes)]
    shards = split_into_shards(entries, shard_bytes)
    assert [entry for shard in shards for entry in shard] == entries
    for shard in shards:
        assert len(shard) == 1 or sum(entry.num_bytes for entry in shard) <= shard_bytes
    for shard, following in zip(shards, shards[1:], strict=False):
        assert sum(entry.num_bytes for entry in [*shard, following[0]]) > shard_bytes


def test_index_names_the_shard_of_every_tensor(tmp_path: Path) -> None:
    shards = [[ENTRIES[0]], [ENTRIES[1]]]
    write_index(tmp_path, shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": math.prod((2, 1)) * 2 + 3},
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        },
    }


def test_single_shard_has_no_index(tmp_path: Path) -> None:
    write_index(tmp_path, [ENTRIES])
    assert shard_names(1) == ["model.safetensors"]
    assert not list(tmp_path.iterdir())
