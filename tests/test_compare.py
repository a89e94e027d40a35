"""The comparison: contenders obey the budget, scores are those of real models, it resumes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TinyCheckpoint, make_tiny_checkpoint
from fake_scores import fake_score
from fake_stats import fake_stats
from rich.console import Console
from typer.testing import CliRunner

from edge_moe.candidates import candidate_forms
from edge_moe.checkpoint import Checkpoint
from edge_moe.cli import app
from edge_moe.compare.contenders import (
    LOSSES,
    Contender,
    Field,
    Kind,
    contenders,
    counts_for,
    kept_forms,
)
from edge_moe.compare.record import Cell, CompareOptions, load_cells, task_key
from edge_moe.compare.table import print_comparison, times_plan
from edge_moe.converters import compare as engine
from edge_moe.converters import compare_transforms
from edge_moe.converters.compare import compare
from edge_moe.converters.compare_bench import Bench, compared_windows
from edge_moe.converters.compare_transforms import WantedTransform, wanted_transforms
from edge_moe.converters.staging import locked
from edge_moe.converters.transform import transform
from edge_moe.converters.variants import VariantScorer
from edge_moe.errors import InputError
from edge_moe.formats import form_fits, form_label, get_form
from edge_moe.loss_table import loss_table
from edge_moe.metrics import Estimate
from edge_moe.plan import Target
from edge_moe.planner import build_problem
from edge_moe.published import GEMQ_NAME, PMQ_NAME
from edge_moe.runtime.tokenizer import load_tokenizer
from edge_moe.saliency import CRITERIA, saliency
from edge_moe.search import ROUNDS
from edge_moe.super_experts import find_super_experts
from edge_moe.units import parse_share


@pytest.fixture
def field(tiny_checkpoint: TinyCheckpoint) -> Field:
    return _field(tiny_checkpoint, 0.3)


def _field(tiny_checkpoint: TinyCheckpoint, share: float, family: str = "qwen3_moe") -> Field:
    checkpoint = Checkpoint(tiny_checkpoint(family, wide=True))
    spec, stats = checkpoint.spec, fake_stats(checkpoint)
    generator = np.random.default_rng(1)
    for total in stats.expert_sums.values():
        total.add(generator.random(stats.routed_tokens.shape))
    forms = candidate_forms(spec, "native")
    supers = find_super_experts(stats.max_output)
    losses = loss_table(stats, forms, "bf16")
    whole = spec.num_experts * spec.num_moe_layers * spec.expert_weights * 2
    problem = build_problem(spec, forms, losses, supers, "native", int(share * whole))
    return Field(problem, forms, stats, supers)


def test_every_contender_fits_and_keeps_top_k(field: Field) -> None:
    found = contenders(field)[0]
    assert len({each.name for each in found}) == len(found)
    for each in found:
        assert field.problem.bytes_of(each.choice) <= field.problem.budget_bytes, each.name
        assert ((each.choice > 0).sum(axis=1) >= field.problem.top_k).all(), each.name
    kinds = {each.kind for each in found}
    assert kinds == {Kind.PRUNE, Kind.QUANTISE, Kind.MIXED, Kind.RANDOM}
    assert sum(each.kind is Kind.RANDOM for each in found) % 3 == 0


def test_pruning_keeps_the_best_and_the_super_experts(field: Field) -> None:
    reap = next(each for each in contenders(field)[0] if each.name == "reap, 8 bits")
    counts = counts_for(field.problem, list(field.forms).index("q8_0"))
    assert counts is not None
    assert (reap.choice > 0).sum(axis=1).tolist() == counts.tolist()
    assert (reap.choice[field.supers] > 0).all()
    scores = saliency(field.stats, "reap")
    dropped = reap.choice == 0
    for row, scored in enumerate(scores):
        others = scored[~field.supers[row] & ~dropped[row]]
        assert scored[dropped[row]].max() <= others.min()


def test_counts_by_hand(field: Field) -> None:
    whole = field.problem.form_bytes[-1]
    layers, experts = field.problem.loss.shape[:2]
    budget = replace(field.problem, budget_bytes=int(whole) * (layers * (experts - 2) + 1))
    assert counts_for(budget, len(field.forms) - 1).tolist() == [  # type: ignore[union-attr]
        experts - 1,
        *[experts - 2] * (layers - 1),
    ]
    uniform = replace(budget, scope="model")
    assert counts_for(uniform, len(field.forms) - 1).tolist() == [experts - 2] * layers  # type: ignore[union-attr]
    none = replace(budget, budget_bytes=int(whole) * layers)
    assert counts_for(none, len(field.forms) - 1) is None


def test_forms_of_pruned_models() -> None:
    assert kept_forms(["drop", "tq1_0", "q4_k", "q8_0", "bf16"]) == [2, 3, 4]
    assert kept_forms(["drop", "q4_0", "bf16"]) == [1, 2]


@pytest.mark.parametrize(("text", "share"), [("50%", 0.5), ("0.125", 0.125), ("100%", 1.0)])
def test_shares(text: str, share: float) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["0", "-5%", "1.5", "half", "nan", "%"])
def test_bad_shares(text: str) -> None:
    with pytest.raises(InputError, match="share"):
        parse_share(text)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("compared"), "qwen3_moe", width=64)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "mine.txt"
    path.write_text(" ".join(f"word{index % 37} is {index}" for index in range(900)))
    return path


OPTIONS = CompareOptions(search_seconds=5.0, max_windows=2, transforms=("m-smoe", "heapr"))


@pytest.fixture(scope="module")
def cells(
    trained: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[list[Cell], Path]]:
    output = tmp_path_factory.mktemp("out")
    yield compare(trained, str(text), [0.6, 0.3], output, OPTIONS), output


@pytest.mark.slow
def test_cells_hold_every_kind(cells: tuple[list[Cell], Path]) -> None:
    found, output = cells
    assert [cell.share for cell in found] == [0.6, 0.3]
    assert {path.name for path in output.glob("*.json")} == {cell.file_name for cell in found}
    assert load_cells(output) == found
    for cell in found:
        assert {score.kind for score in cell.scores} == set(Kind)
        assert all(score.expert_bytes <= cell.budget_bytes for score in cell.scores)
        assert cell.search.trials
        parts = [part.name for part in cell.parts]
        assert parts[: len(LOSSES)] == list(LOSSES)
        assert set(parts[len(LOSSES) :]) <= {f"after {name}" for name in ROUNDS}
        assert not list(output.glob(".compare/*x*"))  # transformed checkpoints do not pile up


@pytest.mark.slow
def test_what_is_measured_is_not_measured_again(
    cells: tuple[list[Cell], Path], trained: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, output = cells
    monkeypatch.setattr(engine, "_measure", None)  # calling it would fail
    assert compare(trained, str(text), [0.3, 0.6], output, OPTIONS) == found
    with pytest.raises(TypeError):
        compare(trained, str(text), [0.3], output, OPTIONS.model_copy(update={"max_windows": 1}))


@pytest.mark.slow
def test_a_transform_scores_as_its_own_checkpoint(
    cells: tuple[list[Cell], Path], trained: Path, text: Path, tmp_path: Path
) -> None:
    cell, output = cells[0][1], cells[1]
    checkpoint = Checkpoint(trained)
    windows = compared_windows(str(text), load_tokenizer(trained), OPTIONS)
    ready = Bench.of(checkpoint, str(text), output / ".compare", OPTIONS, *windows)
    forms = candidate_forms(checkpoint.spec, "native")
    problem = build_problem(
        checkpoint.spec,
        forms,
        loss_table(ready.stats, forms, "bf16"),
        find_super_experts(ready.stats.max_output),
        "native",
        cell.budget_bytes,
    )
    wanted = wanted_transforms(problem, checkpoint.spec, forms, ["m-smoe"])
    last = wanted[-1]
    assert last.form == "bf16"
    folder = tmp_path / "merged"
    transform(trained, [str(text)], folder, "m-smoe", num_experts=last.num_experts)
    merged = Checkpoint(folder)
    rows = [["bf16"] * merged.spec.num_experts] * merged.spec.num_moe_layers
    scores = VariantScorer(merged, ready.windows).score({"merged": rows}, whole=ready.whole)
    own, _ = scores["merged"].split(ready.num_own_tokens)
    score = next(each for each in cell.scores if each.name == last.name)
    assert score.in_task.kld.value == pytest.approx(own.kld.mean(), rel=1e-6)


@pytest.mark.slow
def test_the_table_names_the_best_of_every_kind(cells: tuple[list[Cell], Path]) -> None:
    console = Console(width=300)
    with console.capture() as captured:
        print_comparison(cells[0], console)
    text = captured.get()
    for kind in Kind:
        assert f"| {kind} (" in text
    for cell in cells[0]:
        best = cell.best(Kind.PRUNE)
        assert best is not None
        assert best.name in text
        assert times_plan(cell, cell.plan) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--share", "2%"], "hold no plan"),
        (["--share", "lots"], "share 'lots' is none"),
        (["--task", "nothing"], "task 'nothing'"),
    ],
)
def test_bad_requests(trained: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    options = ["-o", str(tmp_path / "out"), "--windows", "1", "--max-windows", "1"]
    task = [] if "--task" in arguments else ["--task", "arithmetic"]
    result = CliRunner().invoke(app, ["compare", str(trained), *task, *options, *arguments])
    assert message in str(result.exception)
    assert isinstance(result.exception, InputError)


def test_a_damaged_cell_is_refused(tmp_path: Path) -> None:
    (tmp_path / "code-native-0.5.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(InputError, match="is damaged: settings: Field required: delete it"):
        load_cells(tmp_path)
    with pytest.raises(InputError, match="holds no comparison"):
        load_cells(tmp_path / "empty")


def test_contenders_are_named_after_their_bits(field: Field) -> None:
    names: list[Contender] = [each for each in contenders(field)[0] if each.kind is Kind.PRUNE]
    assert {each.name.split(", ")[1] for each in names} <= {"4 bits", "8 bits", "16 bits"}


def test_random_draws_are_averaged_in_every_figure(cells: tuple[list[Cell], Path]) -> None:
    draws = [fake_score(f"random, draw {i}, 8 bits", Kind.RANDOM, i) for i in (1, 2, 3)]
    worse = fake_score("random, draw 1, 4 bits", Kind.RANDOM, 9)
    cell = cells[0][0].model_copy(update={"scores": [*draws, worse]})
    mean = cell.random_mean()
    assert mean is not None
    assert mean.name == "mean and spread of 3 draws, 8 bits"
    assert mean.in_task.kld == Estimate(2.0, 1.0)
    assert mean.in_task.ppl == Estimate(4.0, 1.0)
    assert mean.in_task.same_top.value == pytest.approx(0.8)
    assert mean.off_task is not None
    assert mean.off_task.kld == Estimate(2.0, 1.0)


def test_work_files_go_unless_they_are_in_use(tmp_path: Path) -> None:
    engine.clear_work(tmp_path)  # nothing there
    work = tmp_path / engine.WORK_NAME
    work.mkdir()
    with locked(work / "lock", "in use"):
        engine.clear_work(tmp_path)
        assert work.exists()
    engine.clear_work(tmp_path)
    assert not work.exists()


def test_what_does_not_exist_is_said(tiny_checkpoint: TinyCheckpoint) -> None:
    tight = _field(tiny_checkpoint, 0.08)
    found, missing = contenders(tight)
    assert not [each for each in found if each.name == PMQ_NAME]
    assert any(text.startswith(f"{PMQ_NAME}: ") for text in missing)
    assert any(text.startswith("Pruning, 16 bits: fewer experts per layer fit") for text in missing)
    others = ["q2_0" if form.startswith("tq") else form for form in tight.forms]
    _, missing = contenders(replace(tight, forms=others))
    assert any(text.startswith("All ternary: not on offer") for text in missing)
    assert any("tq1_0, which is not on offer for this model" in text for text in missing)
    for problem in (tight.problem, replace(tight.problem, scope="model")):
        _, missing = contenders(replace(tight, problem=problem))
        assert any(PMQ_NAME in text for text in missing)


def test_criteria_keep_the_router_groups_equal(tiny_checkpoint: TinyCheckpoint) -> None:
    field = _field(tiny_checkpoint, 0.45, "deepseek_v3")
    assert field.problem.num_groups == 2
    pruned = [each for each in contenders(field)[0] if each.kind in (Kind.PRUNE, Kind.RANDOM)]
    assert {each.name.partition(",")[0] for each in pruned} == set(CRITERIA)
    for each in pruned:
        by_group = field.problem.by_group(each.choice > 0).sum(axis=-1)
        assert (by_group == by_group[:, :1]).all() and by_group.min() >= 2
        assert field.problem.bytes_of(each.choice) <= field.problem.budget_bytes
    scores = np.where(field.supers, np.inf, saliency(field.stats, "reap"))
    reap = next(each for each in pruned if each.name == "reap, 8 bits")
    count = int((reap.choice[0] > 0).sum()) // 2
    best = field.problem.by_group(scores)[0].argsort(axis=-1)[:, -count:] + [[0], [4]]
    assert set(np.flatnonzero(reap.choice[0])) == set(best.ravel().tolist())


def test_gemq_is_there_where_pmq_fails(tiny_checkpoint: TinyCheckpoint) -> None:
    field = _field(tiny_checkpoint, 0.122)
    found, missing = contenders(replace(field, gradient_cost=field.problem.loss))
    names = {each.name for each in found}
    assert GEMQ_NAME in names and PMQ_NAME not in names
    assert any(text.startswith(PMQ_NAME) for text in missing)


@pytest.mark.parametrize("target", ["native", "gguf", "hf", "onnx"])
def test_narrowed_experts_fit_their_forms(
    target: Target, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = make_tiny_checkpoint(
        tmp_path_factory.mktemp("wide"), "qwen3_moe", width=256, moe_intermediate_size=768
    )
    checkpoint = Checkpoint(folder)
    spec = checkpoint.spec
    forms = candidate_forms(spec, target)
    stats = fake_stats(checkpoint, list({*candidate_forms(spec, "native"), *forms}))
    losses = loss_table(stats, forms, "bf16")
    whole = spec.num_experts * spec.num_moe_layers * spec.expert_weights * 2
    supers = find_super_experts(stats.max_output)
    for share in (0.2, 0.5, 0.75):
        problem = build_problem(spec, forms, losses, supers, target, int(share * whole))
        wanted = wanted_transforms(problem, spec, forms, ["heapr", "dern"])
        assert wanted
        for each in wanted:
            assert form_fits(each.form, spec.hidden_size, each.expert_width)
            assert each.expert_bytes <= problem.budget_bytes
            label = get_form(each.form).label
            assert label in {form_label(form) for form in forms[1:]}


def test_one_size_is_transformed_once_for_all_its_forms(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, int | None, int | None]] = []

    def transform(*args: object, **sizes: object) -> None:
        folder, method = args[2], args[3]
        assert isinstance(folder, Path) and isinstance(method, str)
        made.append((method, sizes["num_experts"], sizes["expert_width"]))  # type: ignore[arg-type]
        if method == "dern":
            raise InputError("no such luck")
        folder.mkdir()

    monkeypatch.setattr(compare_transforms, "transform", transform)
    wanted = [
        WantedTransform("dern", "q8_0", 4, 64, 1),
        WantedTransform("dern", "bf16", 4, 64, 2),
        WantedTransform("ream", "q8_0", 4, 64, 1),
        WantedTransform("ream", "bf16", 4, 64, 2),
        WantedTransform("heapr", "bf16", 8, 32, 2),
    ]
    found = []
    for each in compare_transforms.transformed(trained, "code", tmp_path, tmp_path, wanted):
        assert each.folder is None or each.folder.exists()
        assert len([path for path in tmp_path.iterdir() if path.is_dir()]) <= 1
        found.append((each.wanted, each.folder is not None, each.refusal))
    assert made == [("dern", 4, None), ("ream", 4, None), ("heapr", None, 32)]
    assert [each for each, _, _ in found] == wanted
    assert [is_there for _, is_there, _ in found] == [False, False, True, True, True]
    assert found[0][2] == "dern, 8 bits: no such luck"
    assert not list(tmp_path.iterdir())


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    assert task_key("code") == "code"
    keys = {task_key(str(tmp_path / name / "code.txt")) for name in ("a", "b")}
    assert len(keys) == 2 and all(key.startswith("code-") for key in keys)
