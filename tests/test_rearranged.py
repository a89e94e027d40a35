"""Experts rearranged for llama.cpp's faster kernels: products, what is read, and sessions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import TinyCheckpoint
from hand_plan import hand_plan
from packed_layer import choices, layer_output, package_of, relative_error
from test_delta_run import PROMPT, logits
from test_ggml_products import EIGHT_BITS, multiply, relative, stack_of
from tuned_models import noise, tuned_copy

from edge_moe.budget import reading_threads
from edge_moe.checkpoint import Checkpoint
from edge_moe.cli import run
from edge_moe.converters.build import build
from edge_moe.converters.delta_writer import Scaling
from edge_moe.converters.make_delta import make_delta
from edge_moe.errors import BudgetError, InputError, MissingExtraError
from edge_moe.formats import expert_packed_bytes, ggml_library
from edge_moe.runtime.expert_matrices import ExpertMatrix, expert_matrices
from edge_moe.runtime.expert_store import ExpertStore, RecordInfo
from edge_moe.runtime.kernels.ggml_products import Backend, GatedProducts, MatrixStack, ggml_cpu
from edge_moe.runtime.llama_rearrange import RearrangedKernels, rearranged_kernels
from edge_moe.runtime.policy import Key
from edge_moe.runtime.rearranged_store import RearrangedStore, is_rearranged
from edge_moe.runtime.residency import PagingOptions
from edge_moe.runtime.session import Session
from edge_moe.runtime.stalls import StallOptions
from edge_moe.spec import ModelSpec

pytest.importorskip("llama_cpp")

ROUNDING = 1e-3
"""Relative difference of two sums of the same rounded products."""
TYPES = ("Q4_0", "Q4_K", "IQ4_NL", "MXFP4")


def rearranged(stack: MatrixStack) -> MatrixStack:
    """A copy of a stack whose matrices are rearranged; other bytes stay."""
    head = kernels().matrix(stack.kind, stack.rows, stack.width)
    if head is None:
        pytest.skip(f"this CPU has no kernels for rearranged {stack.kind.name}")
    copy, size = stack.buffer.clone(), stack.rows * stack.kind.row_bytes(stack.width)
    for source, target in zip(stack.buffer, copy, strict=True):
        places = source.data_ptr() + stack.offset_bytes, target.data_ptr() + stack.offset_bytes
        kernels().convert(head, *places, size)
    return replace(stack, buffer=copy, is_rearranged=True)


def kernels() -> RearrangedKernels:
    ggml_cpu()
    return rearranged_kernels()


def normal(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).standard_normal(shape, np.float32))


# ---------------------------------------------------------------------------------- products


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("name", TYPES)
def test_a_rearranged_matrix_multiplies_as_it_did(name: str, num_threads: int) -> None:
    """At an odd place of slots that are larger, of which the window shows some."""
    stack, unpacked = stack_of(name, count=6, rows=48, width=512, offset_bytes=35, tail_bytes=7)
    moved = rearranged(stack)
    assert not torch.equal(moved.buffer, stack.buffer)
    inputs = normal(9, 512)
    for chosen in ([4, 1, 1, 2, 4, 1, 4, 2, 3], [0] * 9, [5] * 9):
        found = multiply(moved, inputs, chosen, num_threads)
        assert relative(found, multiply(stack, inputs, chosen)) < ROUNDING
        expected = np.einsum("rw,row->ro", inputs.numpy(), unpacked[chosen])
        assert relative(found, expected) < EIGHT_BITS
    shared = multiply(moved, inputs[:1], [5, 0, 3], num_threads)
    assert relative(shared, multiply(stack, inputs[:1], [5, 0, 3])) < ROUNDING
    one = multiply(rearranged(replace(stack, buffer=stack.buffer[:1])), inputs[:1], [0])
    np.testing.assert_array_equal(one[0], multiply(moved, inputs[:1], [0])[0])


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K"])
def test_company_does_not_change_a_rearranged_result(name: str) -> None:
    moved = rearranged(stack_of(name, count=4, rows=64, width=256)[0])
    inputs, chosen = normal(40, 256), [0] * 12 + [1] * 3 + [3] * 25
    whole = multiply(moved, inputs, chosen)
    np.testing.assert_array_equal(multiply(moved, inputs, chosen, num_threads=1), whole)
    parts = [multiply(moved, inputs[:15], chosen[:15]), multiply(moved, inputs[15:], chosen[15:])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("are_both", [True, False])
def test_gated_products_of_rearranged_and_other_matrices(are_both: bool) -> None:
    """gate_proj over up_proj in one stack, and each by itself; down_proj as it is stored."""
    names = ("Q4_K", "Q4_K") if are_both else ("Q4_0", "Q8_0")
    first = [stack_of("Q4_K", count=4, rows=512, width=256)[0]]
    if not are_both:
        first = [stack_of(name, count=4, rows=256, width=256)[0] for name in names]
    down = stack_of("Q6_K", count=4, rows=48, width=256)[0]
    moved = [rearranged(first[0]), *first[1:]]
    inputs, chosen = normal(1, 256), np.array([3, 0, 2])
    backend, found = Backend(2), []
    for stacks in (first, moved):
        product = GatedProducts(backend, stacks, down, 3, is_shared=True)
        found.append(product(inputs, chosen).numpy().copy())
        product.close()
    backend.close()
    assert 0 < relative(found[1], found[0]) < EIGHT_BITS


def test_one_input_meets_a_rearranged_matrix_once() -> None:
    """libggml writes behind its lists otherwise."""
    moved = rearranged(stack_of("Q4_0", count=3, rows=16, width=32)[0])
    with pytest.raises(ValueError, match="once"):
        multiply(moved, normal(1, 32), [2, 2])
    assert multiply(moved, normal(2, 32), [2, 2]).shape == (2, 16)


@pytest.mark.parametrize(("name", "rows"), [("Q4_0", 24), ("Q6_K", 32), ("BF16", 32)])
def test_what_has_no_kernels_is_refused_before_c_sees_it(name: str, rows: int) -> None:
    stack, _ = stack_of(name, count=2, rows=rows, width=256)
    assert kernels().matrix(stack.kind, rows, 256) is None
    with pytest.raises(ValueError, match=f"no kernels for {rows} rearranged rows of {name}"):
        multiply(replace(stack, is_rearranged=True), normal(2, 256), [0, 1])


# ------------------------------------------------------------------------------ what is read


class MemoryStore(ExpertStore):
    """Random bytes, one expert per form."""

    def __init__(self, spec: ModelSpec, forms: Sequence[str]) -> None:
        sizes = [sum(expert_packed_bytes(form, *spec.expert_shape)) for form in forms]
        generator = np.random.default_rng(0)
        self.packed = [generator.integers(0, 256, size, np.uint8) for size in sizes]
        self._forms = forms
        self.kept = [list(range(len(forms)))]

    def record(self, key: Key) -> RecordInfo:
        return RecordInfo(self._forms[key[1]], len(self.packed[key[1]]))

    def read_into(self, key: Key, buffer: memoryview) -> None:
        buffer[:] = self.packed[key[1]].data

    def read_bytes(self, key: Key) -> int:
        return 7 + key[1]

    def close(self) -> None:
        self.packed.clear()


def test_records_are_rearranged_matrix_by_matrix(tiny_checkpoint: TinyCheckpoint) -> None:
    forms = ("q4_0", "q4_k", "q4_0/q4_k/q8_0", "q8_0", "bf16", "q4_0", "q8_0/q8_0/q4_0")
    spec = Checkpoint(tiny_checkpoint("qwen3_moe", wide=True)).spec
    below = MemoryStore(spec, forms)
    store = RearrangedStore(below, spec, {*forms} - {"bf16"})

    def read(key: Key) -> npt.NDArray[np.uint8]:
        found = np.zeros(store.record(key).num_bytes, np.uint8)
        store.read_into(key, found.data)
        return found

    keys = below.keys()
    with ThreadPoolExecutor(4) as threads:
        records = list(threads.map(read, keys))
    num_moved = 0
    for key, record, stored in zip(keys, records, below.packed, strict=True):
        assert store.record(key) == below.record(key)
        assert store.read_bytes(key) == below.read_bytes(key)
        form = below.record(key).form
        if form == "bf16":
            assert np.array_equal(record, stored)
            continue
        for matrix in expert_matrices(form, spec):
            places = slice(matrix.offset_bytes, matrix.offset_bytes + matrix.num_bytes)
            expected = stored[places].copy()
            if is_rearranged(matrix):
                expected = converted(matrix, expected)
                num_moved += 1
            assert np.array_equal(record[places], expected)
    assert num_moved and store.has_any and store.kept == below.kept
    assert not RearrangedStore(below, spec, {"q8_0"}).has_any
    store.close()
    assert not below.packed


def converted(matrix: ExpertMatrix, stored: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    head, target = kernels().matrix(matrix.kind, matrix.rows, matrix.width), stored.copy()
    assert head is not None
    kernels().convert(head, stored.ctypes.data, target.ctypes.data, len(stored))
    assert not np.array_equal(target, stored)
    return target


def test_gate_and_up_are_one_matrix_where_their_types_agree(
    tiny_checkpoint: TinyCheckpoint,
) -> None:
    spec = Checkpoint(tiny_checkpoint("qwen3_moe", wide=True)).spec
    hidden, width = spec.expert_hidden, spec.expert_width
    shapes = [(one.kind.name, one.rows, one.width) for one in expert_matrices("q4_0", spec)]
    assert shapes == [("Q4_0", 2 * width, hidden), ("Q4_0", hidden, width)]
    mixed = expert_matrices("q4_0/q8_0/q4_0", spec)
    assert [one.rows for one in mixed] == [width, width, hidden]
    for before, after in zip(mixed, mixed[1:], strict=False):
        assert after.offset_bytes == before.offset_bytes + before.num_bytes


# ---------------------------------------------------------------------------------- sessions


@pytest.fixture
def package(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    row = ["q4_k", "q8_0", "q2_k", "bf16", "q4_k", "tq1_0", "q4_0", "q6_k"]
    folder = tiny_checkpoint("qwen3_moe", wide=True)
    return build(hand_plan(Checkpoint(folder), [row, row]), tmp_path / "out")


def test_slots_change_no_bit_of_rearranged_experts(package: Path) -> None:
    plain, found = logits(package), logits(package, rearranged=True)
    for num_slots in (7, 11):
        np.testing.assert_array_equal(logits(package, rearranged=True, num_slots=num_slots), found)
    assert 0 < np.abs(found - plain).max() < 0.1
    assert relative(found, plain) < EIGHT_BITS


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_families_compute_rearranged_what_the_reference_computes(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = package_of(tiny_checkpoint(family, wide=True), ("q4_0",) * 8, tmp_path / "out")
    with (
        Session.open(folder, kernels="exact") as exact,
        Session.open(folder, rearranged=True) as moved,
    ):
        assert moved.kernels == "ggml, rearranged"
        for num_tokens in (1, 2, 33):
            asked = choices(num_tokens, 8, exact.spec.expert_hidden)
            error = relative_error(layer_output(moved, *asked), layer_output(exact, *asked))
            assert 0 < error < EIGHT_BITS * 1.3


def test_a_delta_beside_rearranged_experts(
    package: Path, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    base, path = tiny_checkpoint("qwen3_moe", wide=True), tmp_path / "it.delta"
    tuned = tuned_copy(base, tmp_path / "tuned", noise)
    make_delta(base, tuned, path, density=0.05, scaling=Scaling("least-squares"))
    plain, found = logits(package, delta=path), logits(package, delta=path, rearranged=True)
    np.testing.assert_array_equal(found, logits(package, delta=path, rearranged=True, num_slots=7))
    assert 0 < relative(found, plain) < EIGHT_BITS < relative(found, logits(package))


def test_misses_computed_where_they_lie_are_rearranged(package: Path) -> None:
    options: dict[str, Any] = {"num_slots": 7, "misses": "cpu", "ram_bytes": 10**8}
    found = logits(package, rearranged=True, **options)
    with Session.open(package, context_tokens=64, rearranged=True, **options) as session:
        alone = session.new_loop().logits(PROMPT, session.model.config.vocab_size, chunk_tokens=1)
    np.testing.assert_array_equal(found, logits(package, rearranged=True))
    assert relative(alone, found) < EIGHT_BITS


def test_shadows_stay_as_they_are_stored(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    plan = hand_plan(Checkpoint(tiny_checkpoint("qwen3_moe", wide=True)), [["q4_k"] * 8] * 2)
    package = build(plan, tmp_path / "out", shadow="tq2_0")
    stall = StallOptions("never", is_repeatable=True)
    options: dict[str, Any] = {"num_slots": 8, "stall": stall}
    plain, found = logits(package, **options), logits(package, rearranged=True, **options)
    assert 0 < relative(found, plain) < EIGHT_BITS < relative(found, logits(package))


def test_what_is_held_while_experts_are_read_is_billed(package: Path) -> None:
    with Session.open(package, num_slots=7, rearranged=True) as session:
        terms = {term.name: term.num_bytes for term in session.memory()}
        q4_k = expert_packed_bytes("q4_k", *session.spec.expert_shape)
        assert terms["rearranging"] == reading_threads(session.spec) * sum(q4_k)
    with pytest.raises(BudgetError, match="rearranging") as caught:
        Session.open(package, rearranged=True, budget_bytes=10_000_000, context_tokens=64)
    minimum = caught.value.minimum_bytes
    options: dict[str, Any] = {"budget_bytes": minimum, "context_tokens": 64}
    with Session.open(package, rearranged=True, **options) as session:
        assert session.is_paging and session.generate_ids(PROMPT, 4)


def test_what_cannot_be_rearranged_is_refused(
    tiny_checkpoint: TinyCheckpoint,
    package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = tiny_checkpoint("qwen3_moe")
    with pytest.raises(InputError, match="leave out --rearranged, or build a package in q4_0"):
        Session.open(checkpoint, rearranged=True)
    bytes_alone = package_of(checkpoint, ("q8_0",) * 8, tmp_path / "q8_0")
    with pytest.raises(InputError, match="no faster kernels for its experts on this CPU: leave"):
        Session.open(bytes_alone, rearranged=True)
    for kernels in ("exact", "triton"):
        with pytest.raises(InputError, match=f"leave out --kernels {kernels}"):
            Session.open(package, rearranged=True, kernels=kernels)
    with pytest.raises(InputError, match="add --device cpu"):
        PagingOptions(torch.device("cuda"), None, None, None, rearranged=True)
    monkeypatch.setattr(ggml_library, "_path", lambda *_: None)
    for cached in (ggml_library._library, ggml_library.cpu_library, ggml_cpu):
        cached.cache_clear()
    with pytest.raises(MissingExtraError, match="llama-cpp-python"):
        Session.open(package, rearranged=True)


def test_the_command_says_that_experts_are_rearranged(
    package: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(package), "--raw", "--prompt", "hello", "--max-new-tokens", "4"]
    assert run([*command, "--rearranged"]) == 0
    said = capfd.readouterr().err
    assert "kernels of the experts: ggml, rearranged; exact: bf16" in said
    assert "repack" not in said
    assert run([*command, "--rearranged", "--slots", "7", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["kernels"] == "ggml, rearranged; exact: bf16"
