"""Identities that any shrinking must keep, checked on whole models through the runtime.

Checks of the same kind that live with what they check:

- keep all: test_export_hf.py::test_keeping_everything_changes_no_weight, test_transform.py::
  test_keeping_all_experts_changes_no_byte, test_loop.py::test_keeping_everything_changes_nothing
- pruned is masked: test_export_hf.py::test_logits_are_those_of_the_source_with_masked_routers
  (every family), test_transform.py::test_pruned_is_the_source_with_masked_routers
- order of experts: test_transform.py::test_the_order_of_experts_does_not_matter (every method)
- merging copies: test_transform.py::test_merging_copies_changes_nothing (copies that are chosen)
  and ::test_merging_copies_that_are_never_chosen_changes_nothing (every method)
- the rule for super experts: test_loss_table.py::test_super_experts_stand_out_early
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import FAMILY_NAMES, TinyCheckpoint, make_tiny_checkpoint
from hand_plan import hand_plan
from masked_routing import mask_routers
from safetensors.torch import load_file, save_file
from transform_cases import rearranged
from transformers import AutoModelForCausalLM

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.converters.calibrate import calibrate
from edge_moe.formats import DROP
from edge_moe.metrics import compare_tokens
from edge_moe.plan import Plan
from edge_moe.planner import make_plan
from edge_moe.runtime.session import Session
from edge_moe.stats import EXPERT_SUMS, ExpertStats
from edge_moe.super_experts import find_super_experts

PROMPT = list(range(3, 67))
ORDER = [2, 0, 3, 1, 6, 7, 4, 5]
"""Stays inside the halves, so that group-limited routers keep their groups."""
UNEVEN = [(1, 6), (0, 2, 5, 7)]
"""Experts dropped in one MoE layer and the next; as many of each half."""
TEXT = "def add(a, b):\n    return a + b\n\nIt was a fine evening, and 12 + 7 = 19.\n" * 12

Logits = npt.NDArray[np.float32]


def runtime_logits(model: Path) -> Logits:
    """[T, V] of the prompt."""
    with Session.open(model, context_tokens=len(PROMPT)) as session:
        return session.logits(PROMPT)


def reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()


def reference_logits(model: Any) -> Logits:
    with torch.inference_mode():
        values: Logits = model(torch.tensor([PROMPT]), use_cache=False).logits[0].numpy()
    return values


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("num_slots", [None, 5])
def test_keeping_every_expert_in_its_own_form_is_bit_identical(
    family: str, num_slots: int | None, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint(family))
    spec = checkpoint.spec
    whole = [["bf16"] * spec.num_experts for _ in spec.moe_layer_ids]
    package = build(hand_plan(checkpoint, whole), tmp_path / "out")
    with Session.open(package, context_tokens=64, num_slots=num_slots) as session:
        found = session.logits(PROMPT)
    np.testing.assert_array_equal(found, runtime_logits(checkpoint.folder))


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v3"])
def test_a_pruned_package_is_the_source_with_masked_routers(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Softmax with and without renormalising, and sigmoid scores in groups; layers differ."""
    checkpoint = Checkpoint(tiny_checkpoint(family))
    plan = hand_plan(checkpoint, [[_kept(i, gone) for i in range(8)] for gone in UNEVEN])
    package = build(plan, tmp_path / "out")
    source = reference(checkpoint.folder)
    whole = reference_logits(source)
    mask_routers(source, plan, checkpoint.spec)
    masked = reference_logits(source)
    assert np.abs(masked - whole).max() > 0.01
    np.testing.assert_allclose(runtime_logits(package), masked, atol=2e-5, rtol=1e-4)


def _kept(expert_id: int, gone: Sequence[int]) -> str:
    return DROP if expert_id in gone else "bf16"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_reordering_experts_reorders_what_is_measured_and_planned(
    family: str, tmp_path: Path
) -> None:
    source = make_tiny_checkpoint(tmp_path / "source", family)
    other = rearranged(shutil.copytree(source, tmp_path / "other"), ORDER)
    np.testing.assert_allclose(runtime_logits(other), runtime_logits(source), atol=2e-5, rtol=1e-4)
    before, after = (measure(folder, tmp_path) for folder in (source, other))
    np.testing.assert_array_equal(after.routed_tokens, before.routed_tokens[:, ORDER])
    np.testing.assert_allclose(after.max_output, before.max_output[:, ORDER], rtol=1e-5)
    for name in EXPERT_SUMS:
        found, expected = (each.expert_sums[name].values() for each in (after, before))
        np.testing.assert_allclose(found, expected[:, ORDER], rtol=1e-4, atol=1e-6, err_msg=name)
    losses = [stats.form_loss.values() for stats in (after, before)]
    np.testing.assert_allclose(losses[0], losses[1][:, ORDER], rtol=1e-3, atol=1e-9)
    plans = [small_plan(folder, stats) for folder, stats in ((source, before), (other, after))]
    assert len({form for row in plans[0].forms for form in row}) > 1
    assert plans[1].loss == pytest.approx(plans[0].loss, rel=1e-3), "forms may differ in a tie"
    moved = [[row[i] for i in ORDER] for row in plans[0].forms]
    same = plans[0], hand_plan(Checkpoint(other), moved)
    packages = [build(plan, tmp_path / f"built-{i}") for i, plan in enumerate(same)]
    left, right = map(runtime_logits, packages)
    np.testing.assert_allclose(left, right, atol=1e-4, rtol=1e-3)


def measure(folder: Path, work: Path) -> ExpertStats:
    text = work / "mine.txt"
    text.write_text(TEXT, encoding="utf-8")
    output = work / f"{folder.name}-stats"
    return calibrate(folder, [str(text)], output, window_tokens=128, quantiser="nearest")


def small_plan(folder: Path, stats: ExpertStats) -> Plan:
    """A plan with room for two fifths of the experts' bytes."""
    checkpoint = Checkpoint(folder)
    options: dict[str, Any] = {
        "model": str(folder),
        "context_tokens": 128,
        "runtime": (10**8, "assumed"),
    }
    whole = make_plan(checkpoint, stats, 10**9, **options)
    spared = round(0.6 * whole.term("experts").num_bytes)
    return make_plan(checkpoint, stats, whole.total_bytes - spared, **options)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_zeroing_the_super_expert_hurts_more_than_zeroing_others(
    family: str, tmp_path: Path
) -> None:
    """Expert 3 of the first layer, 30 times as loud as it was."""
    folder = make_tiny_checkpoint(tmp_path / "source", family, dtype="float32")
    spec = Checkpoint(folder).spec
    scale_down_proj(folder, 3, 30.0)
    stats = measure(folder, tmp_path)
    found = np.argwhere(find_super_experts(stats.max_output)).tolist()
    assert found == [[0, 3]]
    base = runtime_logits(folder)
    losses = []
    for expert_id in range(spec.num_experts):
        zeroed = shutil.copytree(folder, tmp_path / f"without-{expert_id}")
        scale_down_proj(zeroed, expert_id, 0.0)
        losses.append(compare_tokens(runtime_logits(zeroed), base, PROMPT).kld.mean())
    others = [loss for expert_id, loss in enumerate(losses) if expert_id != 3]
    assert losses[3] > 1.5 * np.mean(others)


def scale_down_proj(folder: Path, expert_id: int, factor: float) -> None:
    """Multiply the output of one expert of layer 0."""
    tensors = load_file(folder / "model.safetensors")
    _, _, down = Checkpoint(folder).spec.expert_tensor_names(0, expert_id)
    tensors[down] = tensors[down] * factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
