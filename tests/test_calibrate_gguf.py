"""Calibration on llama.cpp against transformers, and against sums worked out from the weights.

On float32 files both compute the same in another order of adding. On quantised files llama.cpp
rounds the activations that meet a matrix, so outputs agree with dequantised weights to about 2 %.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TinyCheckpoint, make_tiny_checkpoint
from peak_memory import deep_checkpoint, measure_peak, needs_proc
from reference_model import table_gelu
from stopped_runs import stopping_at_rename
from torch import Tensor

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

from float32_gguf import ARCHITECTURES, CALIBRATED, float32_gguf  # noqa: E402
from gguf_files import requantised, write_gpt_oss  # noqa: E402

from edge_moe.checkpoint import Checkpoint  # noqa: E402
from edge_moe.cli import run as run_command  # noqa: E402
from edge_moe.converters.calibrate import calibrate  # noqa: E402
from edge_moe.converters.calibrate_gguf import calibrate_gguf  # noqa: E402
from edge_moe.converters.gguf_memory import gguf_calibration_terms  # noqa: E402
from edge_moe.converters.stored_experts import StoredExperts  # noqa: E402
from edge_moe.converters.window_spool import spool_bytes  # noqa: E402
from edge_moe.errors import (  # noqa: E402
    BudgetError,
    CheckpointError,
    DiskSpaceError,
    InputError,
    SpecError,
    StatsError,
)
from edge_moe.formats import get_form, pack_expert, unpack_expert  # noqa: E402
from edge_moe.formats.quantise import pack_matrix  # noqa: E402
from edge_moe.gguf_model import GgufModel  # noqa: E402
from edge_moe.moments import load_moments, merge_moments, moments_path  # noqa: E402
from edge_moe.runtime import llama_capture, llama_graph  # noqa: E402
from edge_moe.runtime.gguf_logits import gguf_tokenizer  # noqa: E402
from edge_moe.runtime.llama_capture import BlockCapture, LlamaCapture  # noqa: E402
from edge_moe.runtime.moe_block import expert_output  # noqa: E402
from edge_moe.stats import ExpertStats  # noqa: E402
from edge_moe.tasks import task_windows  # noqa: E402

TEXT = "def f(x):\n    return x + 1\n\nIt was the best of times, it was the worst of times.\n" * 3
FORMS = ("q8_0", "q4_0", "bf16")
WINDOW_TOKENS = 32
CASES = (*CALIBRATED, "no_groups", "every_expert", "every_oai_expert", "nemotron_h wide")

Case = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("task") / "mine.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """`case(name)`: a float32 checkpoint and its float32 GGUF file."""
    changes: dict[str, dict[str, Any]] = {
        "deepseek_v3": {"q_lora_rank": 32},
        "no_groups": {"q_lora_rank": 32, "n_group": 1, "topk_group": 1, "seed": 3},
        "deepseek_v2": {"n_group": 1, "topk_group": 1, "topk_method": "greedy"},
        "every_expert": {"num_experts": 4, "num_experts_per_tok": 4},  # nothing to reroute to
        "qwen3_5_moe_text": {"seed": 1},  # the next-best expert is a tie of float32 elsewhere
        "every_oai_expert": {"num_local_experts": 4, "num_experts_per_tok": 4},
        "wide": {"width": 256},
        "nemotron_h wide": {"moe_latent_size": None},
    }
    families = {
        "no_groups": "deepseek_v3",
        "every_expert": "olmoe",
        "every_oai_expert": "gpt_oss",
        "wide": "qwen3_moe",
        "nemotron_h wide": "nemotron_h",
    }

    @cache
    def build(name: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(name)
        family = families.get(name, name)
        make_tiny_checkpoint(folder, family, dtype="float32", **changes.get(name, {}))
        return folder, float32_gguf(folder, folder / "model.gguf")

    return build


@pytest.fixture(scope="module")
def quantised(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Q4_K experts whose down_proj is Q6_K, the rest Q8_0."""
    types = {
        "ffn_(gate|up)_exps": "Q4_K",
        "ffn_down_exps": "Q6_K",
        r"attn_(q|k|v|output)\.": "Q8_0",
    }
    output = tmp_path_factory.mktemp("quantised") / "model.gguf"
    return requantised(case("wide")[1], output, types)


def run(path: Path, task: str, output: Path, **options: Any) -> ExpertStats:
    arguments: dict[str, Any] = {
        "window_tokens": WINDOW_TOKENS,
        "forms": FORMS,
        "quantiser": "nearest",
    } | options
    return calibrate_gguf(path, [task], output, **arguments)


def run_checkpoint(folder: Path, task: str, output: Path, **options: Any) -> ExpertStats:
    arguments: dict[str, Any] = {
        "window_tokens": WINDOW_TOKENS,
        "forms": FORMS,
        "quantiser": "nearest",
    } | options
    return calibrate(folder, [task], output, **arguments)


def assert_same(left: ExpertStats, right: ExpertStats) -> None:
    assert left.info == right.info
    others = right.to_arrays()
    for name, array in left.to_arrays().items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)


def captured(path: Path, token_ids: list[int]) -> dict[int, BlockCapture]:
    """What every MoE block did on one window."""
    model, found = GgufModel(path), {}
    with LlamaCapture(path, model.spec, model.header.architecture, len(token_ids)) as capture:
        capture.run(token_ids, lambda layer_id, tokens, block: found.update({layer_id: block}))
    return found


def output_of(model: GgufModel, layer_id: int, expert_id: int, inputs: Tensor) -> Tensor:
    """[n, H] of an expert with dequantised weights, float32."""
    gate, up, down = map(torch.from_numpy, model.expert(layer_id, expert_id))
    return F.linear(F.silu(F.linear(inputs, gate)) * F.linear(inputs, up), down)


# ---------------------------------------------------------------------------- float32


@pytest.mark.parametrize("name", CASES)
def test_sums_agree_with_transformers(case: Case, name: str, task: str, tmp_path: Path) -> None:
    folder, path = case(name)
    with table_gelu():
        wanted = run_checkpoint(folder, task, tmp_path / "wanted")
    found = run(path, task, tmp_path / "found")
    np.testing.assert_array_equal(found.routed_tokens, wanted.routed_tokens)
    np.testing.assert_allclose(found.max_output, wanted.max_output, rtol=1e-4)
    for key, total in wanted.sums().items():
        values, others = found.sums()[key].values(), total.values()
        assert key == "expert.top_logit" or (others.sum() > 0)
        if key == "form_loss" and name == "gemma4_text":  # the table's steps hide small changes
            values, others = values[..., :1], others[..., :1]
        np.testing.assert_allclose(
            *(values, others), rtol=1e-4, atol=1e-7 * abs(others).max(), err_msg=key
        )
    spec = GgufModel(path).spec
    for layer_id in spec.moe_layer_ids:
        for expert_id in range(spec.num_experts):
            sums = (
                load_moments(tmp_path / part, layer_id, spec).of_expert(expert_id)
                for part in ("found", "wanted")
            )
            for one, other in zip(*sums, strict=True):
                rtol = 3e-3 if name == "gemma4_text" else 1e-3  # again the table
                np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-6 * abs(other).max())


def test_forms_of_gelu_are_measured_exactly(case: Case, task: str, tmp_path: Path) -> None:
    """Without llama.cpp's table, whose rounding is of the size of the change by 8 bits."""
    folder, path = case("gemma4_text")
    wanted = run_checkpoint(folder, task, tmp_path / "wanted").form_loss.values()
    found = run(path, task, tmp_path / "found").form_loss.values()
    np.testing.assert_allclose(found, wanted, rtol=5e-3)


def test_the_settings_are_those_of_the_checkpoint_but_for_the_model(
    case: Case, task: str, tmp_path: Path
) -> None:
    folder, path = case("qwen3_moe")
    wanted = run_checkpoint(folder, task, tmp_path / "wanted").info
    found = run(path, task, tmp_path / "found").info
    different = {name for name, value in wanted if value != getattr(found, name)}
    assert different == {"model_type", "model_fingerprint", "tokenizer_fingerprint"}
    model = GgufModel(path)
    assert found.model_type == "gguf:qwen3moe"
    assert found.model_fingerprint == model.fingerprint
    assert found.tokenizer_fingerprint == model.tokenizer_fingerprint


@pytest.mark.parametrize("quantiser", ["gptq_refit", "gptq_refit_all"])
def test_quantisers_that_know_the_text_agree_with_transformers(
    quantiser: str, case: Case, task: str, tmp_path: Path
) -> None:
    folder, path = case("deepseek_v3")
    forms = {"forms": ("q4_0",), "quantiser": quantiser}
    wanted = run_checkpoint(folder, task, tmp_path / "wanted", **forms)
    found = run(path, task, tmp_path / "found", **forms)
    plain = run(path, task, tmp_path / "plain", forms=("q4_0",))
    values, others = found.form_loss.values(), wanted.form_loss.values()
    # a last bit of a moment may turn a code over: far less than the quantiser itself changes
    np.testing.assert_allclose(values, others, rtol=0.05, atol=1e-3 * others.max())
    assert abs(values - others).sum() < 0.1 * abs(plain.form_loss.values() - others).sum()


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "olmoe"])
def test_a_window_in_pieces_is_the_same_window(
    name: str, case: Case, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = case(name)[1]
    whole = run(path, task, tmp_path / "whole")
    monkeypatch.setattr(llama_graph, "_LOGIT_BYTES", 1)
    monkeypatch.setattr(llama_graph, "_FEWEST_TOKENS", 7)
    pieces = run(path, task, tmp_path / "pieces")
    np.testing.assert_array_equal(pieces.routed_tokens, whole.routed_tokens)
    for key, total in whole.sums().items():
        values = total.values()
        np.testing.assert_allclose(
            pieces.sums()[key].values(), values, rtol=1e-4, atol=1e-7 * abs(values).max()
        )


def test_watching_changes_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert more and a weight of zero: to the last bit what the real top_k computes."""
    path = case("deepseek_v3")[1]
    blocks = captured(path, list(range(1, 31)))
    for module in (llama_capture, llama_graph):
        monkeypatch.setattr(module, "num_slots", lambda spec: spec.top_k)
    plain = captured(path, list(range(1, 31)))
    assert blocks.keys() == plain.keys() and len(plain) == 2
    for layer_id, block in blocks.items():
        other = plain[layer_id]
        assert block.expert_ids.shape[1] == other.expert_ids.shape[1] + 1
        np.testing.assert_array_equal(block.hidden, other.hidden)
        np.testing.assert_array_equal(block.block_output, other.block_output)
        np.testing.assert_array_equal(block.gates, other.gates)
        np.testing.assert_array_equal(block.outputs[:, :-1], other.outputs)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deepseek_v3", {"merged": True}),
        ("deepseek_v3", {"split_max_tensors": 9}),
        ("gemma4_text", {"merged": True}),  # as llama.cpp's own converter writes it
        ("qwen3_next", {"merged": True}),
    ],
)
def test_other_ways_to_store_the_same_model(
    name: str, options: dict[str, Any], case: Case, task: str, tmp_path: Path
) -> None:
    folder, path = case(name)
    other = float32_gguf(folder, tmp_path / "other.gguf", **options)
    wanted, found = run(path, task, tmp_path / "wanted"), run(other, task, tmp_path / "found")
    assert len(GgufModel(other).parts) == (6 if "split_max_tensors" in options else 1)
    assert found.info.tokenizer_fingerprint == wanted.info.tokenizer_fingerprint
    assert found.info.model_fingerprint != wanted.info.model_fingerprint
    np.testing.assert_array_equal(found.routed_tokens, wanted.routed_tokens)
    for key, total in wanted.sums().items():
        np.testing.assert_array_equal(found.sums()[key].limbs(), total.limbs(), err_msg=key)


# ---------------------------------------------------------------------------- quantised


def test_quantised_sums_by_hand(quantised: Path, task: str, tmp_path: Path) -> None:
    model = GgufModel(quantised)
    spec = model.spec
    with gguf_tokenizer(quantised) as tokenizer:
        token_ids = tokenizer.encode(TEXT, add_special_tokens=False)[:WINDOW_TOKENS]
    forms = ("q4_0", "q4_k", "q6_k", "q3_k/q3_k/q6_k", "q3_k/q3_k/q5_k", "q3_k")
    stats = run(quantised, task, tmp_path / "stats", max_windows=1, forms=forms)
    blocks = captured(quantised, token_ids)
    for row, layer_id in enumerate(spec.moe_layer_ids):
        block = blocks[layer_id]
        inputs, chosen = torch.from_numpy(block.inputs), block.expert_ids[:, : spec.top_k]
        for expert_id in range(spec.num_experts):
            token, slot = np.nonzero(chosen == expert_id)
            assert stats.routed_tokens[row, expert_id] == len(token)
            if not len(token):
                continue
            gates = torch.from_numpy(block.gates[token, slot]).double()
            exact = output_of(model, layer_id, expert_id, inputs[token]).double()
            norms = exact.norm(dim=1)
            found = {
                name: sums.values()[row, expert_id] for name, sums in stats.expert_sums.items()
            }
            np.testing.assert_allclose(found["gate"], gates.sum(), rtol=1e-6)
            np.testing.assert_allclose(found["output_norm"], norms.sum(), rtol=0.03)
            np.testing.assert_allclose(found["gated_norm"], (gates * norms).sum(), rtol=0.03)
            weights = model.expert(layer_id, expert_id)
            by_hand: dict[str, tuple[int, ...]] = {
                **{"q4_0": (), "q4_k": (0, 1), "q6_k": (2,)},
                **{"q3_k/q3_k/q6_k": (2,), "q3_k/q3_k/q5_k": (), "q3_k": ()},
            }
            for form, kept in by_hand.items():  # what is kept is stored so already
                record = pack_expert(form, *weights)
                parts = list(unpack_expert(form, record, *spec.expert_shape))
                for part in kept:
                    parts[part] = weights[part]
                gate, up, down = map(torch.from_numpy, parts)
                inner = F.silu(F.linear(inputs[token], gate)) * F.linear(inputs[token], up)
                change = (F.linear(inner, down) - exact.float()).double().norm(dim=1)
                loss = stats.form_loss.values()[row, expert_id, stats.form_index(form)]
                np.testing.assert_allclose(loss, (gates * change).square().sum(), rtol=1e-3)


def test_outputs_are_llama_cpps_own(quantised: Path) -> None:
    """Rounded activations included, and those of the expert that would be next."""
    model = GgufModel(quantised)
    for layer_id, block in captured(quantised, list(range(1, 31))).items():
        inputs = torch.from_numpy(block.inputs)
        for slot, token in itertools.product(range(block.expert_ids.shape[1]), range(30)):
            expert_id = int(block.expert_ids[token, slot])
            exact = output_of(model, layer_id, expert_id, inputs[token : token + 1])[0].numpy()
            error = np.abs(block.outputs[token, slot] - exact).max() / np.abs(exact).max()
            assert 0 < error < 0.05


def test_outputs_of_gpt_oss_in_mxfp4_are_llama_cpps_own(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """With biases on everything, and its own activation."""
    path = write_gpt_oss(tmp_path / "m.gguf", tiny_checkpoint("qwen3_moe"), masked={})
    model, found = GgufModel(path), captured(path, list(range(1, 31)))
    for layer_id, block in found.items():
        experts, inputs = StoredExperts(model, layer_id), torch.from_numpy(block.inputs)
        scale = np.abs(block.outputs).max()
        for expert_id in np.unique(block.expert_ids):
            token, slot = np.nonzero(block.expert_ids == expert_id)
            pair = experts.gate_up_proj[expert_id], experts.down_proj[expert_id]
            exact = expert_output(experts, inputs[token], *pair, int(expert_id)).numpy()
            error = np.abs(block.outputs[token, slot] - exact).max() / scale
            assert 0 < error < 0.05


def test_a_form_that_the_file_has_costs_nothing(case: Case, task: str, tmp_path: Path) -> None:
    path = requantised(case("olmoe")[1], tmp_path / "q8.gguf", {"_exps": "Q8_0"})
    stats = run(path, task, tmp_path / "stats", forms=("q8_0", "f32", "q4_0"))
    losses = stats.form_loss.values()
    assert not losses[..., stats.form_index("q8_0")].any()
    assert not losses[..., stats.form_index("f32")].any()
    assert (losses[..., stats.form_index("q4_0")] > 0).all()


@pytest.mark.parametrize("quantiser", ["imatrix", "refit"])
def test_losses_are_those_of_what_build_packs(
    quantiser: str, quantised: Path, task: str, tmp_path: Path
) -> None:
    """By the second moments in the statistics, and nothing else of the text."""
    stats = run(quantised, task, tmp_path / "stats", forms=("q3_k",), quantiser=quantiser)
    model, losses = GgufModel(quantised), stats.form_loss.values()[0, :, 1]
    with gguf_tokenizer(quantised) as tokenizer:
        windows = task_windows([task], "calibration", tokenizer, WINDOW_TOKENS)
    seen: list[BlockCapture] = []

    def take(layer_id: int, _: slice, block: BlockCapture) -> None:
        if layer_id == 0:
            seen.append(block)

    with LlamaCapture(quantised, model.spec, "qwen3moe", WINDOW_TOKENS) as capture:
        for window in windows:
            capture.run(window, take)
    moments = load_moments(tmp_path / "stats", 0, model.spec)
    for expert_id in range(model.spec.num_experts):
        outer, inner = moments.of_expert(expert_id)
        weights = model.expert(0, expert_id)
        gate, up, down = (
            torch.from_numpy(get_form("q3_k").unpack(packed, matrix.shape[1]))
            for matrix, squares in zip(weights, (outer, outer, inner), strict=True)
            for packed in [pack_matrix("q3_k", matrix, quantiser=quantiser, input_squares=squares)]
        )
        total = 0.0
        for block in seen:
            token, slot = np.nonzero(block.expert_ids[:, : model.spec.top_k] == expert_id)
            inputs = torch.from_numpy(block.inputs[token])
            exact = output_of(model, 0, expert_id, inputs)
            change = F.linear(F.silu(F.linear(inputs, gate)) * F.linear(inputs, up), down) - exact
            gates = torch.from_numpy(block.gates[token, slot]).double()
            total += float((gates * change.double().norm(dim=1)).square().sum())
        np.testing.assert_allclose(losses[expert_id], total, rtol=1e-4)


# ---------------------------------------------------------------------------- shards, kills


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_shards_in_any_order_are_one_run(name: str, case: Case, task: str, tmp_path: Path) -> None:
    path = case(name)[1]
    whole = run(path, task, tmp_path / "whole")
    assert len(whole.info.windows) > 3
    shards = [run(path, task, tmp_path / f"{index}", shard=(index, 3)) for index in range(3)]
    for first, second, third in itertools.permutations(shards):
        assert_same(first.merge(second).merge(third), whole)
    merge_moments([tmp_path / f"{index}" for index in (2, 0, 1)], tmp_path / "all", (1,))
    wanted = moments_path(tmp_path / "whole", 1).read_bytes()
    assert moments_path(tmp_path / "all", 1).read_bytes() == wanted


def test_a_run_stopped_anywhere_goes_on_to_the_same_bits(
    case: Case, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = case("deepseek_v3")[1]
    whole = run(path, task, tmp_path / "whole", max_windows=3)
    for stop in itertools.count():
        output = tmp_path / f"stopped-{stop}"
        try:
            with stopping_at_rename(stop, monkeypatch):
                run(path, task, output, max_windows=3)
            break
        except KeyboardInterrupt:
            assert_same(run(path, task, output, max_windows=3), whole)
            assert sorted(os.listdir(output)) == ["moments", "stats.json", "stats.safetensors"]
    assert stop == 10  # settings, 3 windows, 2 layers' moments and statistics, 2 results


def test_windows_that_are_done_are_not_run_again(
    case: Case, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = case("olmoe")[1]
    with stopping_at_rename(3, monkeypatch), pytest.raises(KeyboardInterrupt):
        run(path, task, tmp_path / "stats")
    ran, real = [], LlamaCapture.run

    def counted(self: LlamaCapture, token_ids: Any, take: Any) -> None:
        ran.append(len(token_ids))
        real(self, token_ids, take)

    monkeypatch.setattr(LlamaCapture, "run", counted)
    stats = run(path, task, tmp_path / "stats")
    assert len(ran) == len(stats.info.windows) - 2


KILLED = """
import sys
from pathlib import Path
from edge_moe.converters.calibrate_gguf import calibrate_gguf
model, task, output = sys.argv[1:]
options = {"window_tokens": 32, "forms": ["q8_0", "q4_0", "bf16"], "quantiser": "nearest"}
calibrate_gguf(Path(model), [task], Path(output), **options)
"""


@pytest.mark.slow
def test_kill_minus_nine_and_resume(task: str, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", "olmoe", num_hidden_layers=8)
    path, output = float32_gguf(folder, tmp_path / "model.gguf"), tmp_path / "stats"
    process = subprocess.Popen([sys.executable, "-c", KILLED, path, task, output])
    while process.poll() is None and not list(output.glob("work/windows/*.safetensors")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (output / "stats.json").exists()
    resumed = run(path, task, output)
    assert_same(resumed, run(path, task, tmp_path / "whole"))


def test_a_damaged_window_is_named(
    case: Case, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = case("olmoe")[1]
    with stopping_at_rename(3, monkeypatch), pytest.raises(KeyboardInterrupt):
        run(path, task, tmp_path / "stats")
    window = tmp_path / "stats" / "work" / "windows" / "0000.safetensors"
    window.write_bytes(window.read_bytes()[:-100])
    with pytest.raises(StatsError, match="0000.safetensors is damaged .* calibrate again"):
        run(path, task, tmp_path / "stats")


# ---------------------------------------------------------------------------- refusals


def test_an_architecture_that_is_not_tested_is_refused_by_name(
    case: Case, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(llama_graph.ARCHITECTURES, "olmoe")
    with pytest.raises(SpecError, match="not for 'olmoe': calibrate the Hugging Face checkpoint"):
        run(case("olmoe")[1], task, tmp_path / "stats")
    assert not (tmp_path / "stats").exists()


def test_an_older_llama_cpp_python_is_refused(
    case: Case, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ctypes structures take any attribute: a field that is not there must not be set in vain."""
    import ctypes

    from llama_cpp import llama_cpp

    class Older(ctypes.Structure):
        _fields_ = tuple(
            field
            for field in llama_cpp.llama_model_params._fields_
            if field[0] not in ("load_mode", "no_alloc")
        )

    monkeypatch.setattr(llama_cpp, "llama_model_params", Older)
    wanted = r"has no llama_model_params.load_mode, llama_model_params.no_alloc: .* needs 0\.3\.36"
    with pytest.raises(InputError, match=wanted):
        run(case("olmoe")[1], task, tmp_path / "stats")
    monkeypatch.delattr(llama_cpp, "llama_memory_clear")
    with pytest.raises(InputError, match="has no llama_memory_clear, llama_model_params"):
        run(case("olmoe")[1], task, tmp_path / "stats")


def test_forms_that_no_gguf_file_holds_are_refused(case: Case, task: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot hold int4_b64, and"):
        calibrate_gguf(
            case("olmoe")[1], [task], tmp_path / "stats", forms=("drop", "q4_0", "int4_b64")
        )
    assert not (tmp_path / "stats").exists()


def test_a_graph_that_the_metadata_does_not_explain_is_refused(
    case: Case, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp's graph of qwen3moe renormalises; told that it does not, the run stops."""
    from dataclasses import replace

    path = case("qwen3_moe")[1]
    model = GgufModel(path)
    spec = replace(model.spec, router=replace(model.spec.router, renormalises=False))
    with LlamaCapture(path, spec, "qwen3moe", 8) as capture:
        with pytest.raises(CheckpointError, match="'ffn_moe_weights_norm-0'.*does not explain"):
            capture.run([1, 2, 3], lambda *_: None)
    monkeypatch.setitem(
        llama_graph.ARCHITECTURES, "qwen3moe", llama_graph.BlockNodes(output="unheard_of")
    )
    with pytest.raises(CheckpointError, match="no node 'unheard_of' before 'l_out-0'"):
        run(path, task, tmp_path / "stats")
    assert not (tmp_path / "stats").exists()


@pytest.mark.parametrize(
    ("key", "number", "reason"),
    [("rope.dimension_count", 8, "GGML_ASSERT"), ("attention.head_count", 3, "cannot load it")],
)
def test_a_file_that_llama_cpp_aborts_on_is_refused(
    key: str, number: int, reason: str, case: Case, task: str, tmp_path: Path
) -> None:
    import gguf

    path = tmp_path / "bad.gguf"
    path.write_bytes(case("qwen3_moe")[1].read_bytes())
    field = gguf.GGUFReader(path, "r+").fields[f"qwen3moe.{key}"]
    field.parts[field.data[0]][0] = number
    with pytest.raises(InputError, match=reason):
        run(path, task, tmp_path / "stats")
    assert not (tmp_path / "stats").exists()


def test_a_disk_that_fills_up_meanwhile_is_an_error(
    case: Case, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing to a mapping without space ends the process: it is taken before."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device.*safetensors"):
        run(case("olmoe")[1], task, tmp_path / "stats")


def test_a_context_that_llama_cpp_cannot_make(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_cpp import llama_cpp

    path = case("olmoe")[1]
    monkeypatch.setattr(llama_cpp, "llama_init_from_model", lambda *_: None)
    with pytest.raises(InputError, match="cannot run windows of 8 tokens"):
        LlamaCapture(path, GgufModel(path).spec, "olmoe", 8)


def test_errors_while_a_window_runs_come_through(case: Case) -> None:
    path = case("olmoe")[1]

    def fail(*_: object) -> None:
        raise ZeroDivisionError("mine")

    with LlamaCapture(path, GgufModel(path).spec, "olmoe", 8) as capture:
        with pytest.raises(ZeroDivisionError, match="mine"):
            capture.run([1, 2, 3], fail)
        found: list[int] = []
        capture.run([1, 2, 3], lambda layer_id, *_: found.append(layer_id))
        assert found == [0, 1]
        with pytest.raises(InputError, match="9 tokens is longer than the 8"):
            capture.run(list(range(9)), fail)
        with pytest.raises(InputError, match="stops with code -1"):
            capture.run([10**6], fail)


def test_too_little_disk_and_memory_are_refused_before_the_work(
    case: Case, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = case("olmoe")[1]
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: _Usage())
        with pytest.raises(DiskSpaceError, match="calibration needs"):
            run(path, task, tmp_path / "stats")
    monkeypatch.setattr(
        "edge_moe.converters.calibration_memory.available_memory_bytes", lambda: 10**6
    )
    with pytest.raises(BudgetError, match="fewer windows"):
        run(path, task, tmp_path / "stats")
    assert not (tmp_path / "stats").exists()


class _Usage:
    total, used, free = 10**9, 10**9, 10


def test_the_spool_takes_what_it_says(
    case: Case, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output = case("qwen2_moe")[1], tmp_path / "stats"
    stop = 1 + len(run(path, task, tmp_path / "whole").info.windows)
    with stopping_at_rename(stop, monkeypatch), pytest.raises(KeyboardInterrupt):
        run(path, task, output)
    files = list((output / "work" / "windows").iterdir())
    info, spec = ExpertStats.load(tmp_path / "whole").info, GgufModel(path).spec
    stated = spool_bytes(spec, info.num_tokens)
    assert stated <= sum(file.stat().st_size for file in files) < stated + 8192 * len(files)


def test_the_larger_phase_is_what_is_stated(case: Case) -> None:
    model = GgufModel(case("olmoe")[1])
    short = {term.name for term in gguf_calibration_terms(model, 64, 32, "nearest")}
    long = {term.name for term in gguf_calibration_terms(model, 10**7, 32, "gptq_refit")}
    assert "activations" in long and "hessians" in long and "kv cache" not in long
    assert "allowance" in short & long


# ---------------------------------------------------------------------------- tokenizer, command


def test_chat_messages_are_rendered_by_the_files_own_template(case: Case, tmp_path: Path) -> None:
    import gguf
    from transformers import AutoTokenizer

    folder, source = case("olmoe")
    template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    reader = gguf.GGUFReader(source)
    assert "tokenizer.chat_template" not in reader.fields
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.bos_token = "<|endoftext|>"
    copy = tmp_path / "copy"
    make_tiny_checkpoint(copy, "olmoe", dtype="float32")
    tokenizer.save_pretrained(copy)
    path = float32_gguf(copy, tmp_path / "chat.gguf")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    with gguf_tokenizer(path) as found:
        assert found.chat_template == template
        assert found.apply_chat_template(messages, tokenize=False) == (
            tokenizer.apply_chat_template(messages, tokenize=False)
        )
    rows = tmp_path / "chat.jsonl"
    rows.write_text("\n".join([json.dumps({"messages": messages})] * 10))
    wanted = run_checkpoint(copy, str(rows), tmp_path / "wanted", forms=("q8_0",))
    stats = run(path, str(rows), tmp_path / "found", forms=("q8_0",))
    assert stats.info.data_fingerprint == wanted.info.data_fingerprint


def test_the_command_calibrates_a_gguf_file(
    case: Case, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = case("olmoe")[1], tmp_path / "stats"
    options = ["--task", task, "--window-tokens", "32", "--forms", "q8_0", "-o", str(output)]
    assert run_command(["calibrate", str(path), *options]) == 0
    printed = " ".join(capsys.readouterr().err.split())
    assert "2 layers x 8 experts, forms drop, q8_0, packed by imatrix" in printed
    assert ExpertStats.load(output).info.model_fingerprint == GgufModel(path).fingerprint
    assert run_command(["calibrate", str(path), "--gradients", "--task", task]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "--gradients: llama.cpp does not run" in message and "backwards" in message
    assert run_command(["calibrate", str(path), "--quantiser", "gptq", "--task", task]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "--quantiser gptq packs by the calibration text" in message


def test_every_architecture_of_the_table_is_tested() -> None:
    assert set(llama_graph.ARCHITECTURES) == set(ARCHITECTURES.values())


MEASURED = """
model, task, output, quantiser = sys.argv[1:]
options = {"window_tokens": 128, "forms": ["q4_0"], "quantiser": quantiser}
calibrate_gguf(Path(model), [task], Path(output), **options)
"""


@pytest.mark.slow
@needs_proc
def test_memory_is_stated(task: str, tmp_path: Path) -> None:
    """Twelve layers of experts; pages of the mapped file count as memory here."""
    folder = deep_checkpoint(tmp_path / "model")
    whole_bytes = 4 * sum(info.num_bytes // 2 for info in Checkpoint(folder).tensors.values())
    path, output = float32_gguf(folder, tmp_path / "model.gguf"), tmp_path / "stats"
    imports = KILLED[: KILLED.index("model, task")]
    peak = measure_peak(imports, MEASURED, path, task, output, "nearest")
    info = ExpertStats.load(output).info
    terms = gguf_calibration_terms(GgufModel(path), info.num_tokens, 128, "nearest")
    stated_bytes = sum(term.num_bytes for term in terms)
    assert peak.grown_bytes <= stated_bytes + path.stat().st_size
    assert stated_bytes < 0.6 * whole_bytes
