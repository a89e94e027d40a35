"""Costs and neuron scores against second implementations; shards, kills, files, memory."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyCheckpoint, make_tiny_checkpoint
from peak_memory import deep_checkpoint, measure_peak, needs_proc
from stopped_runs import stopping_at_rename
from test_gradient_stream import gradient_info
from torch import Tensor, nn
from whole_model import WholeModel

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.calibrate import calibrate
from edge_moe.converters.gradient_loss import measure_gradients, neuron_squares, token_costs
from edge_moe.converters.gradient_memory import gradient_terms
from edge_moe.converters.loss_head import LossHead
from edge_moe.errors import DiskSpaceError, InputError, StatsError
from edge_moe.formats import pack_expert, unpack_expert
from edge_moe.gradient_stats import FormCost, GradientStats
from edge_moe.stats import ExpertStats

TEXT = "def f(x):\n    return x + 1\n\nIt was the best of times, it was the worst of times.\n" * 2
WINDOW_TOKENS = 48
FORMS = ("drop", "q8_0", "q4_0")
DIRECT: dict[FormCost, Callable[[Tensor, Tensor], Tensor]] = {
    FormCost.OUTPUT_CHANGE: lambda _, dz: dz.square().sum(),
    FormCost.DIAGONAL: lambda g, dz: ((g * dz) ** 2).sum(),
    FormCost.FIRST_ORDER: lambda g, dz: torch.einsum("th,th->t", g, dz).square().sum(),
}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("task") / "mine.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(scope="module")
def no_groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 without a group limit, so that the next-best expert is well defined."""
    folder = tmp_path_factory.mktemp("no-groups")
    return make_tiny_checkpoint(folder, "deepseek_v3", n_group=1, topk_group=1, seed=3)


@pytest.fixture(scope="module")
def measured(
    tiny_checkpoint: TinyCheckpoint,
    no_groups: Path,
    task: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[GradientStats, WholeModel]]:
    """`measured(family)`: streamed statistics and the whole model."""

    @cache
    def measure(family: str) -> tuple[GradientStats, WholeModel]:
        folder = no_groups if family == "no_groups" else tiny_checkpoint(family)
        output = tmp_path_factory.mktemp(family) / "out"
        return run(folder, task, output), WholeModel(folder, task, WINDOW_TOKENS)

    return measure


def run(model: Path, task: str, output: Path, **options: Any) -> GradientStats:
    arguments: dict[str, Any] = {
        "window_tokens": WINDOW_TOKENS,
        "forms": FORMS,
        "quantiser": "nearest",
    } | options
    return measure_gradients(model, [task], output, **arguments)


def assert_same(left: GradientStats, right: GradientStats) -> None:
    assert left.info == right.info
    others = right.to_arrays()
    for name, array in left.to_arrays().items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)


def seen(whole: WholeModel, layer_id: int) -> dict[str, Tensor]:
    """What the block of `layer_id` saw, over all windows."""
    parts = [whole.gradients(window)[1][layer_id] for window in whole.windows]
    return {
        name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "output"
    }


def packed_weights(
    whole: WholeModel, layer_id: int, expert_id: int, form: str
) -> tuple[Tensor, Tensor]:
    """The stacked weights of the layer's experts, one of which went through `form`."""
    experts = whole.block(layer_id).experts
    gate_up, down = experts.gate_up_proj.detach().clone(), experts.down_proj.detach().clone()
    spec = whole.spec
    gate, up = gate_up[expert_id].numpy().reshape(2, spec.expert_width, -1)
    packed = pack_expert(form, gate, up, down[expert_id].numpy())
    parts = unpack_expert(form, packed, *spec.expert_shape)
    gate_up[expert_id] = torch.from_numpy(np.concatenate(parts[:2]))
    down[expert_id] = torch.from_numpy(parts[2])
    return gate_up, down


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "no_groups"])
@pytest.mark.parametrize("form", FORMS)
def test_costs_are_those_of_a_changed_layer(
    family: str, form: str, measured: Callable[[str], tuple[GradientStats, WholeModel]]
) -> None:
    stats, whole = measured(family)
    row, layer_id = len(stats.info.moe_layer_ids) - 1, stats.info.moe_layer_ids[-1]
    known = seen(whole, layer_id)
    gradient, inputs = known["gradient"].double(), known["inputs"][None]
    block = whole.block(layer_id)
    for expert_id in range(0, whole.spec.num_experts, 3):
        with torch.no_grad():
            before = block(inputs)[0].double()
            if form == "drop":
                after = whole.without(layer_id, expert_id)(inputs)[0].double()
            else:
                after = output_with(block, inputs, packed_weights(whole, layer_id, expert_id, form))
        routed = (known["expert_ids"] == expert_id).any(dim=1)
        change = (after - before)[routed]
        for kind, direct in DIRECT.items():
            found = stats.cost_table((form,), "bf16", kind)[row, expert_id, 0]
            wanted = float(direct(gradient[routed], change))
            np.testing.assert_allclose(found, wanted, rtol=5e-3, atol=1e-12)
            assert found > 0 or not routed.any()


def output_with(block: Any, inputs: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """[T, H] float64 of `block` with other expert weights."""
    experts = block.experts
    old = experts.gate_up_proj, experts.down_proj
    experts.gate_up_proj, experts.down_proj = (nn.Parameter(each) for each in weights)
    try:
        output: Tensor = block(inputs)[0].double()
    finally:
        experts.gate_up_proj, experts.down_proj = old
    return output


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_neuron_scores_are_heapr_as_written(
    family: str, measured: Callable[[str], tuple[GradientStats, WholeModel]]
) -> None:
    """With the matrix G of every expert in full."""
    stats, whole = measured(family)
    scores = stats.neuron_scores()
    assert scores.shape == (2, 8, whole.spec.expert_width)
    known = seen(whole, 1)
    experts = whole.block(1).experts
    for expert_id in range(8):
        token, slot = (known["expert_ids"] == expert_id).nonzero(as_tuple=True)
        assert stats.routed_tokens[1, expert_id] == len(token)
        if not len(token):
            assert (scores[1, expert_id] == -1).all()
            continue
        with torch.no_grad():
            gate, up = (known["inputs"][token] @ experts.gate_up_proj[expert_id].T).chunk(2, dim=1)
            hidden = (nn.functional.silu(gate) * up).double()
            own = known["gates"][token, slot][:, None].double() * known["gradient"][token].double()
            gram = own.T @ own / len(token)
            down = experts.down_proj[expert_id].double()
            wanted = hidden.square().mean(0) * torch.diag(down.T @ gram @ down) / 2
        np.testing.assert_allclose(scores[1, expert_id], wanted, rtol=2e-3, atol=1e-15)


def test_neuron_score_is_the_second_order_of_a_quadratic_loss() -> None:
    """loss = (c . z)**2 / 2: gradient c (c . z), Hessian c c^T, which is g g^T at c . z = 1."""
    draw = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(1, 6, 4, generator=draw), torch.randn(1, 4, 3, generator=draw)

    def apply_gate(both: Tensor) -> Tensor:
        first, second = both.chunk(2, dim=-1)
        return nn.functional.silu(first) * second

    experts = SimpleNamespace(
        gate_up_proj=gate_up,
        down_proj=down,
        _apply_gate=apply_gate,
        is_concatenated=True,
        has_bias=False,
        has_gate=True,
    )
    inputs = torch.randn(1, 4, generator=draw)
    hidden = apply_gate(inputs @ gate_up[0].T)[0]
    output = down[0] @ hidden
    slope = torch.randn(4, generator=draw)
    slope = (slope / (slope @ output)).double()
    squares, along = neuron_squares(experts, 0, inputs, slope[None].float())
    for neuron in range(3):
        change = -(hidden[neuron] * down[0, :, neuron]).double()
        exact = (slope @ (output.double() + change)) ** 2 / 2 - 0.5
        second_order = exact - slope @ change
        score = squares[0, neuron] * along[0, neuron] / 2
        torch.testing.assert_close(score, second_order, rtol=1e-4, atol=1e-6)


def test_costs_of_one_token_by_hand() -> None:
    gradient, change = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[3.0, -1.0]]).double()
    costs = {kind: float(cost[0]) for kind, cost in token_costs(gradient, change).items()}
    assert costs == {
        FormCost.OUTPUT_CHANGE: 9 + 1,
        FormCost.DIAGONAL: 9 + 4,
        FormCost.FIRST_ORDER: 1,
    }


def test_layer_weight_and_loss(
    measured: Callable[[str], tuple[GradientStats, WholeModel]],
) -> None:
    stats, whole = measured("qwen3_moe")
    for row, layer_id in enumerate(stats.info.moe_layer_ids):
        mean = seen(whole, layer_id)["gradient"].double().square().mean()
        np.testing.assert_allclose(stats.layer_weight()[row], mean, rtol=1e-3)
    loss_nats = sum(whole.gradients(window)[0] for window in whole.windows)
    np.testing.assert_allclose(stats.loss_nats.values(), [loss_nats], rtol=1e-5)
    assert stats.info.num_predictions == sum(len(window) - 1 for window in whole.windows)


def test_shards_in_any_order_are_one_run(
    tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint("deepseek_v3")
    for labels in ("text", "sampled"):
        whole = run(folder, task, tmp_path / labels, labels=labels)
        assert_same(GradientStats.load(tmp_path / labels), whole)
        shards = [
            run(folder, task, tmp_path / f"{labels}-{index}", labels=labels, shard=(index, 3))
            for index in range(3)
        ]
        for first, second, third in itertools.permutations(shards):
            assert_same(first.merge(second).merge(third), whole)
    with pytest.raises(StatsError, match="cannot merge: labels is"):
        shards[0].merge(run(folder, task, tmp_path / "other", shard=(1, 3)))
    with pytest.raises(StatsError, match="window 0 is in both"):
        shards[0].merge(shards[0])


@pytest.mark.slow
def test_a_run_stopped_anywhere_goes_on_to_the_same_bits(
    tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint("deepseek_v3")
    whole = run(folder, task, tmp_path / "whole", max_windows=2)
    for stop in itertools.count():
        output = tmp_path / f"stopped-{stop}"
        try:
            with stopping_at_rename(stop, monkeypatch):
                run(folder, task, output, max_windows=2)
            break
        except KeyboardInterrupt:
            assert_same(run(folder, task, output, max_windows=2), whole)
            assert sorted(os.listdir(output)) == ["gradient.json", "gradient.safetensors"]
    # settings, 4 hidden states, loss and its gradient, 2 MoE layers back, 2 results; the dense
    # first layer is not run backwards
    assert stop == 1 + 4 + 2 + 2 * 2 + 2


def test_states_that_are_done_are_removed(
    tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = tiny_checkpoint("deepseek_v3"), tmp_path / "out"
    most = []

    def watched(stats: GradientStats, *_: Any) -> None:
        most.append(sorted(path.name[:-12] for path in (output / "gradient_work").glob("[hg]*_*")))

    monkeypatch.setattr("edge_moe.converters.gradient_loss._add_drops", watched)
    run(folder, task, output, max_windows=1)
    states = ["gradient_0003", "hidden_0000", "hidden_0001", "hidden_0002"]
    assert most == [states, ["gradient_0002", *states[1:3]]]


def test_the_folder_of_a_calibration_holds_both(
    tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path
) -> None:
    folder, output = tiny_checkpoint("olmoe"), tmp_path / "stats"
    calibrate(folder, [task], output, window_tokens=WINDOW_TOKENS, forms=FORMS, quantiser="nearest")
    stats = run(folder, task, output)
    assert ExpertStats.load(output).info.data_fingerprint == stats.info.data_fingerprint
    np.testing.assert_array_equal(ExpertStats.load(output).routed_tokens, stats.routed_tokens)
    with pytest.raises(InputError, match="already holds finished gradient statistics"):
        run(folder, task, output)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="already exists"):
        run(folder, task, foreign)


def test_damaged_and_missing_files_are_named(
    measured: Callable[[str], tuple[GradientStats, WholeModel]], tmp_path: Path
) -> None:
    stats, _ = measured("qwen3_moe")
    with pytest.raises(StatsError, match="no gradient.json"):
        GradientStats.load(tmp_path)
    stats.save(tmp_path)
    path = tmp_path / "gradient.json"
    fields = json.loads(path.read_text())
    for change, message in [
        ({"version": 99}, "has version 99"),
        ({"labels": "guessed"}, "is damaged"),
        ({"expert_width": 65}, "'neuron.hidden_square' is missing or misshapen"),
    ]:
        path.write_text(json.dumps(fields | change))
        with pytest.raises(StatsError, match=message):
            GradientStats.load(tmp_path)
    path.write_text(json.dumps(fields))
    (tmp_path / "gradient.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(StatsError, match="is damaged"):
        GradientStats.load(tmp_path)
    with pytest.raises(StatsError, match="no cost for form 'q3_k'"):
        stats.cost_table(("drop", "q3_k"), "bf16", FormCost.DIAGONAL)


def test_too_little_disk_and_another_run_are_refused(
    tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = tiny_checkpoint("qwen3_moe"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=9, used=0, free=9))
        with pytest.raises(DiskSpaceError, match="measuring loss gradients needs"):
            run(folder, task, output)
    assert not output.exists()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("edge_moe.converters.gradient_loss._add_drops", stop)
        with pytest.raises(KeyboardInterrupt):
            run(folder, task, output)
    with pytest.raises(InputError, match="cannot resume: labels is 'text'"):
        run(folder, task, output, labels="sampled")
    run(folder, task, output)


def test_sampled_labels_have_a_gradient_of_mean_zero(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Under the model's own prediction the score has mean zero; under the text's it has not."""
    checkpoint = Checkpoint(tiny_checkpoint("qwen3_moe"))
    hidden = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(1))
    norm = nn.Identity()
    draws = 400
    head = LossHead(checkpoint, norm, "sampled")
    found = torch.stack([head.gradient(hidden, [1, 2, 3], seed)[0][0] for seed in range(draws)])
    error = found.std(dim=0) / draws**0.5
    assert (found[:, 2] == 0).all()  # nothing follows the last token
    assert ((found.mean(dim=0) / error.clamp(min=1e-9))[:2].abs() < 5).all()
    of_text, loss = LossHead(checkpoint, norm, "text").gradient(hidden, [1, 2, 3], 0)
    assert ((of_text[0] / error.clamp(min=1e-9))[:2].abs() > 5).any()
    logits = hidden[0, :2] @ torch.from_numpy(checkpoint.read("lm_head.weight")).T
    wanted = nn.functional.cross_entropy(logits, torch.tensor([2, 3]), reduction="sum")
    assert loss == pytest.approx(float(wanted), rel=1e-5)
    again = head.gradient(hidden, [1, 2, 3], 7)[0][0]
    assert torch.equal(again, found[7])


def test_tied_output_matrix_and_chunks(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", "qwen3_moe", tie_word_embeddings=True)
    whole = WholeModel(folder, task, WINDOW_TOKENS)
    monkeypatch.setattr("edge_moe.converters.gradient_memory.CHUNK_LOGITS", 7 * 320)
    stats = run(folder, task, tmp_path / "out")
    wanted = [seen(whole, layer)["gradient"].double().square().mean() for layer in (0, 1)]
    np.testing.assert_allclose(stats.layer_weight(), wanted, rtol=1e-3)


def test_scores_of_experts_without_tokens(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("olmoe"))
    stats = GradientStats.zeros(gradient_info(checkpoint, [[1, 2, 3]]))
    stats.routed_tokens[0, 3] = 2
    stats.neuron["hidden_square"].add(8.0, index=(0, 3, 1))
    stats.neuron["gradient_square"].add(6.0, index=(0, 3, 1))
    scores = stats.neuron_scores()
    assert scores[0, 3, 1] == 4 * 3 / 2
    assert scores[0, 3, 0] == 0
    scores[0, 3] = -1
    assert (scores == -1).all()


IMPORTS = """
import sys
from pathlib import Path
from edge_moe.converters.gradient_loss import measure_gradients
"""
MEASURED = """
model, task, output = sys.argv[1:]
measure_gradients(Path(model), [task], Path(output), window_tokens=128, forms=["q8_0"])
"""


@pytest.mark.slow
@needs_proc
def test_memory_holds_one_layer(task: str, tmp_path: Path) -> None:
    folder = deep_checkpoint(tmp_path / "model")
    checkpoint = Checkpoint(folder)
    whole_bytes = 2 * sum(info.num_bytes for info in checkpoint.tensors.values())  # as float32
    output = tmp_path / "out"
    peak = measure_peak(IMPORTS, MEASURED, folder, task, output)
    terms = gradient_terms(checkpoint, GradientStats.load(output).info.num_tokens, 128)
    bound_bytes = sum(term.num_bytes for term in terms)
    assert peak.grown_bytes <= bound_bytes < 0.6 * whole_bytes
