"""Training of upcycled experts: gradients by hand, packing, resuming, and what comes out."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hand_plan import edit_config, tree
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_dense
from torch import Tensor
from transformers import AutoModelForCausalLM

from edge_moe.checkpoint import Checkpoint
from edge_moe.cli import run
from edge_moe.converters.recover_train import TrainSettings
from edge_moe.converters.text_objective import TextObjective
from edge_moe.converters.upcycle import learn, write_moe
from edge_moe.converters.upcycle.balance import switch_loss
from edge_moe.converters.upcycle.dense_model import open_dense
from edge_moe.converters.upcycle.memory import student_terms
from edge_moe.converters.upcycle.record import LOG_NAME, UpcycleRecord
from edge_moe.converters.upcycle.routed_weights import Quantiser, RoutedMatrix, round_to_int8
from edge_moe.converters.upcycle.split import split_dense
from edge_moe.converters.upcycle.split_student import DistilSettings
from edge_moe.converters.upcycle.student import Student, UpcycleSettings
from edge_moe.converters.upcycle.target import MoeShape, choose_target
from edge_moe.converters.upcycle.train_text import dense_tokenizer, read_train_text
from edge_moe.converters.upcycle.trained_layers import (
    require_rows,
    ternary_forms,
    trained_layers,
    untrained_layers,
)
from edge_moe.converters.upcycle.upcycle import upcycle
from edge_moe.converters.window_training import (
    LossLog,
    WindowSettings,
    WindowTraining,
    checked_settings,
    state_bytes,
)
from edge_moe.errors import DiskSpaceError, InputError
from edge_moe.formats import get_form, pack_expert, unpack_expert
from edge_moe.plan import Plan
from edge_moe.stats import ExpertStats

IDS = [(7 * i * i + 3 * i) % 250 + 1 for i in range(40)]
FEW = UpcycleSettings(
    steps=12, learning_rate=3e-3, warmup_steps=2, num_judgements=3, is_ternary=True
)
Upcycled = Callable[..., tuple[Path, UpcycleRecord]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twenty made-up words in rows that follow a rule: something to learn."""
    words = [f"{'abcdefgh'[i % 8]}{'ijklm'[i % 5]}{i}" for i in range(20)]
    rows = [" ".join(words[i * j % 20] for j in range(12)) for i in range(200)]
    path = tmp_path_factory.mktemp("text") / "rows.txt"
    path.write_text("\n".join(rows))
    return str(path)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2-style, rows of 256."""
    return make_tiny_dense(tmp_path_factory.mktemp("dense"), "qwen2", width=256)


@pytest.fixture(scope="module")
def ternary(
    dense: Path, text: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, UpcycleRecord]:
    output = tmp_path_factory.mktemp("ternary") / "moe"
    return output, make(dense, text, output, FEW)


def make(
    dense: Path, text: str, output: Path, chosen: UpcycleSettings = FEW, **options: Any
) -> UpcycleRecord:
    sizes = {"window_tokens": 64, "max_windows": 40}
    return upcycle(dense, [text], output, settings=chosen, **(sizes | options))


def logits(folder: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


def mean_loss(folder: Path, windows: list[list[int]]) -> float:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [
            float(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss) for ids in windows
        ]
    return sum(losses) / len(losses)


# ---------------------------------------------------------------------------- arithmetic


def test_the_straight_through_gradient_by_hand() -> None:
    quantiser = Quantiser(group=4, is_ternary=True)
    weight = torch.tensor([[1.0, -3.0, 0.2, 3.8]])  # mean magnitude 2
    scale = torch.tensor([[0.5]])
    assert quantiser.codes(weight)[0].flatten().tolist() == [0, -1, 0, 1]  # 0.5 rounds to even, 0
    assert quantiser.used(weight, scale).tolist() == [[0, -0.5, 0, 0.5]]
    of_weight, of_scale = quantiser.pull(weight, scale, torch.tensor([[1.0, 2.0, 3.0, 5.0]]))
    assert of_weight.tolist() == [[0.25, 0.5, 0.75, 1.25]]  # s / gamma = 1/4
    assert of_scale.tolist() == [[3.0]]  # -2 + 5


def test_the_full_precision_gradient_is_the_true_one() -> None:
    """With gamma as a constant, autograd gives the same."""
    torch.manual_seed(0)
    quantiser = Quantiser(group=8, is_ternary=False)
    weight, scale = torch.randn(3, 16, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    upstream = torch.randn(3, 16)
    gamma = weight.detach().reshape(3, 2, 8).abs().mean(-1, keepdim=True)
    used = (weight.reshape(3, 2, 8) / gamma * scale[..., None]).flatten(-2)
    torch.testing.assert_close(quantiser.used(weight, scale), used)
    torch.autograd.backward(used, upstream)
    found = quantiser.pull(weight.detach(), scale.detach(), upstream)
    torch.testing.assert_close(found, (weight.grad, scale.grad))


def test_a_run_of_zeros_stays_finite() -> None:
    quantiser = Quantiser(group=4, is_ternary=True)
    zeros, scale = torch.zeros(1, 4), torch.ones(1, 1)
    assert quantiser.used(zeros, scale).tolist() == [[0, 0, 0, 0]]
    assert quantiser.fitted_scale(zeros).tolist() == [[0]]
    of_weight, of_scale = quantiser.pull(zeros, scale, torch.ones(1, 4))
    assert (of_weight.tolist(), of_scale.tolist()) == ([[0, 0, 0, 0]], [[0]])


def test_experts_start_as_the_dense_layer_and_down_proj_at_zero() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(4, 16)
    exact = RoutedMatrix(matrix, 2, Quantiser(16, is_ternary=False), is_zero=False)
    torch.testing.assert_close(torch.stack(exact.used), matrix.expand(2, 4, 16))
    silent = RoutedMatrix(matrix, 2, Quantiser(16, is_ternary=True), is_zero=True)
    assert not torch.stack(silent.used).any()


def test_gradients_gather_over_windows() -> None:
    matrix = RoutedMatrix(torch.tensor([[2.0, -2.0]]), 2, Quantiser(2, True), is_zero=False)
    assert matrix.used[0].tolist() == [[2, -2]]
    for factor in (1.0, 3.0):
        torch.autograd.backward((matrix.used[0] * factor).sum())
    matrix.end_step()
    assert matrix.weight.grad is not None and matrix.scale.grad is not None
    assert matrix.weight.grad.tolist() == [[[4, 4]], [[0, 0]]]  # s / gamma = 1; expert 1 unused
    assert matrix.scale.grad.tolist() == [[[0]], [[0]]]  # 4 - 4
    matrix.begin_step()
    assert matrix.used[0].grad is not None and not matrix.used[0].grad.any()


def test_activations_as_int8_by_hand() -> None:
    values = torch.tensor([[127.0, -0.4, 0.6, 2.5]], requires_grad=True)
    rounded = round_to_int8(values)
    assert rounded.tolist() == [[127, 0, 1, 2]]
    torch.autograd.backward(rounded.sum())
    assert values.grad is not None and values.grad.tolist() == [[1, 1, 1, 1]]
    assert round_to_int8(torch.zeros(1, 3)).tolist() == [[0, 0, 0]]


def test_balance_loss_by_hand() -> None:
    probabilities = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
    assert float(switch_loss(probabilities, torch.tensor([[0], [0]]))) == 1.5  # 2 x (1 x 0.75)
    assert float(switch_loss(probabilities, torch.tensor([[0], [1]]))) == 1.0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    magnitude=st.floats(-14, 6),
    share_of_zeros=st.floats(0, 1),
    group=st.sampled_from([256, 64, 32]),
)
@example(seed=665, magnitude=-11.375, share_of_zeros=0.75, group=256)  # scales fp16 rounds coarsely
def test_used_weights_pack_and_store_without_loss(
    seed: int, magnitude: float, share_of_zeros: float, group: int
) -> None:
    """Whatever was learned: bit for bit through 16 bits of either kind and every ternary form."""
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=(3, 512)).astype(np.float32)
    weight[generator.random((3, 512)) < share_of_zeros] = 0
    scale = (generator.normal(size=(3, 512 // group)) * 2.0**magnitude).astype(np.float32)
    quantiser = Quantiser(group, is_ternary=True)
    used = quantiser.used(torch.from_numpy(weight), torch.from_numpy(scale)).numpy()
    for name in (*ternary_forms(group), "f16", "bf16"):
        form = get_form(name)
        again = form.unpack(form.pack(used), 512) + np.float32(0)  # q2_0 has a zero below zero
        assert np.array_equal(again.view(np.uint32), used.view(np.uint32)), name


# ---------------------------------------------------------------------------- whole runs


def test_training_lowers_the_loss(ternary: tuple[Path, UpcycleRecord]) -> None:
    _, record = ternary
    first, kept = record.row(0), record.row(record.kept_step)
    assert first and kept and record.kept_step > 0
    assert kept.heldout_lm_loss < first.heldout_lm_loss - 0.5
    assert record.packed_bytes["tq1_0"] == 2 * 4 * 3 * 256 * 54
    assert record.routed_bytes == 2 * 4 * 3 * 256 * 256 * 2


def test_the_folder_computes_what_was_judged(
    ternary: tuple[Path, UpcycleRecord], dense: Path, text: str
) -> None:
    output, record = ternary
    model = open_dense(dense)
    found = read_train_text(model, dense_tokenizer(model), [text], 64, 40)
    windows = [list(found.windows[index]) for index in found.indices(False)]
    kept, first = record.row(record.kept_step), record.row(0)
    assert kept and first
    assert mean_loss(output, windows) == pytest.approx(kept.heldout_lm_loss, rel=1e-5)
    assert mean_loss(dense, windows) == pytest.approx(first.heldout_lm_loss, rel=1e-5)


def test_trained_experts_pack_to_the_same_bits(ternary: tuple[Path, UpcycleRecord]) -> None:
    checkpoint = Checkpoint(ternary[0])
    for layer_id in checkpoint.spec.moe_layer_ids:
        for expert_id in range(4):
            matrices = checkpoint.expert(layer_id, expert_id)
            for form in ("tq1_0", "tq2_0"):
                again = unpack_expert(form, pack_expert(form, *matrices), 256, 256)
                for old, new in zip(matrices, again, strict=True):
                    np.testing.assert_array_equal(old, new)
            assert len({float(value) for value in np.abs(matrices[2][0])}) <= 2


def test_a_plan_finds_nothing_lost(
    ternary: tuple[Path, UpcycleRecord], text: str, tmp_path: Path
) -> None:
    output, _ = ternary
    stats = tmp_path / "stats"
    command = ["calibrate", str(output), "--task", text, "-o", str(stats)]
    assert run([*command, "--forms", "tq1_0,tq2_0", "--window-tokens", "64"]) == 0
    found = ExpertStats.load(stats)
    losses = found.form_loss.values()
    for form in ("tq1_0", "tq2_0"):
        assert not losses[..., found.form_index(form)].any()
    assert losses[..., found.form_index("drop")].all()
    for target in ("native", "gguf"):  # no bytes are spent on what nothing gains from
        path = tmp_path / f"{target}.json"
        command = ["plan", str(output), "--stats", str(stats), "--target", target, "--no-search"]
        assert run([*command, "--budget", "10GB", "-o", str(path)]) == 0
        plan = Plan.load(path)
        assert plan.loss == 0 and {form for row in plan.forms for form in row} == {"tq1_0"}


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_without_steps_it_is_the_dense_model(model_type: str, tmp_path: Path) -> None:
    source = make_tiny_dense(tmp_path / "dense", model_type, width=256, head_dim=64)
    arguments = ["upcycle", str(source), "--ternary", "--steps", "0", "-o", str(tmp_path / "moe")]
    assert run(arguments) == 0
    np.testing.assert_array_equal(logits(tmp_path / "moe"), logits(source))
    assert (tmp_path / "moe/tokenizer.json").exists()


def test_without_steps_no_text_is_recorded(dense: Path, tmp_path: Path) -> None:
    record = upcycle(dense, ["nosuch.txt"], tmp_path / "moe", settings=UpcycleSettings(steps=0))
    assert (record.data, record.losses) == ([], [])
    card = (tmp_path / "moe/README.md").read_text()
    assert "4 full-precision routed experts per layer add nothing yet, top-1." in card
    assert "learned" not in card and LOG_NAME not in card
    assert "`upcycle.json` has the settings.\n" in card
    assert not (tmp_path / "moe" / LOG_NAME).exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"is_ternary": False},
        {"has_int8_activations": True},
        {"trains_shared": True},
        {"kl_weight": 0.5},
    ],
)
def test_every_way_of_training_learns(
    changes: dict[str, Any], dense: Path, text: str, tmp_path: Path
) -> None:
    record = make(dense, text, tmp_path / "moe", FEW.model_copy(update=changes))
    first, kept = record.row(0), record.row(record.kept_step)
    assert first and kept and kept.heldout_lm_loss < first.heldout_lm_loss - 0.5
    if "kl_weight" in changes:
        assert first.heldout_divergence == pytest.approx(0, abs=1e-4)  # it is the dense model
        assert kept.heldout_divergence > 0
    checkpoint, original = Checkpoint(tmp_path / "moe"), open_dense(dense)
    shared = checkpoint.read("model.layers.0.mlp.shared_expert.down_proj.weight") / 2
    is_same = np.array_equal(shared, original.ffn(0)[2].read())
    assert is_same != ("trains_shared" in changes)


def test_glm_learns_as_well(text: str, tmp_path: Path) -> None:
    source = make_tiny_dense(
        tmp_path / "dense", "qwen3", width=256, head_dim=64, tie_word_embeddings=True
    )
    licence = "---\nlicense: mit\n---\n# dense\n"
    (source / "README.md").write_text(licence)
    record = make(source, text, tmp_path / "moe")
    first, kept = record.row(0), record.row(record.kept_step)
    assert record.architecture == "Glm4MoeForCausalLM"
    card = (tmp_path / "moe/README.md").read_text()
    assert card.startswith('---\nbase_model: "dense"\nlicense: mit\n')
    assert first and kept and kept.heldout_lm_loss < first.heldout_lm_loss - 0.5


def test_the_log_has_every_step_and_judgement(ternary: tuple[Path, UpcycleRecord]) -> None:
    output, record = ternary
    lines = [json.loads(line) for line in (output / LOG_NAME).read_text().splitlines()]
    assert [line["step"] for line in lines if "lm_loss" in line] == list(range(1, 13))
    judged = [line for line in lines if "heldout_loss" in line]
    assert [line["step"] for line in judged] == [row.step for row in record.losses]
    assert all(line["penalty"] > 0 for line in lines if "lm_loss" in line)


def test_a_log_forgets_what_a_killed_run_wrote_too_much(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = LossLog(path)
    for step in (1, 2, 3):
        log.add(step=step, loss=1.0)
    with path.open("a") as handle:
        handle.write('{"step": 4, "lo')
    log.keep_until(2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def student(dense: Path, chosen: UpcycleSettings) -> Student:
    model = open_dense(dense)
    shape = MoeShape(4, 2, model.config.ffn_width, model.config.ffn_width)
    return Student(model, choose_target(model.config), shape, chosen)


def gradients(dense: Path, chosen: UpcycleSettings) -> dict[str, Tensor]:
    found = student(dense, chosen)
    for layer_id in (0, 1):  # a branch that is open, so that everything has a gradient
        torch.nn.init.constant_(found.experts(layer_id).matrix("down_proj").scale, 0.05)
    found.begin()
    values, balance = found.run(IDS)
    torch.autograd.backward(values.square().mean() + balance)
    found.end()
    return {name: value.grad for name, value in found.parameters.items() if value.grad is not None}


@pytest.mark.parametrize("is_ternary", [True, False])
def test_untrained_layers_are_what_training_starts_from(dense: Path, is_ternary: bool) -> None:
    chosen = FEW.model_copy(update={"is_ternary": is_ternary})
    model, shape = open_dense(dense), MoeShape(4, 2, 256, 256)
    started = trained_layers(student(dense, chosen), model, shape, chosen)
    for one, other in zip(started, untrained_layers(model, shape, chosen), strict=True):
        np.testing.assert_array_equal(one.router.read(), other.router.read())
        for left, right in zip(one.experts, other.experts, strict=True):
            for a, b in zip(left, right, strict=True):
                assert a.entry == b.entry
                np.testing.assert_array_equal(a.read(), b.read())


@pytest.mark.parametrize(("is_ternary", "stored"), [(True, "F16"), (False, "F32")])
def test_experts_are_stored_as_the_dense_layer_is(
    is_ternary: bool, stored: str, text: str, tmp_path: Path
) -> None:
    """Not as the embedding, which GGUF files keep in F16 beside packed layers."""
    source = make_tiny_dense(tmp_path / "dense", "llama", width=256, dtype="float32")
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].half()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for steps in (0, 1):
        chosen = UpcycleSettings(steps=steps, batch_windows=1, is_ternary=is_ternary)
        record = make(source, text, tmp_path / f"moe{steps}", chosen)
        checkpoint = Checkpoint(tmp_path / f"moe{steps}")
        experts = [info for name, info in checkpoint.tensors.items() if ".experts." in name]
        assert {info.dtype for info in experts} == {stored}
        assert record.routed_bytes == sum(info.num_bytes for info in experts)
        assert checkpoint.spec.dtype == "float32"


def test_checkpointing_changes_no_gradient(dense: Path) -> None:
    kept = gradients(dense, FEW)
    again = gradients(dense, FEW.model_copy(update={"is_checkpointing": True}))
    assert kept.keys() == again.keys()
    assert len(kept) == 2 * 7
    for name, value in kept.items():
        assert value.any(), name
        torch.testing.assert_close(again[name], value, msg=name)


@contextmanager
def stopping_at(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The rename onto `name` that has this number is not reached."""
    replace_file, renames = os.replace, itertools.count()

    def stopping(source: Any, target: Any) -> None:
        if Path(target).name == name and next(renames) == count:
            raise KeyboardInterrupt
        replace_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        yield


def test_a_killed_run_ends_where_an_unbroken_one_ends(
    dense: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learn, "_SAVE_SECONDS", 0.0)
    chosen = FEW.model_copy(update={"steps": 6, "kl_weight": 0.1})
    make(dense, text, tmp_path / "whole", chosen)
    for name, count in (
        ("000016.safetensors", 0),  # what the dense model predicts
        ("training.safetensors", 0),  # nothing was saved
        ("training.safetensors", 1),  # the second state is lost
        ("config.json", 0),
        ("README.md", 0),
    ):
        with stopping_at(name, count, monkeypatch), pytest.raises(KeyboardInterrupt):
            make(dense, text, tmp_path / "broken", chosen)
    make(dense, text, tmp_path / "broken", chosen)
    whole, broken = tree(tmp_path / "whole"), tree(tmp_path / "broken")
    assert whole.keys() == broken.keys()
    assert whole["model.safetensors"] == broken["model.safetensors"]


def test_ctrl_c_keeps_the_steps_that_were_taken(
    dense: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a forward pass of the fifth step, and while the last one is judged; not in an update,
    where weights are half new."""
    chosen = FEW.model_copy(update={"steps": 6, "num_judgements": 1})
    in_fifth_step = make(dense, text, tmp_path / "whole", chosen).num_judging_windows + 4 * 4 + 2
    whole = (tmp_path / "whole/model.safetensors").read_bytes()
    in_second_judgement = in_fifth_step - 2 + 2 * 4 + 1
    learning = TextObjective, "losses"
    for place, call, kept in (
        (learning, in_fifth_step, 4),
        (learning, in_second_judgement, 6),
        ((Student, "end"), 3, 0),
    ):
        left, method = itertools.count(call - 1, -1), getattr(*place)

        def stopping(*given: Any, left: Any = left, method: Any = method) -> Any:
            found = method(*given)
            if next(left) == 0:
                raise KeyboardInterrupt
            return found

        output = tmp_path / f"{place[1]}-{kept}"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place[0], place[1], stopping)
            make(dense, text, output, chosen)
        state = output.with_name(f".{output.name}.building") / "training.safetensors"
        assert state.exists() == bool(kept)
        if kept:
            with safe_open(state, "np") as handle:
                assert handle.metadata()["step"] == str(kept)
        make(dense, text, output, chosen)
        assert (output / "model.safetensors").read_bytes() == whole


def test_a_full_disk_at_the_end_costs_no_training(
    dense: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = FEW.model_copy(update={"steps": 4})
    with monkeypatch.context() as patch, pytest.raises(DiskSpaceError):
        patch.setattr(write_moe, "require_free_disk", failing_with(DiskSpaceError("full")))
        make(dense, text, tmp_path / "moe", chosen)
    asked: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(WindowTraining, "_take_step", failing_with(AssertionError("a step")))
        patch.setattr(learn, "require_free_disk", lambda _, needed, __: asked.append(needed))
        record = make(dense, text, tmp_path / "moe", chosen)
    assert record.losses[-1].step == 4
    assert asked == [record.total_bytes + open_dense(dense).sidecar_bytes + 2**20]


@pytest.mark.parametrize(
    ("width", "group", "form", "target"),
    [(64, 64, "q2_0", "native"), (256, 64, "q2_0", "gguf"), (64, 32, "int2_b32", "onnx")],
)
def test_the_next_command_keeps_what_was_learned(
    width: int,
    group: int,
    form: str,
    target: str,
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Few weights share a scale: what calibrate prefers for rows of 256 would round."""
    dense = str(make_tiny_dense(tmp_path / "dense", "llama", width=width))
    moe = str(tmp_path / "moe")
    options = ["--ternary", "--group", str(group), "--steps", "2", "--data", text, "--seq", "64"]
    assert run(["upcycle", dense, *options, "--max-windows", "8", "-o", moe]) == 0
    told = capsys.readouterr().err.replace("\n", " ")
    command = f"edge-moe calibrate {moe} --task {text} --forms {form} -o stats"
    assert f"next: {command} " in " ".join(told.split()) + " "
    assert ("--target onnx: only that holds int2_b32" in " ".join(told.split())) == (
        target == "onnx"
    )
    stats, plan = tmp_path / "stats", tmp_path / "plan.json"
    assert run([*command.split()[1:-1], str(stats), "--window-tokens", "64"]) == 0
    command = f"plan {moe} --stats {stats} --budget 10GB --no-search -o {plan}"
    assert run([*command.split(), "--target", target]) == 0
    assert {each for row in Plan.load(plan).forms for each in row} == {form}
    if target == "onnx":  # says why there is nothing for it elsewhere
        run(command.split())
        assert "not held by target native, and so not offered: int2_b32" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("is_checkpointing", [True, False])
def test_a_gpu_learns_the_same(
    dense: Path, text: str, tmp_path: Path, is_checkpointing: bool
) -> None:
    changes = {"kl_weight": 0.1, "steps": 8, "is_checkpointing": is_checkpointing}
    chosen, cuda = FEW.model_copy(update=changes), torch.device("cuda")
    whole = make(dense, text, tmp_path / "cpu", chosen)
    other = make(dense, text, tmp_path / "cuda", chosen, device=cuda)
    assert other.provenance.machine.accelerator and not whole.provenance.machine.accelerator
    for one, two in zip(whole.losses, other.losses, strict=True):
        assert two.heldout_loss == pytest.approx(one.heldout_loss, rel=2e-3)
    # trits may tip over where sums are added in another order
    np.testing.assert_allclose(logits(tmp_path / "cuda"), logits(tmp_path / "cpu"), atol=0.1)


def test_the_record_names_the_gpu_that_trained(
    dense: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "edge_moe.converters.upcycle.{}.accelerator_name"
    for module in ("upcycle", "split"):
        monkeypatch.setattr(name.format(module), lambda kind: f"name of {kind}")
    meta, still = torch.device("meta"), FEW.model_copy(update={"steps": 0})
    learned = make(dense, text, tmp_path / "a", FEW.model_copy(update={"steps": 1}))
    added = make(dense, text, tmp_path / "b", still, device=meta)
    parts: dict[str, Any]
    parts = {"num_experts": 4, "top_k": 2, "window_tokens": 64, "max_windows": 4, "device": meta}
    divided = split_dense(dense, [text], tmp_path / "c", **parts)
    for record in (learned, added, divided):  # without steps, the device does nothing
        assert record.provenance.machine.accelerator == "name of cpu"


def test_no_gpu_is_said_before_anything_is_read(
    dense: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    command = ["upcycle", str(dense), "--data", text, "--device", "cuda", "-o", str(tmp_path / "a")]
    for more in ([], ["--split", "--steps", "2"]):
        assert run([*command, *more]) == 2
        assert "torch finds no CUDA GPU: use --device cpu" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_room_for_the_output_is_asked_for_before_training(
    dense: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(learn, "require_free_disk", lambda _, needed, __: asked.append(needed))
    chosen = FEW.model_copy(update={"steps": 1})
    record = make(dense, text, tmp_path / "moe", chosen)
    weights = sum(value.numel() for value in student(dense, chosen).parameters.values())
    sidecar, allowance = open_dense(dense).sidecar_bytes, 2**20
    assert asked == [state_bytes(weights) + record.total_bytes + sidecar + allowance]
    files = (tmp_path / "moe").glob("*.safetensors")
    assert sum(path.stat().st_size for path in files) == record.total_bytes


def failing_with(error: Exception) -> Callable[..., Any]:
    def fail(*given: Any, **options: Any) -> Any:
        raise error

    return fail


def test_the_bill_grows_with_what_is_trained(dense: Path) -> None:
    model = open_dense(dense)
    shape = MoeShape(4, 1, 256, 256)

    def terms(**changes: Any) -> dict[str, int]:
        found = student_terms(model, shape, FEW.model_copy(update=changes), 64)
        return {term.name: term.num_bytes for term in found}

    ffn = 2 * 3 * 256 * 256
    assert terms()["trained"] == 4 * 6 * 4 * (ffn + 2 * (3 * 256 + 256)) * 13 // 12
    assert terms(trains_shared=True)["trained"] - terms()["trained"] == 4 * 4 * ffn * 13 // 12
    assert terms(is_checkpointing=True)["activations"] < terms()["activations"]


@pytest.mark.slow
def test_peak_memory_stays_below_what_was_stated(text: str, tmp_path: Path) -> None:
    source = make_tiny_dense(
        tmp_path / "dense", "llama", width=512, num_hidden_layers=6, intermediate_size=1024
    )
    code = (
        "import sys; from pathlib import Path; import transformers, torch;"
        "from edge_moe.converters.upcycle.upcycle import *;"
        "from edge_moe.runtime.memory import peak_memory_bytes, resident_memory_bytes;"
        "start = resident_memory_bytes(); source, out = map(Path, sys.argv[2:]);"
        "upcycle(source, [sys.argv[1]], out, max_windows=8, window_tokens=256,"
        "settings=UpcycleSettings(steps=2, is_ternary=True));"
        "print(peak_memory_bytes() - start)"
    )
    arguments = [text, str(source), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parent.parent,
    )
    record = UpcycleRecord.model_validate_json((tmp_path / "out/upcycle.json").read_bytes())
    stated, peak = sum(term.num_bytes for term in record.memory_terms), int(done.stdout)
    assert peak < stated < 3 * peak


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("kind", [UpcycleSettings, DistilSettings, TrainSettings])
def test_whatever_is_trained_has_numbers_and_a_loss(kind: type[WindowSettings]) -> None:
    def said(**values: Any) -> str:
        with pytest.raises(InputError) as caught:
            checked_settings(kind, **values)
        return str(caught.value)

    assert "--lr is inf: Input should be a finite number" in said(learning_rate=math.inf)
    assert "--clip-norm is nan: Input should be a finite number" in said(clip_norm=math.nan)
    assert "--seed is -1: Input should be greater than or equal to 0" in said(seed=-1)
    assert "--seed is 4294967296: " in said(seed=2**32)
    assert "--batch is 0: Input should be greater than 0" in said(batch_windows=0)
    assert said(steps=1, kl_weight=0, lm_weight=0).endswith("nothing to learn from: raise one")
    assert checked_settings(kind, steps=1, kl_weight=0, lm_weight=0.5).lm_weight == 0.5


@pytest.mark.parametrize(
    ("sizes", "group", "message"),
    [
        (
            (576, 1536),
            256,
            r"rows of 576 .* and 1536 .* use --group 64, which packs as q2_0 \(2.25",
        ),
        ((96, 256), 256, r"use --group 32, which packs as int2_b32"),
        ((100, 256), 256, r"no block of 256, 64, 32 divides both: leave --ternary away"),
        ((256, 256), 40, r"--group is 40, and no ternary form"),
    ],
)
def test_rows_that_no_ternary_block_fits(sizes: tuple[int, int], group: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        require_rows(*sizes, group)
    require_rows(512, 256, 256)
    require_rows(576, 1536, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ternary"], "use --group 64"),
        (["--steps", "5"], "no text is given"),
        (
            ["--experts", "1025", "--steps", "0"],
            "1024 per layer: lower it so that the folder",
        ),
        (["--top-k", "5", "--steps", "0"], "top_k is 5 of 4 experts"),
        (["--lr", "0"], "--lr is 0.0: Input should be greater than 0"),
        (
            ["--steps", "0", "--data", "nosuch.txt", "--lr", "1", "--lm-weight", "1"],
            "--steps 0 learns nothing: leave out --data, --lr, --lm-weight, or raise --steps",
        ),
        (["--steps", "0", "--train", "all-moe"], "leave out --train, or raise"),
        (["--steps", "0", "--group", "64"], "--group is about the scales of ternary experts: add"),
        (["--group", "64"], "add --ternary"),
        (["--lr", "inf"], "--lr is inf: Input should be a finite number"),
        (["--kl-weight", "inf"], "--kl-weight is inf: Input should be a finite number"),
        (["--balance-weight", "nan"], "--balance-weight is nan: Input should be a finite number"),
        (["--lm-weight", "0"], "--kl-weight and --lm-weight are both 0, which leaves nothing to"),
        (["--split", "--steps", "1", "--data", "code", "--lr", "0"], "--lr is 0.0: Input should"),
        (["--data", "nosuch.txt"], "neither a shipped task"),
    ],
)
def test_bad_options_are_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_tiny_dense(tmp_path / "dense", "llama")
    assert run(["upcycle", str(source), *arguments, "-o", str(tmp_path / "moe")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "moe").exists()


def test_a_mixture_of_experts_is_no_dense_model(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["upcycle", str(demo_model), "-o", str(tmp_path / "moe")]) == 2
    assert "is a mixture of experts already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("num_tokens", "message"),
    [("4096", "use a smaller --seq"), ("500", "use a smaller --seq or more text")],
)
def test_windows_that_do_not_fit_name_the_option(
    num_tokens: str, message: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    asked = ["upcycle", str(dense), "--data", str(tmp_path / "short.txt"), "--seq", num_tokens]
    assert run([*asked, "-o", str(tmp_path / "moe")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_changed_source_does_not_go_on_with_old_state(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learn, "_SAVE_SECONDS", 0.0)
    source = make_tiny_dense(tmp_path / "dense", "llama", width=256)
    chosen = FEW.model_copy(update={"steps": 4})
    with stopping_at("config.json", 0, monkeypatch), pytest.raises(KeyboardInterrupt):
        make(source, text, tmp_path / "moe", chosen)
    edit_config(source, rms_norm_eps=1e-3)
    with pytest.raises(InputError, match="unfinished build of another"):
        make(source, text, tmp_path / "moe", chosen)
