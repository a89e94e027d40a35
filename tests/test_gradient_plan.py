"""Loss gradients in planning: the loss by hand, what must belong together, who proposes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from conftest import TinyCheckpoint
from fake_stats import fake_gradients, fake_stats

from edge_moe.candidates import candidate_forms
from edge_moe.checkpoint import Checkpoint
from edge_moe.cli import run
from edge_moe.errors import StatsError
from edge_moe.gradient_stats import (
    FormCost,
    GradientStats,
    load_gradients,
    merge_gradients,
)
from edge_moe.loss_table import (
    DEFAULT_LOSS,
    GRADIENT_LOSS,
    DropLoss,
    LayerScale,
    LossKind,
    loss_table,
)
from edge_moe.optimise import solve
from edge_moe.plan import Plan
from edge_moe.planner import build_problem, make_plan, stats_fingerprint
from edge_moe.problem import FloatArray, IntArray
from edge_moe.search import PLAN_NAME, Evidence, search
from edge_moe.stats import ExpertStats
from edge_moe.trials import OnShare

FORMS = ("drop", "q8_0", "bf16")


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: TinyCheckpoint) -> Checkpoint:
    return Checkpoint(tiny_checkpoint("qwen3_moe", wide=True))


def by_hand() -> tuple[ExpertStats, GradientStats]:
    """One layer of two experts: T 10, H 4; expert 0 chosen 6 times, expert 1 twice."""
    from test_stats import make_info

    info = make_info(moe_layer_ids=(0,), num_experts=2, num_tokens=10, num_windows=1)
    stats = ExpertStats.zeros(info)
    stats.routed_tokens[0] = [6, 2]
    stats.form_loss.add([[[3.0, 0.5], [1.0, 0.25]]])
    stats.expert_sums["gated_square"].add([[5.0, 2.0]])
    gradients = fake_gradients(stats, hidden_size=4, expert_width=4)
    for total in (gradients.gradient_square, *gradients.form_cost.values()):
        total.high[:] = total.low[:] = 0
    gradients.gradient_square.add([20.0])  # layer weight 20 / (10 x 4) = 1/2
    gradients.form_cost[FormCost.FIRST_ORDER].add([[[1.0, 0.125], [4.0, 0.0625]]])
    gradients.form_cost[FormCost.DIAGONAL].add([[[9.0, 0.75], [9.0, 0.375]]])
    return stats, gradients


@pytest.mark.parametrize(
    ("layers", "packed"),
    [(LayerScale.FIRST_ORDER, [0.125, 0.0625]), (LayerScale.DIAGONAL, [0.75, 0.375])],
)
def test_losses_by_hand(layers: LayerScale, packed: list[float]) -> None:
    stats, gradients = by_hand()
    plain = LossKind(layers=layers, drop_factor=1.0, prior_tokens=0.0)
    table = loss_table(stats, FORMS, "bf16", plain, gradients)
    # dropping: expert 0 by |dz|**2 / 2 = 1.5 > 1, expert 1 by its first-order cost 4 > 1 / 2
    np.testing.assert_array_equal(table[0], [[1.5, packed[0], 0], [4.0, packed[1], 0]])
    mean = LossKind(DropLoss.MEAN, layers, 1.0, 0.0)
    assert loss_table(stats, FORMS, "bf16", mean, gradients)[0, :, 0].tolist() == [2.0, 4.0]
    dearer = LossKind(layers=layers, drop_factor=3.0, prior_tokens=16.0)
    found = loss_table(stats, FORMS, "bf16", dearer, gradients)
    wanted = table[0] * [3, 1, 1]
    np.testing.assert_allclose(found[0], wanted + 16 * wanted.sum(axis=0) / 8)


def test_units_say_what_was_weighed() -> None:
    kinds = [LossKind(layers=layers) for layers in LayerScale]
    assert len({kind.unit for kind in kinds}) == len({kind.name for kind in kinds}) == 4
    assert GRADIENT_LOSS.unit.startswith("nats^2, sum over calibration tokens of (loss gradient .")
    assert "mean squared gradient" in GRADIENT_LOSS.unit
    assert "gradient" not in DEFAULT_LOSS.unit


def test_a_gradient_loss_without_gradients_names_the_remedy(checkpoint: Checkpoint) -> None:
    stats = fake_stats(checkpoint)
    with pytest.raises(StatsError, match="first-order loss needs gradient .*calibrate --gradients"):
        loss_table(stats, FORMS, "bf16", GRADIENT_LOSS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_fingerprint", "other"),
        ("data_fingerprint", "other"),
        ("windows", (0, 1)),
        ("quantiser", "gptq_refit"),
        ("forms", ("drop", "q8_0")),
    ],
)
def test_gradients_of_another_run_are_refused(
    checkpoint: Checkpoint, tmp_path: Path, field: str, value: object
) -> None:
    stats = fake_stats(checkpoint)
    gradients = fake_gradients(stats)
    info = gradients.info.model_copy(update={field: value})
    other = GradientStats.zeros(info)
    message = f"gradients do not belong to the statistics: {field} is"
    with pytest.raises(StatsError, match=message):
        plan_for(checkpoint, stats, other)
    other.save(tmp_path)
    with pytest.raises(StatsError, match=message):
        load_gradients(tmp_path, stats.info)


def budget_of(checkpoint: Checkpoint) -> int:
    """Room for everything else and a quarter of the experts' bytes."""
    spec = checkpoint.spec
    return 24_000_000 + spec.num_moe_layers * spec.num_experts * spec.expert_weights // 2


def plan_for(checkpoint: Checkpoint, stats: ExpertStats, gradients: GradientStats | None) -> Plan:
    return make_plan(
        checkpoint,
        stats,
        budget_of(checkpoint),
        model="m",
        context_tokens=128,
        runtime=(10_000_000, "assumed"),
        gradients=gradients,
    )


def test_a_plan_takes_the_gradients_into_account(checkpoint: Checkpoint) -> None:
    stats = fake_stats(checkpoint)
    gradients = fake_gradients(stats)
    without, with_gradients = (plan_for(checkpoint, stats, each) for each in (None, gradients))
    assert (without.loss_unit, without.gradient_fingerprint) == (DEFAULT_LOSS.unit, "")
    assert with_gradients.loss_unit == GRADIENT_LOSS.unit
    assert with_gradients.gradient_fingerprint == stats_fingerprint(gradients)
    assert with_gradients.stats_fingerprint == without.stats_fingerprint
    forms = candidate_forms(checkpoint.spec, "native")
    table = loss_table(stats, forms, "bf16", GRADIENT_LOSS, gradients)
    losses = [
        sum(
            table[layer, expert, forms.index(form)]
            for layer, row in enumerate(plan.forms)
            for expert, form in enumerate(row)
        )
        for plan in (without, with_gradients)
    ]
    assert losses[1] == pytest.approx(with_gradients.loss)
    assert losses[1] < losses[0], "the plan is the best by its own loss"
    gradients.loss_nats.add([1.0])
    assert plan_for(checkpoint, stats, gradients).gradient_fingerprint != (
        with_gradients.gradient_fingerprint
    )


@pytest.mark.slow
@pytest.mark.parametrize("layers", [LayerScale.FIRST_ORDER, LayerScale.DIAGONAL])
def test_the_search_proposes_and_tunes_gradient_kinds(
    checkpoint: Checkpoint, layers: LayerScale
) -> None:
    """The truth is nearly one kind of loss: the search finds which, and goes on from there."""
    stats = fake_stats(checkpoint)
    gradients, forms = fake_gradients(stats), candidate_forms(checkpoint.spec, "native")
    supers = np.zeros(stats.routed_tokens.shape, np.bool_)

    def tables(kind: LossKind) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return loss_table(stats, forms, "bf16", kind, gradients)

    true_kind = LossKind(layers=layers, drop_factor=8.0)
    truth = tables(true_kind) * np.array([1.5, 1.0])[:, None, None]
    budget_bytes = checkpoint.spec.num_experts * checkpoint.spec.expert_weights * 2 // 3
    problem = build_problem(
        checkpoint.spec, forms, tables(GRADIENT_LOSS), supers, "native", budget_bytes
    )
    evidence = Evidence(problem, stats, supers, tables, GRADIENT_LOSS, has_gradients=True)

    def measure(choices: Mapping[str, IntArray], on_run: OnShare) -> dict[str, FloatArray]:
        return {
            name: np.full(2, np.take_along_axis(truth, choice[..., None], axis=-1).sum())
            for name, choice in choices.items()
        }

    best, record = search(evidence, solve(problem), measure, seconds=300)
    found = {trial.name: trial.kld for trial in record.trials}
    assert next(iter(found)) == PLAN_NAME
    for scale in (LayerScale.FIRST_ORDER, LayerScale.DIAGONAL):
        assert any(name.startswith(f"reroute {scale}, drop x") for name in found)
    best_kind = evidence.kinds[min(found.keys() & evidence.kinds.keys(), key=found.__getitem__)]
    assert best_kind.layers is layers
    tuned = [name for name in found if "layer weights" in name]
    assert tuned and all(name.startswith(best_kind.name) for name in tuned)
    again = search(evidence, solve(problem), measure, seconds=300)[0]
    np.testing.assert_array_equal(best.choice, again.choice)


def test_without_gradients_no_such_kind_is_proposed(checkpoint: Checkpoint) -> None:
    stats = fake_stats(checkpoint)
    supers = np.zeros(stats.routed_tokens.shape, np.bool_)
    forms = candidate_forms(checkpoint.spec, "native")
    table = loss_table(stats, forms, "bf16")
    problem = build_problem(checkpoint.spec, forms, table, supers, "native", 10**9)
    kinds = Evidence(problem, stats, supers, lambda _: table).kinds
    assert kinds[PLAN_NAME] == DEFAULT_LOSS
    assert not any(kind.layers.needs_gradients for kind in kinds.values())


def test_shards_have_gradients_all_or_none(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shards = [fake_stats(checkpoint, windows=(index,), num_tokens=100) for index in range(2)]
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, stats in zip(folders, shards, strict=True):
        stats.save(folder)
    assert merge_gradients(folders) is None
    parts = [fake_gradients(stats) for stats in shards]
    parts[0].save(folders[0])
    with pytest.raises(StatsError, match=f"{folders[0]} holds loss gradients and {folders[1]} no"):
        merge_gradients(folders)
    parts[1].save(folders[1])
    merged = merge_gradients(folders)
    assert merged is not None
    merged.info.require_same_run(shards[0].merge(shards[1]).info)
    np.testing.assert_array_equal(
        merged.loss_nats.limbs(), parts[0].merge(parts[1]).loss_nats.limbs()
    )


def test_the_commands_use_what_lies_beside_the_statistics(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = fake_stats(checkpoint)
    gradients = fake_gradients(stats)
    folder, output = tmp_path / "stats", tmp_path / "plan.json"
    stats.save(folder)
    gradients.save(folder)
    assert run(["stats", "show", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nats_per_token"] == pytest.approx(2.5)
    options = ["--budget", "65MB", "--ctx", "128", "--target", "gguf"]
    command = ["plan", str(checkpoint.folder), "--stats", str(folder), *options, "--no-search"]
    assert run([*command, "-o", str(output)]) == 0
    plan = Plan.load(output)
    assert plan.gradient_fingerprint == stats_fingerprint(gradients)
    assert plan.loss_unit == GRADIENT_LOSS.unit
    assert "loss: nats^2" in capsys.readouterr().out
    GradientStats.zeros(gradients.info.model_copy(update={"data_fingerprint": "x"})).save(folder)
    assert run([*command, "-o", str(output)]) == 2
    assert "data_fingerprint is x in one and d in the other" in capsys.readouterr().err
