"""Every family goes all the way, and agrees with transformers; `test_loop.py` runs the commands."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composites import COMPOSITE_CONFIGS, save_composite
from conftest import TinyCheckpoint, make_tiny_checkpoint
from hand_plan import hand_plan, uniform_forms
from reference_model import TOKENS, FloatArray, load, logits, masked
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.converters.calibrate import calibrate
from edge_moe.converters.gradient_loss import measure_gradients
from edge_moe.converters.transform import transform
from edge_moe.errors import InputError, SpecError
from edge_moe.families import COMPOSITES, FAMILIES
from edge_moe.formats import DROP
from edge_moe.inspect import inspect_model
from edge_moe.minimal_model import minimal_config
from edge_moe.runtime import overhead
from edge_moe.runtime.moe_block import MoeBlock
from edge_moe.runtime.session import Session
from edge_moe.runtime.tokenizer import load_tokenizer
from edge_moe.spec import ModelSpec
from edge_moe.tasks import task_windows

TINY = sorted(FAMILIES)
GROUPED = ("deepseek_v2", "deepseek_v3")
"""Without an expert, another group may be the best: the statistics then do not know who is next."""

TOLERANCE = {"ernie4_5_moe": 0.05}
"""Its choice adds a bias to a softmax, so who is next hangs on the scores of those who are left."""


def package_logits(folder: Path) -> FloatArray:
    with Session.open(folder, context_tokens=320) as session:
        return session.logits(TOKENS)


@pytest.mark.parametrize("family", TINY)
def test_keeping_everything_gives_the_logits_of_transformers(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint(family))
    expected = logits(load(checkpoint.folder))
    for target in ("native", "hf"):
        plan = hand_plan(checkpoint, uniform_forms(checkpoint, 8), target)
        output = build(plan, tmp_path / target, model=checkpoint.folder)
        np.testing.assert_allclose(package_logits(output), expected, atol=1e-4)
    np.testing.assert_array_equal(logits(load(tmp_path / "hf")), expected)
    np.testing.assert_allclose(package_logits(checkpoint.folder), expected, atol=1e-4)


@pytest.mark.parametrize("family", TINY)
def test_dropping_is_masking(family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_checkpoint(family))
    check_dropping(checkpoint, uniform_forms(checkpoint, 4), tmp_path)


def test_greedy_routing_ignores_groups(tmp_path: Path) -> None:
    """Its n_group is 2, its topk_group 1: a group may lose all of its experts."""
    source = make_tiny_checkpoint(tmp_path / "source", "deepseek_v2", topk_method="greedy")
    checkpoint = Checkpoint(source)
    assert checkpoint.spec.router.num_groups == 1
    assert "groups" not in checkpoint.spec.router.describe()
    check_dropping(checkpoint, [[DROP] * 4 + ["bf16"] * 4] * 2, tmp_path)


def check_dropping(checkpoint: Checkpoint, forms: list[list[str]], tmp_path: Path) -> None:
    """Both kinds of pruned models compute what the original does with experts masked out."""
    spec, model = checkpoint.spec, load(checkpoint.folder)
    dropped = {
        layer_id: [expert_id for expert_id, form in enumerate(row) if form == DROP]
        for layer_id, row in zip(spec.moe_layer_ids, forms, strict=True)
    }
    with masked(model, spec, dropped):
        expected = logits(model)
    assert np.abs(expected - logits(model)).max() > 0.01
    hf = build(hand_plan(checkpoint, forms, "hf"), tmp_path / "hf", model=checkpoint.folder)
    np.testing.assert_allclose(logits(load(hf)), expected, atol=1e-4)
    native = build(hand_plan(checkpoint, forms), tmp_path / "native", model=checkpoint.folder)
    np.testing.assert_allclose(package_logits(native), expected, atol=1e-4)


@pytest.mark.parametrize("family", [family for family in TINY if family not in GROUPED])
def test_the_loss_of_dropping_is_what_the_block_does_without_the_expert(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(family)
    spec, model = Checkpoint(folder).spec, load(folder)
    text = tmp_path / "mine.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 8, encoding="utf-8")
    stats = calibrate(folder, [str(text)], tmp_path / "stats", window_tokens=64, forms=())
    tokens = task_windows([str(text)], "calibration", load_tokenizer(folder), 64)
    layer_id = spec.moe_layer_ids[0]  # its input is the same with and without the expert
    block = MoeBlock(model, spec, layer_id)
    seen: list[tuple[Tensor, Tensor]] = []
    block.experts.register_forward_hook(lambda *call: seen.append((call[1][1], call[2].double())))

    def run() -> list[tuple[Tensor, Tensor]]:
        """(chosen ids [T, k], weighted sum of outputs [T, H]) of every window."""
        seen.clear()
        with torch.no_grad():
            for window in tokens:
                model(torch.tensor([window]))
        return list(seen)

    whole = run()
    for expert_id in np.argsort(stats.routed_tokens[0])[-2:].tolist():
        with masked(model, spec, {layer_id: [expert_id]}):
            without = run()
        changes = [
            (one - other)[(ids == expert_id).any(dim=1)]
            for (ids, one), (_, other) in zip(whole, without, strict=True)
        ]
        expected = sum(float(change.square().sum()) for change in changes)
        found = stats.form_loss.values()[0, expert_id, stats.form_index(DROP)]
        assert found == pytest.approx(expected, rel=TOLERANCE.get(family, 1e-3))
        assert found > 0


@pytest.mark.parametrize("family", TINY)
def test_the_cache_takes_what_the_formula_says(
    family: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    with Session.open(tiny_checkpoint(family), context_tokens=320) as session:
        session.generate_ids(TOKENS, 4, stop_at_eos=False)
        timing, spec = session.timing, session.spec
    assert timing.cached_tokens == len(TOKENS) + 3
    assert timing.cache_bytes == pytest.approx(spec.kv_bytes(timing.cached_tokens, 4), rel=0.01)
    assert timing.cache_bytes <= spec.kv_bytes(timing.cached_tokens, 4)


@pytest.mark.parametrize("family", TINY)
def test_inspect_knows_every_tensor(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    found = inspect_model(str(tiny_checkpoint(family)))
    components = {component.name: component.num_bytes for component in found.components}
    assert {"routed experts", "routers", "embeddings", "norms"} <= set(components)
    path = tiny_checkpoint(family) / "model.safetensors"
    assert 0 < path.stat().st_size - sum(components.values()) < 64 * 2**10


@pytest.mark.parametrize("family", TINY)
def test_the_memory_probe_runs_it(family: str, tmp_path: Path) -> None:
    overhead.make(tmp_path, family)
    with Session.open(tmp_path, context_tokens=64) as session:
        assert len(session.generate_ids([5, 6, 7], 4, stop_at_eos=False)) == 4


@pytest.mark.parametrize("family", sorted(COMPOSITES))
def test_the_language_model_of_a_larger_one(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Text and pictures: the language model runs alone, a pruned checkpoint keeps the rest."""
    source, tokenizer = tmp_path / "source", tiny_checkpoint(COMPOSITES[family])
    model = save_composite(source, family, tokenizer, dtype=torch.bfloat16)
    checkpoint = Checkpoint(source)
    assert checkpoint.spec.model_type == COMPOSITES[family]
    expected = logits(load(source))
    np.testing.assert_allclose(package_logits(source), expected, atol=1e-4)

    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 4))
    native = build(plan, tmp_path / "native", model=source)
    hf = build(hand_plan(checkpoint, uniform_forms(checkpoint, 4), "hf"), tmp_path / "hf")
    np.testing.assert_allclose(package_logits(native), logits(load(hf)), atol=1e-4)
    pair: Any = AutoModelForImageTextToText.from_pretrained(hf, output_loading_info=True)
    assert not any(pair[1][key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    kept, others = pair[0].state_dict(), [info.name for info in checkpoint.other_tensors]
    assert bool(others) == bool(COMPOSITE_CONFIGS[family])
    for name in others:
        assert torch.equal(kept[name], model.state_dict()[name])


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "minimax_m2", "gemma4_text", "phimoe"])
def test_transforms_refuse_blocks_they_do_not_know(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"does not know the MoE blocks of '{family}'"):
        transform(tiny_checkpoint(family), ["code"], tmp_path / "out", "prune", num_experts=4)


def test_gradients_of_latent_experts_are_refused(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="calibrate without --gradients"):
        measure_gradients(tiny_checkpoint("nemotron_h"), ["code"], tmp_path / "stats")


@pytest.mark.parametrize(
    ("family", "changes", "num_state_layers"),
    [
        ("qwen3_next", {"layer_types": None}, 3),
        ("qwen3_next", {"layer_types": None, "full_attention_interval": 2}, 2),
        ("lfm2_moe", {"layer_types": None, "full_attn_idxs": [1, 3]}, 2),
        ("nemotron_h", {"layers_block_type": None, "hybrid_override_pattern": "ME*E"}, 3),
    ],
)
def test_older_spellings_of_the_layers(
    family: str, changes: dict[str, Any], num_state_layers: int
) -> None:
    config = {"model_type": family, **minimal_config(family), **changes}
    spec = ModelSpec.from_config(config)
    assert (spec.num_layers, spec.num_state_layers) == (4, num_state_layers)
    assert len(spec.moe_layer_ids) in (2, 3, 4)


def test_layers_that_nothing_describes_are_refused() -> None:
    config = {"model_type": "lfm2_moe", **minimal_config("lfm2_moe"), "layer_types": None}
    with pytest.raises(SpecError, match="layer_types holds 0 entries for 4 layers"):
        ModelSpec.from_config(config)


def test_heads_for_later_tokens_are_neither_loaded_nor_written(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """They would keep their own experts while config.json counts fewer."""
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint("qwen3_next"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["mtp.fc.weight"] = torch.ones(4, 4)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(source)
    np.testing.assert_array_equal(
        package_logits(source), package_logits(tiny_checkpoint("qwen3_next"))
    )
    hf = build(hand_plan(checkpoint, uniform_forms(checkpoint, 4), "hf"), tmp_path / "hf")
    assert "mtp.fc.weight" not in Checkpoint(hf).tensors
    assert "1 tensors of multi-token prediction" in (hf / "README.md").read_text()
