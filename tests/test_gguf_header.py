"""GGUF headers: a file by hand, hostile and truncated files, and arbitrary bytes."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_moe.errors import CheckpointError
from edge_moe.formats.ggml_types import GGML_TYPES, GgmlType
from edge_moe.gguf_header import GgufArray, read_gguf_header, summed_bytes

F32, Q4_0 = 0, 2
U32, FLOAT32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _key(key: str, kind: int, value: bytes) -> bytes:
    return _string(key) + struct.pack("<I", kind) + value


def _tensor(name: str, axes: list[int], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(axes)}Q", len(axes), *axes)
    return _string(name) + sizes + struct.pack("<IQ", kind, offset)


ARCHITECTURE = _key("general.architecture", STRING, _string("qwen3moe"))
KEYS = [
    ARCHITECTURE,
    _key("qwen3moe.expert_count", U32, struct.pack("<I", 4)),
    _key("qwen3moe.rope.freq_base", FLOAT32, struct.pack("<f", 10000.0)),
    _key("tokenizer.ggml.add_bos_token", BOOL, b"\x01"),
    _key("general.big", U64, struct.pack("<Q", 2**40)),
    _key(
        "tokenizer.ggml.tokens",
        ARRAY,
        struct.pack("<IQ", STRING, 20) + b"".join(_string(f"t{i}") for i in range(20)),
    ),
    _key("general.numbers", ARRAY, struct.pack("<IQ100i", 5, 100, *range(100))),
    _key(
        "general.nested",
        ARRAY,
        struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQ2B", 0, 2, 7, 8),
    ),
]
TENSORS = [
    _tensor("output_norm.weight", [64], F32, 0),
    _tensor("blk.0.ffn_up_exps.weight", [64, 32, 4], Q4_0, 256),
]
DATA_BYTES = 256 + 64 * 32 * 4 // 32 * 18


def _file(
    keys: list[bytes] = KEYS,
    tensors: list[bytes] = TENSORS,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_keys: int | None = None,
    num_tensors: int | None = None,
    data_bytes: int = DATA_BYTES,
) -> bytes:
    counts = (
        len(tensors) if num_tensors is None else num_tensors,
        len(keys) if num_keys is None else num_keys,
    )
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys + tensors)
    return header + bytes(-len(header) % 32) + bytes(data_bytes)


def _write(folder: Path, content: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(content)
    return path


def test_reads_a_file_by_hand(tmp_path: Path) -> None:
    content = _file()
    header = read_gguf_header(_write(tmp_path, content))
    assert (header.version, header.architecture) == (3, "qwen3moe")
    assert header.number("expert_count") == 4 and header.number("missing") is None
    assert header.metadata["qwen3moe.rope.freq_base"] == 10000.0
    assert header.metadata["tokenizer.ggml.add_bos_token"] is True
    assert header.metadata["general.big"] == 2**40
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert tokens == GgufArray(20, tuple(f"t{i}" for i in range(8)))
    assert header.metadata["general.numbers"] == GgufArray(100, tuple(range(8)))
    assert header.metadata["general.nested"] == GgufArray(1, (GgufArray(2, (7, 8)),))
    norm, experts = header.tensors
    assert (norm.name, norm.shape, norm.type_name, norm.num_bytes) == (
        "output_norm.weight",
        (64,),
        "F32",
        256,
    )
    assert (experts.shape, experts.type_name) == ((4, 32, 64), "Q4_0")
    assert experts.num_bytes == 4608
    assert experts.offset + experts.num_bytes == header.total_bytes == len(content)
    by_component = summed_bytes(header.tensors, lambda info: info.component)
    assert by_component == {"routed experts": 4608, "norms": 256}
    by_type = summed_bytes(header.tensors, lambda info: info.type_name)
    assert by_type == {"Q4_0": 4608, "F32": 256}


def test_keys_can_be_copied_as_they_are(tmp_path: Path) -> None:
    header = read_gguf_header(_write(tmp_path, _file()))
    assert [header.raw_key(key) for key in header.metadata] == KEYS
    assert header.numbers("expert_count") == (4,)
    assert header.numbers("missing") is None
    assert header.data_start % 32 == 0


def test_long_arrays_of_numbers_are_read_whole_when_asked(tmp_path: Path) -> None:
    def array(count: int) -> bytes:
        return struct.pack(f"<IQ{count}I", U32, count, *range(count))

    keys = [
        ARCHITECTURE,
        _key("qwen3moe.heads", ARRAY, array(100)),
        _key("qwen3moe.long", ARRAY, array(5000)),
        _key("qwen3moe.text", STRING, _string("8")),
    ]
    header = read_gguf_header(_write(tmp_path, _file(keys)))
    assert header.numbers("heads") == tuple(range(100))
    with pytest.raises(CheckpointError, match="holds 5000 numbers"):
        header.numbers("long")
    with pytest.raises(CheckpointError, match="does not hold numbers"):
        header.numbers("text")


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    import numpy as np

    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "olmoe")
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("token_embd.weight", np.ones((3, 8), dtype=np.float32))
    packed = gguf.quants.quantize(np.ones((2, 256), np.float32), gguf.GGMLQuantizationType.TQ1_0)
    writer.add_tensor("x.weight", packed, raw_dtype=gguf.GGMLQuantizationType.TQ1_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf_header(path)
    assert header.architecture == "olmoe"
    assert [(t.name, t.shape, t.type_name, t.num_bytes) for t in header.tensors] == [
        ("token_embd.weight", (3, 8), "F32", 96),
        ("x.weight", (2, 256), "TQ1_0", 108),
    ]
    expected = {tensor.name: int(tensor.data_offset) for tensor in gguf.GGUFReader(path).tensors}
    assert {tensor.name: tensor.offset for tensor in header.tensors} == expected


def test_knows_the_types_that_the_gguf_package_knows() -> None:
    gguf = pytest.importorskip("gguf")
    for kind, (block_size, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        assert GGML_TYPES[int(kind)] == GgmlType(int(kind), kind.name, block_size, block_bytes)


BAD_FILES = {
    "does not start with 'GGUF'": _file(magic=b"GGML"),
    "version 1 is not supported": _file(version=1),
    "version 50331648 is not supported": _file(version=0x03000000),  # big-endian 3
    "1000000000000 metadata keys do not fit": _file(num_keys=10**12),
    "18446744073709551615 tensors do not fit": _file(num_tensors=2**64 - 1),
    "general.architecture is missing": _file([KEYS[1]]),
    "'general.architecture' appears twice": _file([ARCHITECTURE, ARCHITECTURE]),
    "unknown value type 99": _file([ARCHITECTURE, _key("k", 99, b"")]),
    "9223372036854775807 array items do not fit": _file(
        [ARCHITECTURE, _key("k", ARRAY, struct.pack("<IQ", U32, 2**63 - 1))]
    ),
    "unknown value type 9 ": _file(
        [ARCHITECTURE, _key("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 20)]
    ),
    "a string of 9223372036854775808 bytes": _file([struct.pack("<Q", 2**63)]),
    "is not UTF-8": _file([struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<I", 0)]),
    "general.alignment is 24, not a power of two": _file(
        [ARCHITECTURE, _key("general.alignment", U32, struct.pack("<I", 24))]
    ),
    "'x' has 9 axes": _file(tensors=[_tensor("x", [1] * 9, F32, 0)]),
    "'x' has the ggml type 77": _file(tensors=[_tensor("x", [1], 77, 0)]),
    "rows of 33, no multiple of Q4_0's 32": _file(tensors=[_tensor("x", [33], Q4_0, 0)]),
    "'x' appears twice": _file(tensors=[_tensor("x", [8], F32, 0), _tensor("x", [8], F32, 32)]),
    "'y' starts at 32, which is not a multiple of 32 or inside": _file(
        tensors=[_tensor("x", [16], F32, 0), _tensor("y", [8], F32, 32)]
    ),
    "'x' starts at 8": _file(tensors=[_tensor("x", [8], F32, 8)]),
    "truncated: 'x' ends at byte": _file(tensors=[_tensor("x", [2**62, 4], F32, 0)]),
    "truncated: 'blk.0.ffn_up_exps.weight' ends": _file(data_bytes=DATA_BYTES - 1),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_refuses_damaged_files_in_one_line(message: str, tmp_path: Path) -> None:
    path = _write(tmp_path, BAD_FILES[message])
    with pytest.raises(CheckpointError) as caught:
        read_gguf_header(path)
    text = str(caught.value)
    assert message in text and str(path) in text and "\n" not in text


def test_refuses_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_gguf_header(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="directory"):
        read_gguf_header(tmp_path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    content = _file()
    for length in range(0, len(content), 7):
        with pytest.raises(CheckpointError):
            read_gguf_header(_write(tmp_path, content[:length]))


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 760), st.sampled_from([0, 1, 2, 4, 8, 9, 127, 128, 255])),
        min_size=1,
        max_size=4,
    ),
    cut=st.integers(0, 900),
)
def test_mutated_headers_are_read_or_refused(
    edits: list[tuple[int, int]], cut: int, tmp_path: Path
) -> None:
    content = bytearray(_file())
    for position, value in edits:
        content[position] = value
    path = _write(tmp_path, bytes(content[: len(content) - cut * (cut % 5 == 0)]))
    try:
        header = read_gguf_header(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    assert all(t.offset + t.num_bytes <= header.total_bytes for t in header.tensors)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(noise=st.binary(max_size=200))
def test_arbitrary_bytes_are_read_or_refused(noise: bytes, tmp_path: Path) -> None:
    path = _write(tmp_path, b"GGUF\x03\x00\x00\x00" + noise)
    try:
        read_gguf_header(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
