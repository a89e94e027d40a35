"""Experts computed out of their slots by libggml: beside the reference, and whatever pages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyCheckpoint
from packed_layer import choices, layer_output, package_of, relative_error

from edge_moe.cli import run
from edge_moe.errors import InputError, MissingExtraError, PackageError, TargetError
from edge_moe.families import FAMILIES
from edge_moe.formats import DROP, ggml_library
from edge_moe.runtime.evaluate import evaluate, open_model
from edge_moe.runtime.kernel_choice import Kernels, choose_kernels
from edge_moe.runtime.kernels import ggml_products
from edge_moe.runtime.kernels.ggml_products import Backend
from edge_moe.runtime.session import Session
from edge_moe.runtime.slot_products import can_compute

pytest.importorskip("llama_cpp")

PROMPT = list(range(5, 45))
CPU = torch.device("cpu")
EIGHT_BITS = 0.025
"""Relative error of a layer's experts whose inputs are rounded to 8 bits, twice."""
FORMS = ("q8_0", "q4_0", "q4_k", "q6_k", "tq2_0", "q3_k", "q8_0", "tq1_0")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_computes_what_the_reference_computes(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """With gates of every kind and without, with biases, in latent width."""
    package = package_of(tiny_checkpoint(family), ("q8_0",) * 8, tmp_path / "out")
    with (
        Session.open(package, kernels="exact") as exact,
        Session.open(package, kernels="ggml") as packed,
    ):
        assert (exact.kernels, packed.kernels) == ("exact", "ggml")
        for num_tokens in (1, 2, 33):
            asked = choices(num_tokens, 8, exact.spec.expert_hidden)
            expected = layer_output(exact, *asked)
            found = layer_output(packed, *asked)
            assert 0 < relative_error(found, expected) < EIGHT_BITS


@pytest.mark.parametrize("form", ["bf16", "f16", "f32"])
def test_float_forms_are_exact_unless_ggml_is_asked_for(
    form: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    package = package_of(tiny_checkpoint("qwen3_moe"), (form,) * 8, tmp_path / "out")
    asked = choices(9, 8, 64)
    with Session.open(package, kernels="exact") as session:
        expected = layer_output(session, *asked)
    with Session.open(package) as session:
        assert (session.kernels, session.warnings) == ("exact", [])
        assert torch.equal(layer_output(session, *asked), expected)
    with Session.open(package, kernels="ggml") as session:
        assert session.kernels == "ggml"
        assert relative_error(layer_output(session, *asked), expected) < 0.01


def test_forms_may_differ_and_some_have_no_kernel(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    forms = ("q8_0", "int8_row", "q4_k", "bf16", "int4_b32", "q8_0", "tq2_0", DROP)
    package = package_of(tiny_checkpoint("qwen3_moe", wide=True), forms, tmp_path / "out")
    with (
        Session.open(package, kernels="exact") as exact,
        Session.open(package) as packed,
    ):
        assert packed.kernels == "ggml; exact: bf16, int4_b32, int8_row"
        (warning,) = packed.warnings
        assert "libggml has no kernels for int4_b32, int8_row" in warning
        for num_tokens in (1, 21):
            asked = choices(num_tokens, 7, 256)
            expected = layer_output(exact, *asked)
            assert relative_error(layer_output(packed, *asked), expected) < EIGHT_BITS
        hidden, _, weights = choices(5, 7, 256)
        alone = (hidden, torch.tensor([[1, 3]] * 5), weights)  # none of them is ggml's
        expected = layer_output(exact, *alone)
        torch.testing.assert_close(layer_output(packed, *alone), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefetch", [True, False])
def test_slots_change_no_bit(
    prefetch: bool, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    package = package_of(tiny_checkpoint("qwen3_moe", wide=True), FORMS, tmp_path / "out")
    with Session.open(package) as whole:
        logits = whole.logits(PROMPT)
        tokens = whole.generate_ids(PROMPT, 16, stop_at_eos=False)
        assert whole.kernels == "ggml"
    for num_slots in (7, 8, 11):
        with Session.open(package, num_slots=num_slots, prefetch=prefetch) as paged:
            np.testing.assert_array_equal(paged.logits(PROMPT), logits)
            assert paged.generate_ids(PROMPT, 16, stop_at_eos=False) == tokens
            assert paged.statistics().misses > 0
            paged.check_integrity()


def test_skipped_experts_are_left_out(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    package = package_of(tiny_checkpoint("qwen3_moe"), ("q8_0",) * 8, tmp_path / "out")
    with Session.open(package) as session:
        hidden, rows, weights = choices(6, 8, 64)
        nobody = torch.full_like(rows, -1)
        assert not layer_output(session, hidden, nobody, weights).any()
        assert not layer_output(session, hidden[:1], nobody[:1], weights[:1]).any()
        some = rows.clone()
        some[:, 1] = -1
        expected = layer_output(session, hidden, rows[:, :1], weights[:, :1])
        assert torch.equal(layer_output(session, hidden, some, weights), expected)


def test_one_thread_gives_what_two_give(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    package = package_of(tiny_checkpoint("qwen3_moe", wide=True), FORMS, tmp_path / "out")
    threads, found = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            with Session.open(package) as session:
                found.append(layer_output(session, *choices(40, 8, 256)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])


def test_a_failed_read_lets_go_of_every_slot(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    package = package_of(tiny_checkpoint("qwen3_moe"), ("q8_0",) * 8, tmp_path / "out")
    with Session.open(package, num_slots=3, prefetch=False) as session:
        store, hidden = session._residency.store, torch.randn(1, 64)
        read = store.read_into

        def fail(key: tuple[int, int], buffer: memoryview) -> None:
            if key == (0, 7):
                raise PackageError("expert 7 is damaged")
            read(key, buffer)

        asked = (hidden, torch.tensor([[2, 7]]), torch.ones(1, 2))
        store.read_into = fail  # type: ignore[method-assign]
        with pytest.raises(PackageError, match="expert 7 is damaged"):
            layer_output(session, *asked)
        session.check_integrity()
        assert not any(entry.pins for entry in session._residency.cache._entries.values())
        store.read_into = read  # type: ignore[method-assign]
        assert layer_output(session, *asked).any()


def test_backends_are_freed(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Backend] = []
    make = Backend.__init__

    def note(self: Backend, num_threads: int) -> None:
        make(self, num_threads)
        opened.append(self)

    monkeypatch.setattr(Backend, "__init__", note)
    package = package_of(tiny_checkpoint("qwen3_moe"), ("q8_0",) * 8, tmp_path / "out")
    with Session.open(package) as session:
        session.generate_ids(PROMPT, 4)
        session.use_pattern(None)
        session.generate_ids(PROMPT, 4)
    assert [backend.pointer for backend in opened] == [None, None]


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if llama-cpp-python were not installed."""
    caches = (ggml_library.cpu_library, ggml_products.ggml_cpu, can_compute)
    for function in caches:
        function.cache_clear()
    monkeypatch.setattr(ggml_library, "_path", lambda *names: None)
    yield
    for function in caches:
        function.cache_clear()


@pytest.mark.usefixtures("no_library")
def test_without_the_library_the_reference_serves_and_says_so_once(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = package_of(tiny_checkpoint("qwen3_moe"), ("q8_0",) * 8, tmp_path / "out")
    with Session.open(package, kernels="exact") as exact, Session.open(package) as session:
        asked = choices(4, 8, 64)
        assert torch.equal(layer_output(session, *asked), layer_output(exact, *asked))
        assert session.kernels == "exact"
    with pytest.raises(MissingExtraError, match="edge-moe\\[gguf\\]"):
        Session.open(package, kernels="ggml")
    capsys.readouterr()
    assert run(["run", str(package), "--raw", "--prompt", "hello", "--max-new-tokens", "4"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("without llama-cpp-python experts are unpacked to floats") == 1


def test_choices_that_cannot_be(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="add --device cpu"):
        choose_kernels("ggml", torch.device("cuda"), ["q8_0"])
    with pytest.raises(InputError, match="no kernels for int8_row: use --kernels exact"):
        choose_kernels("ggml", CPU, ["int8_row"])
    with pytest.raises(InputError, match="'fast' are unknown: use auto, exact, ggml, triton"):
        choose_kernels("fast", CPU, ["q8_0"])  # type: ignore[arg-type]
    assert choose_kernels("auto", CPU, ["q4_k/q4_k/q6_k", "bf16"]).label == "ggml; exact: bf16"
    with pytest.raises(TargetError, match="leave out --kernels"):
        open_model(tmp_path / "model.gguf", context_tokens=64, kernels="exact")


@pytest.mark.parametrize(("kernels", "label"), [("exact", "exact"), ("ggml", "ggml")])
def test_run_records_whose_kernels_it_was(
    kernels: Kernels,
    label: str,
    tiny_checkpoint: TinyCheckpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package = package_of(tiny_checkpoint("qwen3_moe"), ("q8_0",) * 8, tmp_path / "out")
    options = ["--raw", "--prompt", "hello", "--max-new-tokens", "4", "--kernels", kernels]
    assert run(["run", str(package), *options, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["kernels"] == label
    assert run(["run", str(package), *options]) == 0
    assert f"kernels of the experts: {label}" in capsys.readouterr().err


def test_eval_records_whose_kernels_it_was_and_compares_with_an_exact_reference(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    package = package_of(tiny_checkpoint("qwen3_moe"), ("q8_0",) * 8, tmp_path / "out")
    differences = {}
    for kernels in ("exact", "ggml"):
        (found,) = evaluate(
            *(package, package, ["code"]), max_windows=2, window_tokens=32, kernels=kernels
        )
        assert found.kernels == kernels
        assert found.comparison is not None
        differences[kernels] = found.comparison.mean_kld.value
    assert abs(differences["exact"]) < 1e-9 < differences["ggml"] < 0.02
