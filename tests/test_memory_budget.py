"""The budget is hard: peaks measured from outside, and runs that survive a memory cgroup."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tiny_checkpoint
from hand_plan import hand_plan
from memory_cgroup import memory_cgroup, missing_reason, run_in
from synthetic import Sizes, synthetic_checkpoint

from edge_moe.budget import Setting
from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.formats import expert_bytes
from edge_moe.measurement import RunMeasurement
from edge_moe.overhead import runtime_overhead, tokenizer_bytes
from edge_moe.plan import Source

pytestmark = pytest.mark.slow
NO_CGROUP = missing_reason()
MARGIN = 1.05
FORMS = ("bf16", "q8_0", "q4_k", "q2_k", "tq1_0", "drop", "bf16", "q3_k")


def _edge_moe(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "edge_moe", *map(str, arguments)]


def _run_command(model: Path, budget_bytes: int) -> list[str]:
    return _edge_moe(
        *("run", model, "--budget", f"{budget_bytes}B", "--ctx", 512, "--raw", "--json"),
        *("--prompt", "def read_file(path):\n" * 20, "--max-new-tokens", 40),
    )


def _fixed_bytes(model: Path) -> int:
    """Budget below which nothing is resident: every term but the experts."""
    from edge_moe.runtime.session import Session

    with Session.open(model, context_tokens=512) as session:
        terms = {term.name: term.num_bytes for term in session.memory()}
    overhead = runtime_overhead("qwen3_moe", "cpu")[0] + tokenizer_bytes(model)
    return sum(terms[name] for name in ("dense weights", "KV cache", "workspace")) + overhead


@pytest.fixture(scope="module")
def package(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with every form in it."""
    checkpoint = Checkpoint(demo_model)
    forms = [[FORMS[expert % len(FORMS)] for expert in range(16)]] * 4
    return build(hand_plan(checkpoint, forms), tmp_path_factory.mktemp("budget") / "out")


@pytest.mark.parametrize("expert_share", [1.0, 0.3])
def test_peak_is_within_five_percent_of_the_plan(package: Path, expert_share: float) -> None:
    expert_bytes = sum(path.stat().st_size for path in package.glob("experts-*.safetensors"))
    budget = _fixed_bytes(package) + round(expert_share * expert_bytes)
    done = subprocess.run(_run_command(package, budget), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = RunMeasurement.model_validate_json(done.stdout)
    assert measured.planned_bytes <= budget
    assert measured.peak_memory_bytes == pytest.approx(measured.planned_bytes, rel=0.05)
    assert measured.peak_memory_bytes <= budget * 1.02
    assert (measured.paging["misses"] > 0) == (expert_share < 1)


WIDER: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 32},
    "nemotron_h": {"mamba_num_heads": 32, "mamba_head_dim": 64, "ssm_state_size": 128},
    "qwen3_next": {"linear_num_value_heads": 16, "linear_value_head_dim": 128},
}
"""What makes sinks, Mamba's states and the delta rule show beside the process itself."""


@pytest.mark.parametrize("family", sorted(WIDER))
def test_the_bill_knows_other_mixers_than_attention(family: str, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(
        tmp_path / family, family, width=512, max_position_embeddings=2048, **WIDER[family]
    )
    runtime_overhead(family, "cpu")  # else the bill assumes more than the process takes
    prompt = ("--prompt", "def f(x):\n" * 120, "--max-new-tokens", 4)
    command = _edge_moe("run", folder, "--ctx", 1536, "--raw", "--json", *prompt)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = RunMeasurement.model_validate_json(done.stdout)
    assert 0.9 * measured.planned_bytes < measured.peak_memory_bytes
    assert measured.peak_memory_bytes < 1.02 * measured.planned_bytes


@pytest.mark.skipif(NO_CGROUP is not None, reason=str(NO_CGROUP))
def test_paged_run_survives_a_memory_cgroup(package: Path) -> None:
    expert_bytes = sum(path.stat().st_size for path in package.glob("experts-*.safetensors"))
    budget = _fixed_bytes(package) + expert_bytes // 4
    with memory_cgroup(round(budget * MARGIN)) as group:
        done = run_in(group, _run_command(package, budget))
        assert done.returncode == 0, done.stderr
    measured = RunMeasurement.model_validate_json(done.stdout)
    assert measured.paging["misses"] > 0
    assert measured.generated_tokens > 0


@pytest.mark.skipif(NO_CGROUP is not None, reason=str(NO_CGROUP))
def test_build_survives_a_memory_cgroup(demo_model: Path, tmp_path: Path) -> None:
    """Building streams one expert at a time: the libraries and a little more are enough."""
    plan = hand_plan(Checkpoint(demo_model), [["q4_k"] * 16] * 4)
    plan.save(tmp_path / "plan.json")
    command = _edge_moe("build", tmp_path / "plan.json", "-o", tmp_path / "out")
    with memory_cgroup(200_000_000) as group:
        done = run_in(group, command)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "edge_moe.json").exists()


@pytest.mark.skipif(NO_CGROUP is not None, reason=str(NO_CGROUP))
def test_the_cgroup_does_kill(package: Path) -> None:
    """The proof above means something only if too little memory really ends a run."""
    with memory_cgroup(120_000_000) as group:
        done = run_in(group, _run_command(package, 10**9))
    assert done.returncode != 0


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 million weights in experts: what onnxruntime copies of them shows beside its process."""
    folder = tmp_path_factory.mktemp("large") / "model"
    return synthetic_checkpoint(folder, Sizes(6, 1024, 512, 32))


ONNX_MIXERS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128},
    "deepseek_v3": {"num_attention_heads": 32, "num_key_value_heads": 32},
    "nemotron_h": {"mamba_num_heads": 64, "mamba_head_dim": 64, "n_groups": 8}
    | {"ssm_state_size": 128, "chunk_size": 128},
    "qwen3_next": WIDER["qwen3_next"],
}
"""As in `WIDER`: onnxruntime computes none of them as torch does."""


@pytest.mark.parametrize("family", sorted(ONNX_MIXERS))
def test_the_onnx_bill_knows_mixers(family: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    source = make_tiny_checkpoint(
        tmp_path / "source", family, width=512, max_position_embeddings=2048, **ONNX_MIXERS[family]
    )
    checkpoint = Checkpoint(source)
    plan = hand_plan(checkpoint, [["f32"] * 8] * checkpoint.spec.num_moe_layers, "onnx")
    process: tuple[int, Source] = tokenizer_bytes(source), "assumed"
    terms = Setting(checkpoint, "onnx", "cpu", 1536, process).bill(plan.forms)
    plan = plan.model_copy(update={"terms": terms, "context_tokens": 1536})
    build(plan, tmp_path / "out", model=source)
    prompt = ("--prompt", "def f(x):\n" * 120, "--max-new-tokens", 4)
    command = _edge_moe("run", tmp_path / "out", "--ctx", 1536, "--raw", "--json", *prompt)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = RunMeasurement.model_validate_json(done.stdout)
    assert 0.9 * plan.total_bytes < measured.peak_memory_bytes < 1.04 * plan.total_bytes


@pytest.mark.parametrize("form", ["int4_b64", "int2_b64"])
def test_onnxruntime_keeps_to_the_bill(form: str, large: Path, tmp_path: Path) -> None:
    """It packs the codes anew while it keeps the scales of the file."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    checkpoint = Checkpoint(large)
    plan = hand_plan(checkpoint, [[form] * 32] * 6, "onnx")
    process: tuple[int, Source] = tokenizer_bytes(large), "assumed"
    terms = Setting(checkpoint, "onnx", "cpu", 512, process).bill(plan.forms)
    plan = plan.model_copy(update={"terms": terms, "context_tokens": 512})
    build(plan, tmp_path / "out")
    done = subprocess.run(
        _run_command(tmp_path / "out", plan.total_bytes), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    measured = RunMeasurement.model_validate_json(done.stdout)
    assert 0.9 * plan.total_bytes < measured.peak_memory_bytes < 1.04 * plan.total_bytes
    copied = plan.term("experts").num_bytes - 32 * 6 * expert_bytes(form, 1024, 512)
    least = plan.total_bytes - 3 * copied // 2  # the rest of the bill is 4 % too large here
    assert measured.peak_memory_bytes > least, "nothing is copied any more"


def test_branches_of_the_graph_are_in_the_bill(tmp_path: Path) -> None:
    """1024 branches of small experts: 150 MB that are no weights."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    source = make_tiny_checkpoint(
        tmp_path / "source",
        "gemma4_text",
        num_experts=128,
        num_hidden_layers=8,
        layer_types=["sliding_attention", "full_attention"] * 4,
    )
    checkpoint = Checkpoint(source)
    plan = hand_plan(checkpoint, [["int4_b64"] * 128] * 8, "onnx")
    process: tuple[int, Source] = tokenizer_bytes(source), "assumed"
    terms = Setting(checkpoint, "onnx", "cpu", 512, process).bill(plan.forms)
    plan = plan.model_copy(update={"terms": terms, "context_tokens": 512})
    build(plan, tmp_path / "out")
    command = _run_command(tmp_path / "out", plan.total_bytes)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = RunMeasurement.model_validate_json(done.stdout)
    assert 0.9 * plan.total_bytes < measured.peak_memory_bytes < 1.04 * plan.total_bytes
    assert plan.term("experts").num_bytes > 150_000 * 1024


def test_peak_with_shadows_is_within_the_budget(demo_model: Path, tmp_path: Path) -> None:
    package = build(
        hand_plan(Checkpoint(demo_model), [["q8_0"] * 16] * 4), tmp_path / "out", shadow="tq2_0"
    )
    shadows, bodies = (
        64 * expert_bytes(form, *Checkpoint(demo_model).spec.expert_shape)
        for form in ("tq2_0", "q8_0")
    )
    budget = _fixed_bytes(package) + shadows + bodies // 3
    command = [*_run_command(package, budget), "--stall", "never"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = RunMeasurement.model_validate_json(done.stdout)
    assert measured.paging["shadow_experts"] > 0
    assert measured.measured_terms["shadows"] == shadows
    assert measured.planned_bytes <= budget
    assert measured.peak_memory_bytes == pytest.approx(measured.planned_bytes, rel=0.05)
    assert measured.peak_memory_bytes <= budget * 1.02
