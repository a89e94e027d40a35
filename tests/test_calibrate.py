"""Calibration against transformers itself: routing, drop and form losses, shards, kills."""

from __future__ import annotations

import copy
import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILY_NAMES, TinyCheckpoint, make_tiny_checkpoint
from peak_memory import deep_checkpoint, measure_peak, needs_proc
from safetensors.numpy import save_file
from stopped_runs import stopping_at_rename
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters import calibration_memory
from edge_moe.converters.calibrate import calibrate
from edge_moe.converters.calibration_memory import calibration_peak_bytes
from edge_moe.converters.calibration_work import CalibrationWork
from edge_moe.converters.form_loss import round_trip
from edge_moe.converters.staging import locked
from edge_moe.errors import (
    BudgetError,
    CheckpointError,
    DiskSpaceError,
    EdgeMoeError,
    FormError,
    InputError,
)
from edge_moe.formats import pack_expert, unpack_expert
from edge_moe.moments import load_moments, merge_moments, moments_path
from edge_moe.stats import ExpertStats
from edge_moe.tasks import task_windows

TEXT = "def f(x):\n    return x + 1\n\nIt was the best of times, it was the worst of times.\n" * 3
FORMS = ("q8_0", "q4_0", "bf16")
WINDOW_TOKENS = 32


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("task") / "mine.txt"
    path.write_text(TEXT)
    return str(path)


def run(model: Path, task: str, output: Path, **options: Any) -> ExpertStats:
    arguments: dict[str, Any] = {
        "window_tokens": WINDOW_TOKENS,
        "forms": FORMS,
        "quantiser": "nearest",
    } | options
    return calibrate(model, [task], output, **arguments)


def assert_same(left: ExpertStats, right: ExpertStats) -> None:
    assert left.info == right.info
    others = right.to_arrays()
    for name, array in left.to_arrays().items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)


class Reference:
    """The whole model in transformers, and what every MoE block of it was given."""

    def __init__(self, folder: Path, task: str) -> None:
        self.spec = Checkpoint(folder).spec
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager"
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.windows = task_windows([task], "calibration", tokenizer, WINDOW_TOKENS)
        self.inputs = {layer_id: self._block_inputs(layer_id) for layer_id in self.layer_ids}

    @property
    def layer_ids(self) -> tuple[int, ...]:
        return self.spec.moe_layer_ids

    def block(self, layer_id: int) -> Any:
        return self.model.get_submodule(self.spec.moe_module(layer_id))

    def _block_inputs(self, layer_id: int) -> Tensor:
        """[1, tokens, H] over all windows."""
        return torch.cat(self.record(self.block(layer_id), lambda inputs, _: inputs[0]), dim=1)

    def record(self, module: nn.Module, pick: Callable[[Any, Any], Any]) -> list[Any]:
        """`pick(arguments, output)` of `module` for every window."""
        seen: list[Any] = []
        hook = module.register_forward_hook(
            lambda _, inputs, output: seen.append(pick(inputs, output))
        )
        with torch.no_grad():
            for window in self.windows:
                self.model(torch.tensor([window]), use_cache=False)
        hook.remove()
        return seen

    def routing(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """(expert ids, weights) as the experts module was given them, [tokens, k] each."""
        experts = self.block(layer_id).experts
        calls = self.record(experts, lambda inputs, _: inputs[1:3])
        return torch.cat([ids for ids, _ in calls]), torch.cat([weights for _, weights in calls])

    def router(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """(raw logits, scores), [tokens, E] float64 each."""
        weight = self.block(layer_id).gate.weight.detach().double()
        logits = self.inputs[layer_id][0].double() @ weight.T
        is_sigmoid = self.spec.router.score_function == "sigmoid"
        return logits, logits.sigmoid() if is_sigmoid else logits.softmax(dim=1)

    def shifts(self, layer_id: int) -> Tensor:
        """[tokens] 1 - cos(h, h + m) of the residual stream around the MoE block."""
        layer = self.model.model.layers[layer_id]
        norm = layer.post_attention_layernorm
        before = torch.cat(self.record(norm, lambda inputs, _: inputs[0]), dim=1)[0].double()
        after = before + self.outputs(self.block(layer_id), layer_id)
        cosine: Tensor = (before * after).sum(1) / (before.norm(dim=1) * after.norm(dim=1))
        return 1 - cosine

    def outputs(self, block: Any, layer_id: int) -> Tensor:
        """[tokens, H] float64 of `block` on the inputs of layer `layer_id`."""
        with torch.no_grad():
            output: Tensor = block(self.inputs[layer_id])[0].double()
        return output

    def without(self, layer_id: int, expert_id: int) -> Any:
        """The block of layer `layer_id` with one expert and its router row sliced away."""
        block = copy.deepcopy(self.block(layer_id))
        kept = [other for other in range(self.spec.num_experts) if other != expert_id]
        for module, name in [
            (block.gate, "weight"),
            (block.experts, "gate_up_proj"),
            (block.experts, "down_proj"),
        ]:
            setattr(module, name, nn.Parameter(getattr(module, name)[kept]))
        if hasattr(block.gate, "e_score_correction_bias"):
            block.gate.e_score_correction_bias = block.gate.e_score_correction_bias[kept]
        block.gate.num_experts = block.experts.num_experts = len(kept)
        return block


@pytest.fixture(scope="module")
def no_groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 without a group limit, so that the next-best expert is well defined."""
    folder = tmp_path_factory.mktemp("no-groups")
    return make_tiny_checkpoint(folder, "deepseek_v3", n_group=1, topk_group=1, seed=3)


@pytest.fixture(params=(*FAMILY_NAMES, "no_groups"))
def folder(request: pytest.FixtureRequest, tiny_checkpoint: TinyCheckpoint) -> Path:
    if request.param == "no_groups":
        found: Path = request.getfixturevalue("no_groups")
        return found
    return tiny_checkpoint(request.param)


def test_sums_are_those_of_the_whole_model(folder: Path, task: str, tmp_path: Path) -> None:
    stats = run(folder, task, tmp_path / "stats")
    reference = Reference(folder, task)
    spec = reference.spec
    assert stats.info.num_tokens == sum(map(len, reference.windows))
    for row, layer_id in enumerate(spec.moe_layer_ids):
        block, inputs = reference.block(layer_id), reference.inputs[layer_id][0]
        ids, weights = reference.routing(layer_id)
        logits, scores = reference.router(layer_id)
        shifts = reference.shifts(layer_id)
        for expert_id in range(spec.num_experts):
            token, slot = (ids == expert_id).nonzero(as_tuple=True)
            with torch.no_grad():
                output = single_expert(block.experts, expert_id, inputs[token])
            gates, norms = weights[token, slot].double(), output.double().norm(dim=1)
            found = {name: total.values() for name, total in stats.expert_sums.items()}
            assert stats.routed_tokens[row, expert_id] == len(token)
            close = partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-9)
            close(found["gate"][row, expert_id], gates.sum())
            close(found["output_norm"][row, expert_id], norms.sum())
            close(found["gated_norm"][row, expert_id], (gates * norms).sum())
            close(found["gated_square"][row, expert_id], (gates * norms).square().sum())
            close(found["output_square"][row, expert_id], norms.square().sum())
            close(found["gated_output_square"][row, expert_id], (gates * norms.square()).sum())
            shift, score = shifts[token], scores[token, expert_id]
            np.testing.assert_allclose(
                found["shifted_norm"][row, expert_id], (shift * gates * norms).sum(), rtol=1e-3
            )
            close(found["router_score"][row, expert_id], score.sum())
            is_top = gates == weights[token].double().amax(dim=1)
            close(found["top_score"][row, expert_id], score[is_top].sum())
            is_top = logits.argmax(dim=1) == expert_id
            close(found["top_logit"][row, expert_id], logits[is_top, expert_id].sum())
            check_moments(tmp_path / "stats", reference, layer_id, expert_id, inputs[token])
            if len(token):
                close(stats.max_output[row, expert_id], output.abs().max())
        moe_output = reference.outputs(block, layer_id)
        close(stats.layer_sums["moe_square"].values()[row], moe_output.square().sum())
        layer = reference.model.model.layers[layer_id]
        after = torch.cat(reference.record(layer, lambda _, output: output), dim=1)
        close(stats.layer_sums["residual_square"].values()[row], after.double().square().sum())


def check_moments(
    stats_folder: Path, reference: Reference, layer_id: int, expert_id: int, inputs: Tensor
) -> None:
    moments = load_moments(stats_folder, layer_id, reference.spec)
    input_squares, inner_squares = moments.of_expert(expert_id)
    experts = reference.block(layer_id).experts
    with torch.no_grad():
        gate, up = (inputs @ experts.gate_up_proj[expert_id].T).chunk(2, dim=-1)
    inner = (nn.functional.silu(gate) * up).double()
    np.testing.assert_allclose(input_squares, inputs.double().square().sum(0), rtol=2e-5)
    np.testing.assert_allclose(inner_squares, inner.square().sum(0), rtol=2e-4)  # one float32 token


def single_expert(experts: Any, expert_id: int, inputs: Tensor) -> Tensor:
    gate, up = (inputs @ experts.gate_up_proj[expert_id].T).chunk(2, dim=-1)
    output: Tensor = (nn.functional.silu(gate) * up) @ experts.down_proj[expert_id].T
    return output


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "olmoe", "mixtral", "no_groups"])
def test_drop_loss_is_that_of_a_sliced_layer(
    family: str,
    tiny_checkpoint: TinyCheckpoint,
    no_groups: Path,
    task: str,
    tmp_path: Path,
) -> None:
    folder = no_groups if family == "no_groups" else tiny_checkpoint(family)
    found = run(folder, task, tmp_path / "stats").form_loss.values()[:, :, 0]
    reference = Reference(folder, task)
    for row, layer_id in enumerate(reference.layer_ids):
        whole = reference.outputs(reference.block(layer_id), layer_id)
        ids, _ = reference.routing(layer_id)
        for expert_id in range(reference.spec.num_experts):
            sliced = reference.outputs(reference.without(layer_id, expert_id), layer_id)
            routed = (ids == expert_id).any(dim=1)
            change = (sliced - whole)[routed].square().sum()
            np.testing.assert_allclose(found[row, expert_id], change, rtol=1e-4, atol=1e-9)
            if not reference.spec.router.renormalises or not routed.all():
                assert found[row].max() > 0


def test_form_loss_is_that_of_a_layer_with_one_expert_packed(
    folder: Path, task: str, tmp_path: Path
) -> None:
    forms = (*FORMS, "q4_0/q4_0/q8_0", "q8_0/q8_0/q4_0")
    stats = run(folder, task, tmp_path / "stats", forms=forms)
    assert stats.info.forms == ("drop", *forms)
    found = stats.form_loss.values()
    checkpoint, reference = Checkpoint(folder), Reference(folder, task)
    shape = checkpoint.spec.hidden_size, checkpoint.spec.expert_width
    layer_id = reference.layer_ids[-1]
    whole = reference.outputs(reference.block(layer_id), layer_id)
    for expert_id, form in itertools.product(range(0, checkpoint.spec.num_experts, 3), forms):
        packed = pack_expert(form, *checkpoint.expert(layer_id, expert_id))
        gate, up, down = unpack_expert(form, packed, *shape)
        block = copy.deepcopy(reference.block(layer_id))
        block.experts.gate_up_proj.data[expert_id] = torch.from_numpy(np.concatenate([gate, up]))
        block.experts.down_proj.data[expert_id] = torch.from_numpy(down)
        change = (reference.outputs(block, layer_id) - whole).square().sum()
        loss = found[-1, expert_id, stats.form_index(form)]
        np.testing.assert_allclose(loss, change, rtol=1e-3, atol=1e-8)
    assert not found[:, :, stats.form_index("bf16")].any()  # the checkpoint's own dtype


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("qwen3_moe", {"mlp_only_layers": [1]}),
        ("mixtral", {"sliding_window": 8, "output_router_logits": True}),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ],
)
def test_dense_layers_and_sliding_windows_are_run(
    family: str, config: dict[str, Any], task: str, tmp_path: Path
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", family, num_hidden_layers=3, **config)
    stats = run(folder, task, tmp_path / "stats")
    reference = Reference(folder, task)
    assert stats.info.moe_layer_ids == reference.layer_ids
    after = reference.record(reference.model.model.layers[2], lambda _, output: output)
    found = stats.layer_sums["residual_square"].values()[-1]
    np.testing.assert_allclose(found, torch.cat(after, 1).double().square().sum(), rtol=2e-5)


def test_stacked_experts_give_what_single_ones_give(
    tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path
) -> None:
    folder, stacked = tiny_checkpoint("qwen2_moe"), tmp_path / "stacked"
    shutil.copytree(folder, stacked)
    checkpoint = Checkpoint(folder)
    spec = checkpoint.spec
    tensors = {info.name: checkpoint.read(info.name) for info in checkpoint.dense_tensors}
    for layer_id in spec.moe_layer_ids:
        experts = [checkpoint.expert(layer_id, expert) for expert in range(spec.num_experts)]
        gate_up_name, down_name = spec.fused_tensor_names(layer_id)
        tensors[gate_up_name] = np.stack([np.concatenate(expert[:2]) for expert in experts])
        tensors[down_name] = np.stack([expert[2] for expert in experts])
    save_file(tensors, stacked / "model.safetensors")
    single = run(folder, task, tmp_path / "single", forms=["q8_0"])
    found = run(stacked, task, tmp_path / "found", forms=["q8_0"])
    np.testing.assert_array_equal(found.form_loss.limbs(), single.form_loss.limbs())


def test_packing_by_rows_is_packing_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    whole, pieces = torch.empty_like(weights), torch.empty_like(weights)
    round_trip("q4_0", weights, whole)
    monkeypatch.setattr("edge_moe.converters.form_loss.PACK_CHUNK_WEIGHTS", 3 * 64)
    round_trip("q4_0", weights, pieces)
    assert torch.equal(whole, pieces)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_shards_in_any_order_are_one_run(
    family: str, tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(family)
    whole = run(folder, task, tmp_path / "whole")
    assert len(whole.info.windows) > 3
    shards = [run(folder, task, tmp_path / f"{index}", shard=(index, 3)) for index in range(3)]
    for first, second, third in itertools.permutations(shards):
        assert_same(first.merge(second).merge(third), whole)
    merge_moments([tmp_path / f"{index}" for index in (2, 0, 1)], tmp_path / "all", (1,))
    wanted = moments_path(tmp_path / "whole", 1).read_bytes()
    assert moments_path(tmp_path / "all", 1).read_bytes() == wanted
    assert_same(ExpertStats.load(tmp_path / "whole"), whole)


def test_a_run_stopped_anywhere_goes_on_to_the_same_bits(
    tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint("deepseek_v3")
    whole = run(folder, task, tmp_path / "whole")
    for stop in itertools.count():
        output = tmp_path / f"stopped-{stop}"
        try:
            with stopping_at_rename(stop, monkeypatch):
                run(folder, task, output)
            break
        except KeyboardInterrupt:
            assert_same(run(folder, task, output), whole)
            assert sorted(os.listdir(output)) == ["moments", "stats.json", "stats.safetensors"]
    assert stop == 11  # settings, embeddings, 3 layers with 2 x 2 statistics, 2 results


KILLED = """
import sys
from pathlib import Path
from edge_moe.converters.calibrate import calibrate
model, task, output = sys.argv[1:]
options = {"window_tokens": 32, "forms": ["q8_0", "q4_0", "bf16"], "quantiser": "nearest"}
calibrate(Path(model), [task], Path(output), **options)
"""


@pytest.mark.slow
def test_kill_minus_nine_and_resume(task: str, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", "olmoe", num_hidden_layers=8)
    output = tmp_path / "stats"
    process = subprocess.Popen([sys.executable, "-c", KILLED, folder, task, output])
    while process.poll() is None and not list(output.glob("work/layer_*.safetensors")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (output / "stats.json").exists()
    resumed = run(folder, task, output)
    assert_same(resumed, run(folder, task, tmp_path / "whole"))
    assert sorted(os.listdir(output)) == ["moments", "stats.json", "stats.safetensors"]


IMPORTS = """
import sys
from pathlib import Path
from edge_moe.converters.calibrate import calibrate
"""
MEASURED = """
model, task, output, quantiser = sys.argv[1:]
options = {"window_tokens": 128, "forms": ["q8_0"], "quantiser": quantiser}
calibrate(Path(model), [task], Path(output), **options)
"""


@pytest.mark.slow
@needs_proc
def test_memory_holds_one_layer(task: str, tmp_path: Path) -> None:
    folder = deep_checkpoint(tmp_path / "model")
    checkpoint = Checkpoint(folder)
    whole_bytes = 2 * sum(info.num_bytes for info in checkpoint.tensors.values())  # as float32
    output = tmp_path / "stats"
    peak = measure_peak(IMPORTS, MEASURED, folder, task, output, "nearest")
    num_tokens = ExpertStats.load(output).info.num_tokens
    bound_bytes = calibration_peak_bytes(checkpoint, num_tokens, 128)
    assert peak.grown_bytes <= bound_bytes < 0.5 * whole_bytes


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("quantiser", ["gptq_refit", "gptq_refit_all"])
def test_memory_of_wide_hessians_is_stated(quantiser: str, task: str, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(
        tmp_path / "model",
        "olmoe",
        hidden_size=3072,
        intermediate_size=128,
        num_hidden_layers=1,
        num_experts=2,
    )
    output = tmp_path / "stats"
    peak = measure_peak(IMPORTS, MEASURED, folder, task, output, quantiser)
    num_tokens = ExpertStats.load(output).info.num_tokens
    sizes = Checkpoint(folder), num_tokens, 128
    without = calibration_peak_bytes(*sizes, "nearest")
    assert without < peak.grown_bytes <= calibration_peak_bytes(*sizes, quantiser)


def test_finished_foreign_and_other_outputs_are_refused(
    tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path
) -> None:
    folder, output = tiny_checkpoint("olmoe"), tmp_path / "stats"
    run(folder, task, output)
    with pytest.raises(InputError, match="already holds finished statistics"):
        run(folder, task, output)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="already exists"):
        run(folder, task, foreign)


def test_a_finished_output_is_refused_before_the_model_is_opened(tmp_path: Path) -> None:
    output = tmp_path / "stats"
    output.mkdir()
    (output / "stats.json").write_text("{}")
    with pytest.raises(InputError, match="already holds finished statistics"):
        calibrate(tmp_path / "no model", ["no task"], output)


def test_two_calibrations_cannot_share_a_folder(
    tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path
) -> None:
    folder, output = tiny_checkpoint("olmoe"), tmp_path / "stats"
    (output / "work").mkdir(parents=True)
    with (
        locked(output / "work" / "lock", "taken"),
        pytest.raises(InputError, match="stats is being calibrated by another process: wait"),
    ):
        run(folder, task, output)
    run(folder, task, output)
    assert not (output / "work").exists()


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_a_failed_run_leaves_nothing_behind(
    name: str, tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path
) -> None:
    """NaN in weights that no layer reads is found too, before anything is measured."""
    folder = damaged_copy(tiny_checkpoint("olmoe"), tmp_path / "damaged", name, np.nan)
    with pytest.raises(CheckpointError, match=f"'{name}' holds NaN or infinity"):
        run(folder, task, tmp_path / "stats")
    assert not (tmp_path / "stats").exists()


@pytest.mark.parametrize("layer_id", [0, 1])
def test_bad_weights_leave_nothing_behind_whatever_was_done(
    layer_id: int, tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path
) -> None:
    """The weights have to change, and a run with others would be refused as a resume."""
    name = f"model.layers.{layer_id}.self_attn.q_proj.weight"
    folder = damaged_copy(tiny_checkpoint("olmoe"), tmp_path / "damaged", name, np.nan)
    output = tmp_path / "stats"
    with pytest.raises(CheckpointError, match=f"layers.{layer_id}.*download"):
        run(folder, task, output)
    assert not output.exists()
    output.mkdir()
    (output / "work").mkdir()  # as a run leaves it that was killed at once
    with pytest.raises(CheckpointError, match=f"layers.{layer_id}"):
        run(folder, task, output)
    assert not output.exists()
    run(tiny_checkpoint("olmoe"), task, output)


@pytest.mark.parametrize("layer_id", [0, 1])
def test_a_failing_disk_keeps_the_layers_that_are_done(
    layer_id: int,
    tiny_checkpoint: TinyCheckpoint,
    task: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_layer = CalibrationWork.save_layer

    def fail(work: CalibrationWork, stats: ExpertStats) -> None:
        if stats.info.moe_layer_ids == (layer_id,):
            raise OSError(errno.ENOSPC, "full")
        save_layer(work, stats)

    output = tmp_path / "stats"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(CalibrationWork, "save_layer", fail)
        run(tiny_checkpoint("olmoe"), task, output)
    assert (output / "work" / "hidden_0001.safetensors").exists() == (layer_id == 1)
    assert output.exists() == (layer_id == 1)


def test_a_resume_with_other_settings_is_refused(
    tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = tiny_checkpoint("olmoe"), tmp_path / "stats"

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("edge_moe.converters.calibrate.BlockObserver", stop)
        with pytest.raises(KeyboardInterrupt):
            run(folder, task, output)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"window_tokens": 16}, "window_tokens"),
        ({"forms": ["q8_0"]}, "forms"),
        ({"shard": (0, 2)}, "windows"),
    ]
    for change, name in changes:
        with pytest.raises(InputError, match=f"cannot resume: {name} is"):
            run(folder, task, output, **change)
    with pytest.raises(InputError, match="cannot resume: model_fingerprint is"):
        run(make_tiny_checkpoint(tmp_path / "other", "olmoe", seed=1), task, output)
    run(folder, task, output)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window_tokens": 1024}, InputError, "--window-tokens is 1024, more than the model's"),
        ({"window_tokens": 1}, InputError, "--window-tokens is 1: use"),
        ({"shard": (3, 3)}, InputError, "shard 3/3 does not exist"),
        ({"shard": (400, 500)}, InputError, "shard 400/500 is empty"),
        ({"forms": ["q9_9"]}, FormError, "'q9_9' is unknown"),
        ({"forms": ["q4_k"]}, FormError, "blocks of 256 weights"),
        ({"forms": ["q4_0/q4_0/q4_k"]}, FormError, "blocks of 256 weights"),
        ({"forms": ["q4_0/q8_0/q8_0"]}, InputError, "gate and up are measured in one form"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    tiny_checkpoint: TinyCheckpoint,
    task: str,
    tmp_path: Path,
    options: dict[str, Any],
    error: type[EdgeMoeError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        run(tiny_checkpoint("qwen3_moe"), task, tmp_path / "stats", **options)
    assert not (tmp_path / "stats").exists()


def test_too_little_memory_or_disk_is_said_before_the_start(
    tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = tiny_checkpoint("qwen3_moe"), tmp_path / "stats"
    with monkeypatch.context() as patch:
        patch.setattr(calibration_memory, "available_memory_bytes", lambda: 1_000_000)
        with pytest.raises(BudgetError, match=r"needs .* but only 1.00 MB is available") as caught:
            run(folder, task, output)
        assert caught.value.minimum_bytes > 1_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(DiskSpaceError, match="calibration needs"):
        run(folder, task, output)
    assert not output.exists()


def test_a_quantiser_of_ternary_forms_is_refused_others_at_once(
    tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path
) -> None:
    folder, output = tiny_checkpoint("qwen3_moe", wide=True), tmp_path / "stats"
    message = r"'absmean' packs tq1_0, .*, int2_b32, not .*q4.* measure only those, --forms tq1_0"
    with pytest.raises(InputError, match=message):
        calibrate(folder, [task], output, quantiser="absmean")
    assert not output.exists()
    stats = calibrate(folder, [task], output, quantiser="absmean", forms=["tq1_0"])
    assert "tq1_0" in stats.info.forms and stats.info.quantiser == "absmean"


def damaged_copy(folder: Path, target: Path, name: str, value: float) -> Path:
    """A float32 copy of the checkpoint in which one tensor is filled with `value`."""
    shutil.copytree(folder, target)
    checkpoint = Checkpoint(folder)
    tensors = {tensor: checkpoint.read(tensor) for tensor in checkpoint.tensors}
    tensors[name] = np.full_like(tensors[name], value)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.mlp.experts.2.up_proj.weight", np.nan, "layers.1.mlp.experts.2.* NaN"),
        ("model.layers.1.self_attn.q_proj.weight", np.inf, "layers.1.self_attn.* NaN or inf"),
        ("model.embed_tokens.weight", np.nan, "embed_tokens.* NaN or infinity"),
        ("model.layers.1.mlp.gate.weight", 3e38, "layer 1"),
        ("model.layers.0.post_attention_layernorm.weight", 3e38, "layer 0"),
    ],
)
def test_damaged_weights_are_named(
    tiny_checkpoint: TinyCheckpoint,
    task: str,
    tmp_path: Path,
    name: str,
    value: float,
    message: str,
) -> None:
    folder = damaged_copy(tiny_checkpoint("qwen3_moe"), tmp_path / "model", name, value)
    with pytest.raises(CheckpointError, match=message):
        run(folder, task, tmp_path / "stats")
    assert not (tmp_path / "stats" / "stats.json").exists()


def test_a_tensor_missing_from_a_layer_is_named(
    tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("olmoe"), folder)
    checkpoint = Checkpoint(folder)
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    del tensors["model.layers.1.self_attn.k_norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    lacking = r"1 tensors that config.json promises .* first .*1.self_attn.k_norm.weight"
    with pytest.raises(CheckpointError, match=lacking):
        run(folder, task, tmp_path / "stats")
