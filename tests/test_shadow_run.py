"""Running with shadows: what is computed from what, worked out against packages built that way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TinyCheckpoint
from hand_plan import hand_plan
from typer.testing import CliRunner

from edge_moe.checkpoint import Checkpoint
from edge_moe.cli import app
from edge_moe.converters.build import build
from edge_moe.errors import BudgetError, InputError, PackageError
from edge_moe.formats import expert_bytes
from edge_moe.package import Package
from edge_moe.runtime.expert_store import PackageStore
from edge_moe.runtime.kernel_choice import Kernels
from edge_moe.runtime.session import Session
from edge_moe.runtime.stalls import Stall, StallOptions

PROMPT = list(range(5, 45))
NEVER = StallOptions("never", is_repeatable=True)
KERNELS: tuple[Kernels, ...] = ("exact", "auto")


@pytest.fixture(scope="module")
def source(tiny_checkpoint: TinyCheckpoint) -> Checkpoint:
    return Checkpoint(tiny_checkpoint("qwen3_moe", wide=True))


@pytest.fixture(scope="module")
def built(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = hand_plan(source, [["q8_0"] * 8] * 2)
    return build(plan, tmp_path_factory.mktemp("shadow") / "out", shadow="tq2_0")


@pytest.fixture(scope="module")
def mixed(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sizes of bodies, and two experts per layer that are their own shadows."""
    row = ["q8_0", "tq1_0", "q4_k", "q8_0", "tq2_0", "q4_k", "q8_0", "q4_k"]
    plan = hand_plan(source, [row] * 2)
    return build(plan, tmp_path_factory.mktemp("mixed") / "out", shadow="tq2_0")


def decoded(session: Session, ids: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits as if every token had been generated."""
    vocab_size = session.model.config.vocab_size
    return session.new_loop().logits(ids, vocab_size, chunk_tokens=1)


@pytest.mark.parametrize("kernels", KERNELS)
def test_first_token_is_that_of_a_model_with_ternary_misses(
    source: Checkpoint, built: Path, tmp_path: Path, kernels: Kernels
) -> None:
    """Slots are filled in layer order, so with 3 slots all but the first three experts miss."""
    forms = [["q8_0"] * 3 + ["tq2_0"] * 5, ["tq2_0"] * 8]
    wanted = build(hand_plan(source, forms), tmp_path / "wanted")
    differing = 0
    for token in PROMPT:
        with (
            Session.open(built, num_slots=3, stall=NEVER, kernels=kernels) as session,
            Session.open(wanted, kernels=kernels) as reference,
        ):
            found = session.logits([token])
            np.testing.assert_allclose(found, reference.logits([token]), rtol=1e-4, atol=1e-5)
            counted = session.statistics()
            assert counted.hits + counted.misses == 2 * source.spec.top_k
            assert counted.shadow_experts == counted.misses >= source.spec.top_k
            assert counted.stall_seconds == 0
            differing += counted.hits > 0
        if differing:  # one token that mixes bodies and shadows, and one that need not
            break
    assert differing


@pytest.mark.parametrize("kernels", KERNELS)
def test_share_is_what_the_weights_say(built: Path, kernels: Kernels) -> None:
    with Session.open(built, num_slots=2, stall=NEVER, kernels=kernels) as session:
        with session.tracing() as recorder:
            session.logits(PROMPT[:1])
        trace = recorder.finish(session.trace_info())
        counted = session.statistics()
    weights, rows = trace.weights[0].astype(np.float64), trace.rows[0]  # [2, K]
    is_body = (rows < 2) & (np.arange(2)[:, None] == 0)  # what the two slots held at first
    assert counted.decoded_weight == pytest.approx(weights.sum(), rel=1e-3)
    assert counted.shadow_weight == pytest.approx(weights[~is_body].sum(), rel=1e-3)
    assert counted.shadow_share == counted.shadow_weight / counted.decoded_weight


def test_exact_is_unchanged_by_shadows(source: Checkpoint, built: Path, tmp_path: Path) -> None:
    plain = build(hand_plan(source, [["q8_0"] * 8] * 2), tmp_path / "plain")
    with (
        Session.open(plain, num_slots=5) as one,
        Session.open(built, num_slots=5) as other,
        Session.open(built, num_slots=5, stall=StallOptions("exact")) as third,
    ):
        for session in (other, third):
            np.testing.assert_array_equal(one.logits(PROMPT), session.logits(PROMPT))
            assert session.generate_ids(PROMPT, 8) == one.generate_ids(PROMPT, 8)
            assert session.memory() == one.memory()
            assert session.statistics().shadow_experts == 0


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("num_slots", [2, 5])
def test_prompts_wait_for_bodies(built: Path, num_slots: int, kernels: Kernels) -> None:
    with (
        Session.open(built, kernels=kernels) as whole,
        Session.open(built, num_slots=num_slots, stall=NEVER, kernels=kernels) as session,
    ):
        prompt = session.new_loop().prefill(PROMPT)
        np.testing.assert_array_equal(prompt, whole.new_loop().prefill(PROMPT))
        assert session.statistics().shadow_experts == 0


@pytest.mark.parametrize("kernels", KERNELS)
def test_bounded_lies_between_the_two(built: Path, kernels: Kernels) -> None:
    """With time for everything it is exact, with time for nothing it never waits."""

    def run(mode: Stall, seconds: float | None = None) -> tuple[Any, int]:
        stall = StallOptions(mode, seconds, 1e6, is_repeatable=True)
        with Session.open(built, num_slots=5, stall=stall, kernels=kernels) as session:
            return session.logits(PROMPT), session.statistics().shadow_experts

    with Session.open(built, kernels=kernels) as whole:
        exact = decoded(whole, PROMPT)
    patient, none = run("bounded", 1000)
    np.testing.assert_array_equal(patient, exact)
    assert none == 0
    (hasty, some), (never, most) = run("bounded", 1e-6), run("never")
    np.testing.assert_array_equal(hasty, never)
    assert some == most > 0
    one_body = expert_bytes("q8_0", 256, 256) / 1e6
    assert 0 < run("bounded", 2 * one_body)[1] < most


@pytest.mark.parametrize("mode", ["never", "bounded"])
def test_repeatable_runs_repeat(mixed: Path, mode: Stall) -> None:
    stall = StallOptions(mode, 0.3 if mode == "bounded" else None, 1e6, is_repeatable=True)
    found = []
    for _ in range(2):
        with Session.open(mixed, num_slots=4, stall=stall) as session:
            found.append(session.logits(PROMPT))
            assert np.isfinite(found[-1]).all()
            session.check_integrity()
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize("kernels", KERNELS)
def test_own_shadows_never_page(mixed: Path, kernels: Kernels) -> None:
    """Six of eight experts per layer have slots to share; the others lie among the shadows."""
    sizes = [expert_bytes(form, 256, 256) for form in ("tq2_0", "tq1_0")]
    with (
        Session.open(mixed, kernels=kernels) as whole,
        Session.open(mixed, num_slots=2, stall=NEVER, kernels=kernels) as session,
    ):
        assert session.measured_terms["shadows"] == 2 * (7 * sizes[0] + sizes[1])
        prompt, wanted = session.new_loop().prefill(PROMPT), whole.new_loop().prefill(PROMPT)
        np.testing.assert_allclose(prompt, wanted, atol=1e-5)
        session.generate_ids(PROMPT, 16, stop_at_eos=False)
        session.check_integrity()
        kept = session._residency.cache
        assert not any(kept.is_resident((layer, row)) for layer in (0, 1) for row in (1, 4))
        counted = session.statistics()
        assert counted.shadow_experts > 0
    with Session.open(mixed, num_slots=12, stall=NEVER, kernels=kernels) as session:
        session.logits(PROMPT)
        counted = session.statistics()
        assert (counted.misses, counted.shadow_experts) == (0, 0)
        assert counted.hits == 2 * 2 * len(PROMPT)


def test_live_runs_stay_within_their_slots(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies trickle in from another thread; nobody waits, and nothing is computed wrongly."""
    import time

    read = PackageStore.read_into

    def slow(self: PackageStore, key: Any, buffer: memoryview) -> None:
        time.sleep(0.002)
        read(self, key, buffer)

    with Session.open(mixed, num_slots=3, stall=StallOptions("never")) as session:
        monkeypatch.setattr(PackageStore, "read_into", slow)
        before = session.measured_terms
        for token in PROMPT:
            logits = session.logits([token, token + 1, token + 2])
            assert np.isfinite(logits).all()
            session.check_integrity()
        assert session.measured_terms == before
        counted = session.statistics()
        assert counted.shadow_experts > 0
        assert counted.page_in_bytes > 0
        assert counted.stall_seconds == 0


def test_budget_is_the_slots_and_all_shadows(built: Path) -> None:
    with pytest.raises(BudgetError, match=r"shadows 811 kB.*too small|too small.*shadows") as found:
        Session.open(built, budget_bytes=1000, context_tokens=64, stall=NEVER)
    least = found.value.minimum_bytes
    with pytest.raises(BudgetError) as plain:
        Session.open(built, budget_bytes=1000, context_tokens=64)
    shadow_bytes = 16 * expert_bytes("tq2_0", 256, 256)
    assert least - plain.value.minimum_bytes == shadow_bytes
    with Session.open(built, budget_bytes=least, context_tokens=64, stall=NEVER) as session:
        terms = {term.name: term.num_bytes for term in session.memory()}
        assert sum(terms.values()) == least
        assert terms["shadows"] == session.measured_terms["shadows"] == shadow_bytes
        assert terms["experts"] == session.measured_terms["experts"]
        session.logits(PROMPT)
    with pytest.raises(BudgetError):
        Session.open(built, budget_bytes=least - 1, context_tokens=64, stall=NEVER)


def test_shadows_are_not_loaded_where_every_body_fits(built: Path) -> None:
    for limit in ({}, {"num_slots": 16}, {"budget_bytes": 10**10}):
        with Session.open(built, stall=NEVER, **limit) as session:  # type: ignore[arg-type]
            assert not session.is_paging
            assert "shadows" not in session.measured_terms
            assert "shadows" not in {term.name for term in session.memory()}
            assert any("--stall never has nothing to do" in each for each in session.warnings)


def test_models_without_shadows_say_what_to_do(source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a checkpoint, which has no shadows.*build --shadow"):
        Session.open(source.folder, stall=NEVER)
    plain = build(hand_plan(source, [["q8_0"] * 8] * 2), tmp_path / "plain")
    with pytest.raises(InputError, match="holds no shadows.*build --shadow tq2_0.*--stall exact"):
        Session.open(plain, stall=NEVER)


def test_damaged_shadow_is_named(source: Checkpoint, tmp_path: Path) -> None:
    plan = hand_plan(source, [["q8_0"] * 8] * 2)
    folder = build(plan, tmp_path / "out", shadow="tq2_0")
    record = Package(folder).manifest.layers[1].shadows[3]
    with (folder / record.file).open("r+b") as handle:
        handle.seek(record.offset + 100)
        handle.write(b"\xff\x00\xff\x01")
    with pytest.raises(PackageError, match=r"layer 1 expert 3 is damaged"):
        Session.open(folder, num_slots=4, stall=NEVER)
    with Session.open(folder, num_slots=4) as session:  # nobody reads it
        session.logits(PROMPT)


def test_body_that_cannot_be_read_ends_the_run(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Session.open(built, num_slots=3, stall=NEVER) as session:

        def broken(*_: Any) -> None:
            raise OSError("the disk is gone")

        monkeypatch.setattr(PackageStore, "read_into", broken)
        with pytest.raises(OSError, match="the disk is gone"):
            session.logits(PROMPT)
        session.check_integrity()


def test_command_line(demo_model: Path, tmp_path: Path) -> None:
    demo = Checkpoint(demo_model)
    plan = hand_plan(demo, [["q4_k"] * 16] * 4)
    folder = build(plan, tmp_path / "out", shadow="tq1_0")
    runner = CliRunner()
    run = ["run", str(folder), "--prompt", "def f", "--raw", "--slots", "12", "--json"]
    run += ["--max-new-tokens", "8"]
    done = runner.invoke(app, [*run, "--stall", "bounded", "--stall-seconds", "0.0001"])
    assert done.exit_code == 0, done.output
    paging = json.loads(done.stdout)["paging"]
    assert paging["shadow_experts"] > 0
    assert 0 < paging["shadow_share"] <= 1
    refused = runner.invoke(app, [*run, "--stall", "never", "--stall-seconds", "1"])
    assert isinstance(refused.exception, InputError)
    assert "--stall-seconds is for --stall bounded" in str(refused.exception)
    for idle in (["--prefetch"], ["--predictor", "token"], ["--linear-map", "m.safetensors"]):
        refused = runner.invoke(app, [*run, "--stall", "never", *idle])
        assert isinstance(refused.exception, InputError)
        assert f"leave out {idle[0]}, or use --stall exact" in str(refused.exception)
    score = ["eval", str(folder), "--against", str(demo_model), "--task", "code", "--json"]
    score += ["--max-windows", "1", "--window-tokens", "24", "--budget"]
    with pytest.raises(BudgetError) as small:
        Session.open(folder, budget_bytes=1, context_tokens=256, scored_tokens=256, stall=NEVER)
    score.append(f"{small.value.minimum_bytes}B")
    costs = {}
    for mode in ("exact", "never"):
        done = runner.invoke(app, [*score, "--stall", mode])
        assert done.exit_code == 0, done.output
        (costs[mode],) = json.loads(done.stdout)
    assert costs["exact"]["stall"]["shadow_share"] == 0
    assert costs["never"]["stall"]["shadow_share"] > 0
    kld = {mode: cost["comparison"]["mean_kld"]["value"] for mode, cost in costs.items()}
    assert 0 <= kld["exact"] < kld["never"] < 5
