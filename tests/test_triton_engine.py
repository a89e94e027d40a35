"""Experts computed out of their slots by Triton: in the engine, beside the reference."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyCheckpoint
from packed_layer import choices, layer_output, package_of, relative_error

from edge_moe.cli import run
from edge_moe.errors import InputError, MissingExtraError
from edge_moe.families import FAMILIES
from edge_moe.formats import DROP
from edge_moe.runtime import kernel_choice
from edge_moe.runtime.kernel_choice import choose_kernels
from edge_moe.runtime.session import Session

pytest.importorskip("triton", reason="the kernels need the extra `cuda`")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PROMPT = list(range(5, 17))
FORMS = ("q8_0", "q4_0", "q4_k", "q6_k", "tq2_0", "bf16", "q2_0", "q8_0")

needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles for the GPU here: sessions on a CPU cannot"
)


@needs_interpreter
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_computes_what_the_reference_computes(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """With gates of every kind and without, with biases, in latent width."""
    package = package_of(tiny_checkpoint(family), ("q8_0", "q4_0") * 4, tmp_path / "out")
    with (
        Session.open(package, kernels="exact") as exact,
        Session.open(package, kernels="triton") as packed,
    ):
        assert (exact.kernels, packed.kernels) == ("exact", "triton")
        for num_tokens in (1, 9):
            asked = choices(num_tokens, 8, exact.spec.expert_hidden)
            expected = layer_output(exact, *asked)
            assert relative_error(layer_output(packed, *asked), expected) < 1e-5


@needs_interpreter
@pytest.mark.slow
def test_a_model_of_many_forms_says_what_the_exact_one_says_whatever_pages(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    package = package_of(tiny_checkpoint("qwen3_moe", wide=True), FORMS, tmp_path / "out")
    with Session.open(package, kernels="exact") as exact:
        expected = exact.logits(PROMPT)
        tokens = exact.generate_ids(PROMPT, 5, stop_at_eos=False)
    with Session.open(package, kernels="triton") as whole:
        logits = whole.logits(PROMPT)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
        assert whole.generate_ids(PROMPT, 5, stop_at_eos=False) == tokens
        assert (whole.kernels, whole.warnings) == ("triton", [])
    with Session.open(package, kernels="triton", num_slots=8, prefetch=False) as paged:
        np.testing.assert_array_equal(paged.logits(PROMPT), logits)
        assert paged.generate_ids(PROMPT, 3, stop_at_eos=False) == tokens[:3]
        assert paged.statistics().misses > 0
        paged.check_integrity()


@needs_interpreter
@pytest.mark.slow
def test_forms_without_a_kernel_are_computed_by_the_reference(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    forms = ("q8_0", "int8_row", "q4_k", "bf16", "int4_b32", "q8_0", "tq2_0", DROP)
    package = package_of(tiny_checkpoint("qwen3_moe", wide=True), forms, tmp_path / "out")
    with (
        Session.open(package, kernels="exact") as exact,
        Session.open(package, kernels="triton") as packed,
    ):
        (warning,) = packed.warnings
        assert "Triton has no kernels for int4_b32, int8_row" in warning
        for num_tokens in (1, 7):
            asked = choices(num_tokens, 7, 256)
            expected = layer_output(exact, *asked)
            assert relative_error(layer_output(packed, *asked), expected) < 1e-5
        hidden, rows, weights = choices(6, 7, 256)
        rows[:, 1] = -1  # skipped
        expected = layer_output(exact, hidden, rows[:, :1], weights[:, :1])
        assert relative_error(layer_output(packed, hidden, rows, weights), expected) < 1e-5


@needs_interpreter
def test_run_records_whose_kernels_it_was(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = package_of(tiny_checkpoint("qwen3_moe"), ("q8_0",) * 8, tmp_path / "out")
    options = ["--raw", "--prompt", "hello", "--max-new-tokens", "2", "--kernels", "triton"]
    assert run(["run", str(package), *options, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["kernels"] == "triton"


def test_a_cuda_device_gets_them_and_a_cpu_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_kernels("auto", CUDA, ["q8_0", "bf16"]).label == "triton; exact: bf16"
    assert choose_kernels("triton", CUDA, ["q8_0", "bf16"]).label == "triton"
    chosen = choose_kernels("auto", CUDA, ["q8_0", "int4_b32"])
    assert chosen.label == "triton; exact: int4_b32"
    assert "Triton has no kernels for int4_b32" in chosen.warnings[0]
    assert choose_kernels("triton", CUDA, ["q4_k/q4_k/q6_k", "q4_k/q5_k/q6_k"]).label == (
        "triton; exact: q4_k/q5_k/q6_k"
    )
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="on a CUDA device, not on a CPU: use --kernels auto"):
        choose_kernels("triton", CPU, ["q8_0"])
    with pytest.raises(InputError, match="Triton has no kernels for int8_row"):
        choose_kernels("triton", CUDA, ["int8_row"])


def test_without_the_package_the_reference_serves_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(kernel_choice, "version", no_version)
    chosen = choose_kernels("auto", CUDA, ["q8_0"])
    assert chosen.label == "exact"
    assert "without triton experts are unpacked" in chosen.warnings[0]
    assert "edge-moe[cuda]" in chosen.warnings[0]
    with pytest.raises(MissingExtraError, match="edge-moe\\[cuda\\]"):
        choose_kernels("triton", CUDA, ["q8_0"])


def test_a_triton_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice, "version", lambda name: "3.6.0+git123")
    with pytest.raises(InputError, match="update torch together with triton"):
        choose_kernels("triton", CUDA, ["q8_0"])
    chosen = choose_kernels("auto", CUDA, ["q8_0"])
    assert chosen.label == "exact"
    assert "triton 3.6.0+git123 does not compile the kernels" in chosen.warnings[0]


@pytest.mark.gpu
def test_a_model_of_many_forms_runs_on_a_gpu(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    package = package_of(tiny_checkpoint("qwen3_moe", wide=True), FORMS, tmp_path / "out")
    found = {}
    for kernels in ("exact", "triton"):
        with Session.open(package, kernels=kernels, device="cuda") as session:
            assert session.kernels == kernels
            found[kernels] = [
                layer_output(session, *(each.cuda() for each in choices(count, 8, 256)))
                for count in (1, 40)
            ]
    for exact, packed in zip(found["exact"], found["triton"], strict=True):
        assert relative_error(packed, exact) < 0.02  # bf16
