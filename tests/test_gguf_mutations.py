"""Thousands of damaged GGUF headers: each is read or refused in one line, quickly and in no memory.

Every mutation starts from a small valid file: bytes flipped, counts made huge, fields swapped,
pieces cut out, doubled or moved. Whatever is accepted must describe only bytes that are there.
"""

from __future__ import annotations

import os
import random
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_files import write_moe
from hand_plan import hand_plan
from peak_memory import needs_proc

from edge_moe.converters.slice_gguf import slice_gguf
from edge_moe.errors import EdgeMoeError
from edge_moe.formats import DROP
from edge_moe.gguf_header import read_gguf_header
from edge_moe.gguf_model import GgufModel
from edge_moe.inspect_gguf import inspect_gguf
from edge_moe.offer import stored_forms

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp", reason="needs libggml")

CASES = int(os.environ.get("EDGE_MOE_FUZZ_CASES", "3000"))
SLOWEST_SECONDS = 2.0
MOST_GROWTH_BYTES = 200 * 2**20
HUGE = (2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
Mutation = Callable[[bytearray, random.Random, int], None]


def _flip(content: bytearray, chance: random.Random, header_bytes: int) -> None:
    for _ in range(chance.randint(1, 6)):
        content[chance.randrange(header_bytes)] = chance.choice((0, 1, 9, 127, 128, 255))


def _bit(content: bytearray, chance: random.Random, header_bytes: int) -> None:
    content[chance.randrange(header_bytes)] ^= 1 << chance.randrange(8)


def _huge(content: bytearray, chance: random.Random, header_bytes: int) -> None:
    at = chance.randrange(4, header_bytes - 8)
    content[at : at + 8] = struct.pack("<Q", chance.choice(HUGE))


def _huge_counts(content: bytearray, chance: random.Random, header_bytes: int) -> None:
    at = chance.choice((8, 16))
    content[at : at + 8] = struct.pack("<Q", chance.choice((*HUGE, 0, 1, header_bytes)))


def _number(content: bytearray, chance: random.Random, header_bytes: int) -> None:
    at = chance.randrange(4, header_bytes - 4)
    content[at : at + 4] = struct.pack("<I", chance.randrange(50))


def _cut(content: bytearray, chance: random.Random, header_bytes: int) -> None:
    at = chance.randrange(header_bytes)
    del content[at : at + chance.randint(1, 64)]


def _double(content: bytearray, chance: random.Random, header_bytes: int) -> None:
    at, size = chance.randrange(header_bytes), chance.randint(1, 64)
    content[at:at] = content[at : at + size]


def _move(content: bytearray, chance: random.Random, header_bytes: int) -> None:
    source, target = chance.randrange(header_bytes), chance.randrange(header_bytes)
    size = chance.randint(1, 40)
    content[target : target + size] = content[source : source + size]


def _truncate(content: bytearray, chance: random.Random, header_bytes: int) -> None:
    del content[chance.randrange(header_bytes + 1000) :]


def _value(content: bytearray, chance: random.Random, header_bytes: int) -> None:
    """One of the model's own numbers, u32 behind its name and type."""
    found = [match.end() for match in re.finditer(rb"qwen3moe\.[a-z_.]+", content[:header_bytes])]
    if not found:
        return
    at = chance.choice(found) + 4
    value = chance.choice((0, 1, 2, 3, 4, 5, 8, 31, 2**16, 2**31 - 1, 2**31, 2**32 - 1))
    content[at : at + 4] = struct.pack("<I", value)


MUTATIONS: tuple[Mutation, ...] = (
    *(_flip, _bit, _huge, _huge_counts, _number, _value, _value, _cut, _double, _move, _truncate),
)


def _memory_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak of this process starts anew


def _slice(path: Path, output: Path) -> None:
    """What is accepted can be cut, into a file that says the same."""
    model = GgufModel(path)
    spec = model.spec
    keep = max(spec.top_k, 2 * spec.router.num_groups if spec.router.num_groups > 1 else 1)
    size, each = spec.num_experts // spec.router.num_groups, -(-keep // spec.router.num_groups)
    forms = [
        [form if expert % size < each else DROP for expert in range(spec.num_experts)]
        for form in stored_forms(model)
    ]
    try:
        slice_gguf(hand_plan(model, forms, "gguf"), model, output)
    except EdgeMoeError:
        assert not output.exists() and not list(output.parent.glob(".*.tmp"))
        return
    found = GgufModel(output)
    assert found.spec.num_experts == each * spec.router.num_groups
    assert (found.spec.moe_layer_ids, found.spec.top_k) == (spec.moe_layer_ids, spec.top_k)
    output.unlink()


def _read(path: Path) -> bool:
    """Whether the file was accepted; anything but a clean refusal fails the test."""
    try:
        header = read_gguf_header(path)
        assert all(t.offset + t.num_bytes <= header.total_bytes for t in header.tensors)
        inspect_gguf(path)
        model = GgufModel(path)
    except EdgeMoeError as error:
        assert "\n" not in str(error) and str(path.parent) in str(error)
        return False
    for layer_id in model.spec.moe_layer_ids:
        for info, offset, num_bytes in model.expert_ranges(layer_id, model.spec.num_experts - 1):
            assert info.offset <= offset <= offset + num_bytes <= info.offset + info.num_bytes
    assert model.fingerprint and model.tokenizer_fingerprint and model.total_parameters
    return True


@needs_proc
@pytest.mark.parametrize("split", [0, 9])
def test_mutated_headers_are_read_or_refused(split: int, tmp_path: Path) -> None:
    write_moe(tmp_path / "m.gguf", types=("F32",) * 3, width=32, split_max_tensors=split)
    path = min(tmp_path.glob("m*.gguf"))
    whole = path.read_bytes()
    header_bytes = read_gguf_header(path).data_start
    assert _read(path)
    _forget_peak()
    before = _memory_bytes("VmRSS:")
    accepted, slowest = 0, 0.0
    for seed in range(CASES):
        chance = random.Random(seed)
        content = bytearray(whole)
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            mutate = chance.choice(MUTATIONS)
            if len(content) > 64:
                mutate(content, chance, min(header_bytes, len(content) - 16))
        path.write_bytes(content)
        started = time.monotonic()
        was_read = _read(path)
        accepted += was_read
        slowest = max(slowest, time.monotonic() - started)
        if was_read and seed % 5 == 0:
            _slice(path, tmp_path / "sliced.gguf")
    assert 0 < accepted < CASES // 2  # some damage does not show, most does
    assert slowest < SLOWEST_SECONDS
    assert _memory_bytes("VmHWM:") - before < MOST_GROWTH_BYTES
