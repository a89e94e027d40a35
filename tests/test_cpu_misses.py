"""Missed experts computed from RAM: the same results as when they are fetched into slots."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import FAMILY_NAMES, TinyCheckpoint
from hand_plan import hand_plan

from edge_moe.checkpoint import Checkpoint
from edge_moe.cli import run
from edge_moe.converters.build import build
from edge_moe.errors import InputError
from edge_moe.measurement import RunMeasurement
from edge_moe.runtime.fetch_choice import MissChooser, Misses, Prices
from edge_moe.runtime.interleaved_trial import BLOCK_TOKENS, BLOCKS, InterleavedTrial
from edge_moe.runtime.kernel_choice import Kernels
from edge_moe.runtime.miss_prices import PriceProbe
from edge_moe.runtime.session import Session

PROMPT = list(range(5, 25))
NEW_TOKENS = 8
RAM = 10**9
FAMILIES = (*FAMILY_NAMES, "gpt_oss", "nemotron_h")


def decoded_logits(session: Session) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """[NEW_TOKENS, V], one token after another."""
    loop = session.new_loop()
    loop.prefill(PROMPT)
    return np.concatenate([loop.step([token]) for token in PROMPT[:NEW_TOKENS]])


def open_with(model: Path, misses: Misses, kernels: Kernels = "exact") -> Session:
    return Session.open(
        model, num_slots=4, ram_bytes=RAM, prefetch=False, kernels=kernels, misses=misses
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(family)
    with open_with(folder, "fetch") as session:
        wanted = decoded_logits(session)
        fetched = session.statistics()
    assert fetched.cpu_experts == 0 and fetched.misses > 0
    with open_with(folder, "cpu") as session:
        found = decoded_logits(session)
        statistics = session.statistics()
        session.check_integrity()
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert statistics.cpu_experts > 0 and statistics.cpu_bytes > 0
    assert statistics.page_in_bytes < fetched.page_in_bytes
    asked = statistics.hits + statistics.misses
    assert asked == fetched.hits + fetched.misses


@pytest.mark.parametrize("forms", [("q4_k", "q8_0"), ("tq2_0", "q6_k")])
def test_packed_experts_are_computed_where_they_lie(
    forms: tuple[str, str], tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    source = Checkpoint(tiny_checkpoint("qwen3_moe", wide=True))
    rows = [forms[row % 2] for row in range(source.spec.num_experts)]
    package = build(hand_plan(source, [rows] * source.spec.num_moe_layers), tmp_path / "out")
    with open_with(package, "fetch", "ggml") as session:
        wanted = decoded_logits(session)
    with open_with(package, "cpu", "ggml") as session:
        np.testing.assert_allclose(decoded_logits(session), wanted, atol=2e-5)
        assert session.statistics().cpu_experts > 0
        assert session.misses == "computed on the CPU"


def test_what_lies_in_ram_never_moves(tiny_checkpoint: TinyCheckpoint) -> None:
    with open_with(tiny_checkpoint("qwen3_moe"), "cpu") as session:
        decoded_logits(session)  # those that began in slots come to RAM when they are read anew
        loop = session.new_loop()
        loop.prefill(PROMPT)
        before = dataclasses.replace(session.statistics())
        for token in PROMPT[:NEW_TOKENS]:
            loop.step([token])
        after = session.statistics()
        assert after.page_in_bytes == before.page_in_bytes
        assert after.misses - before.misses == after.cpu_experts - before.cpu_experts > 0


def test_prices_are_measured_and_a_trial_is_held(tiny_checkpoint: TinyCheckpoint) -> None:
    with open_with(tiny_checkpoint("olmoe"), "cpu") as session:
        residency = session._residency
        misses, host = residency.pager.misses, residency.host
        assert misses is not None and host is not None
        hidden = torch.randn(1, session.spec.expert_hidden)
        modules = [block.experts for block in residency.blocks]
        probe = PriceProbe(misses, host, residency.transfer, modules, hidden, session.spec.top_k)
        prices = probe.prices()
        assert 0 < prices.contended_bytes_per_second <= prices.link_bytes_per_second < 1e12
        assert 0 < prices.cpu_seconds_per_byte < 1 and 0 < prices.merge_seconds < 1
        assert all(cell.holders == 0 for cell in host._cells.values())
        cheap_cpu = Prices(1.0, 1.0, 1e-12, 0.0)
        misses.chooser = MissChooser(cheap_cpu, InterleavedTrial())
        loop = session.new_loop()
        loop.prefill(PROMPT[:2])
        computed = []
        for token in range(2 * BLOCKS * BLOCK_TOKENS):
            before = session.statistics().cpu_experts
            loop.step([token % 200])
            computed.append(session.statistics().cpu_experts > before)
        trial = misses.chooser.trial
        assert trial is not None and trial.verdict is not None
        assert any(computed[:BLOCK_TOKENS]) and not any(computed[BLOCK_TOKENS : 2 * BLOCK_TOKENS])
        assert "by turns" not in session.misses


def test_a_failed_read_leaves_the_session_usable(tiny_checkpoint: TinyCheckpoint) -> None:
    with open_with(tiny_checkpoint("qwen3_moe"), "cpu") as session:
        wanted = decoded_logits(session)
        cpu_misses = session._residency.pager.misses
        assert cpu_misses is not None
        experts, token = cpu_misses.host_experts, cpu_misses.host_experts.token

        def broken(*_: object) -> torch.Tensor:
            raise OSError("injected")

        experts.token = broken  # type: ignore[method-assign,assignment]
        with pytest.raises(OSError, match="injected"):
            decoded_logits(session)
        experts.token = token  # type: ignore[method-assign]
        np.testing.assert_allclose(decoded_logits(session), wanted, atol=2e-5)
        host = session._residency.host
        assert host is not None and all(cell.holders == 0 for cell in host._cells.values())


def test_what_cannot_be_done_is_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("qwen3_moe")
    with pytest.raises(InputError, match="have no slot from RAM .* add --ram"):
        Session.open(folder, num_slots=4, misses="cpu")
    with pytest.raises(InputError, match="use auto, fetch, cpu"):
        open_with(folder, cast(Misses, "sometimes"))
    with Session.open(folder, num_slots=4, ram_bytes=RAM) as session:
        assert session.misses == "" and session.host_memory() == []
        assert [each for each in session.warnings if each.startswith("--ram is for")]
    with Session.open(folder, num_slots=4) as session:
        assert not session.warnings or "--ram" not in " ".join(session.warnings)


def test_run_says_what_became_of_the_misses(
    tiny_checkpoint: TinyCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tiny_checkpoint("qwen3_moe"))
    options = ["--raw", "--prompt", "abc", "--slots", "4", "--max-new-tokens", "4"]
    options += ["--device", "cpu", "--ram", "1GB", "--misses", "cpu"]
    assert run(["run", folder, *options]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "misses computed on the CPU;" in said
    assert run(["run", folder, *options, "--json"]) == 0
    measured = RunMeasurement.model_validate_json(capsys.readouterr().out)
    assert measured.paging["cpu_experts"] > 0 and measured.misses == "computed on the CPU"
    assert "experts in RAM" in [term.name for term in measured.terms] and not measured.host_terms


def test_on_a_cpu_experts_beside_the_slots_are_under_the_budget(
    tiny_checkpoint: TinyCheckpoint,
) -> None:
    folder = tiny_checkpoint("qwen3_moe")
    with Session.open(folder, budget_bytes=10**9) as session:
        whole = {term.name: term.num_bytes for term in session.memory()}
        two = 2 * 2 * session.spec.expert_weights
    options: dict[str, Any] = {"ram_bytes": two, "misses": "cpu", "device": "cpu"}
    with Session.open(folder, budget_bytes=sum(whole.values()), **options) as session:
        found = {term.name: term.num_bytes for term in session.memory()}
    assert found["experts in RAM"] == two
    assert found["experts"] <= whole["experts"] - two
    assert sum(found.values()) <= sum(whole.values())


@pytest.mark.gpu
@pytest.mark.parametrize("misses", ["fetch", "auto", "cpu"])
def test_a_gpu_gives_what_a_cpu_gives(misses: Misses, tiny_checkpoint: TinyCheckpoint) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    folder = tiny_checkpoint("qwen3_moe")
    with Session.open(folder, device="cpu", num_slots=4, kernels="exact") as session:
        wanted = decoded_logits(session)
    with Session.open(
        folder, device="cuda", num_slots=4, ram_bytes=RAM, kernels="exact", misses=misses
    ) as session:
        found = decoded_logits(session)
        statistics = session.statistics()
        session.check_integrity()
        assert [term.name for term in session.host_memory()] == ["experts in RAM", "staging"]
    assert statistics.misses > 0 and (statistics.cpu_experts > 0 or misses != "cpu")
    difference = np.linalg.norm(found - wanted)
    assert difference < 0.05 * np.linalg.norm(wanted)  # the GPU computes in bfloat16
