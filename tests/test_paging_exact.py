"""Paging never changes a result: the same tokens as transformers at any slot count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FAMILY_NAMES, TinyCheckpoint
from hand_plan import hand_plan

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.errors import BudgetError, InputError, PackageError
from edge_moe.formats import DROP
from edge_moe.runtime.session import Session

PROMPT = list(range(5, 45))
NEW_TOKENS = 16


def _reference(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _greedy(model: Any) -> list[int]:
    """What transformers' own generate says."""
    import torch

    output = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )
    tokens: list[int] = output[0, len(PROMPT) :].tolist()
    return tokens


def _logits(model: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    import torch

    with torch.inference_mode():
        values: np.ndarray[Any, np.dtype[np.float32]] = (
            model(torch.tensor([PROMPT])).logits[0].numpy()
        )
    return values


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_keep_all_package_yields_the_tokens_of_transformers(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(family)
    spec = Checkpoint(folder).spec
    everything = [["bf16"] * spec.num_experts for _ in spec.moe_layer_ids]
    package = build(hand_plan(Checkpoint(folder), everything), tmp_path / "out")
    wanted = _greedy(_reference(folder))
    every = spec.num_experts * spec.num_moe_layers
    for num_slots in (spec.top_k, spec.top_k + 1, every // 2, every):
        for prefetch in (True, False):
            with Session.open(package, num_slots=num_slots, prefetch=prefetch) as session:
                assert session.generate_ids(PROMPT, NEW_TOKENS, stop_at_eos=False) == wanted
                session.check_integrity()
                assert session.measured_terms["experts"] == num_slots * spec.expert_weights * 2
                assert (session.statistics().misses > 0) == (num_slots < every)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_checkpoint_runs_without_building(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(family)
    reference = _reference(folder)
    with Session.open(folder, num_slots=3) as session:
        assert session.generate_ids(PROMPT, NEW_TOKENS, stop_at_eos=False) == _greedy(reference)
        np.testing.assert_allclose(session.logits(PROMPT), _logits(reference), atol=2e-5)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_pruned_package_equals_the_pruned_checkpoint(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Dropping experts 1 and 6: one of each half, so that grouped routers stay divisible."""
    folder = tiny_checkpoint(family)
    spec = Checkpoint(folder).spec
    row = [DROP if expert in (1, 6) else "bf16" for expert in range(spec.num_experts)]
    forms = [row for _ in spec.moe_layer_ids]
    package = build(hand_plan(Checkpoint(folder), forms), tmp_path / "native")
    sliced = build(hand_plan(Checkpoint(folder), forms, "hf"), tmp_path / "hf")
    with Session.open(package, num_slots=4) as session:
        np.testing.assert_allclose(session.logits(PROMPT), _logits(_reference(sliced)), atol=2e-5)


def test_layers_may_keep_different_counts_and_forms(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny_checkpoint("qwen3_moe", wide=True)
    forms = [
        ["bf16", DROP, "q8_0", "q4_k", DROP, "tq1_0", "q2_k", "q3_k"],
        [DROP, DROP, "q8_0", DROP, "q4_k", DROP, DROP, "q3_k"],
    ]
    package = build(hand_plan(Checkpoint(folder), forms), tmp_path / "out")
    with Session.open(package) as whole, Session.open(package, num_slots=9) as paged:
        np.testing.assert_array_equal(whole.logits(PROMPT), paged.logits(PROMPT))
        assert whole.generate_ids(PROMPT, 8) == paged.generate_ids(PROMPT, 8)
        paged.check_integrity()


def test_damaged_expert_is_named(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen3_moe")
    package = build(hand_plan(Checkpoint(folder), [["bf16"] * 8] * 2), tmp_path / "out")
    from edge_moe.package import Package

    record = Package(package).manifest.layers[1].experts[3]
    with (package / record.file).open("r+b") as handle:
        handle.seek(record.offset + 100)
        handle.write(b"\xff\x00\xff")
    with pytest.raises(PackageError, match=r"layer 1 expert 3 is damaged.*build the package again"):
        Session.open(package)


def test_budget_too_small_states_the_smallest_that_works(
    tiny_checkpoint: TinyCheckpoint,
) -> None:
    folder = tiny_checkpoint("qwen3_moe")
    with pytest.raises(BudgetError, match="too small even when experts are paged") as caught:
        Session.open(folder, budget_bytes=10_000_000, context_tokens=64)
    minimum = caught.value.minimum_bytes
    with Session.open(folder, budget_bytes=minimum, context_tokens=64) as session:
        assert session.generate_ids(PROMPT, 4)
        assert session.is_paging
    with pytest.raises(BudgetError):
        Session.open(folder, budget_bytes=minimum - 1, context_tokens=64)


def test_prompt_must_fit_the_context(tiny_checkpoint: TinyCheckpoint) -> None:
    with Session.open(tiny_checkpoint("qwen3_moe"), context_tokens=16) as session:
        with pytest.raises(InputError, match="26 tokens but the context holds 16"):
            list(session.generate("x" * 26))
        with pytest.raises(InputError, match="the prompt is empty"):
            list(session.generate(""))
        text = "".join(session.generate("abc", max_new_tokens=64))
        assert session.timing.stop_reason in ("context", "eos")
        assert text is not None


def test_sampling_is_repeatable_and_seeded(tiny_checkpoint: TinyCheckpoint) -> None:
    with Session.open(tiny_checkpoint("olmoe"), context_tokens=64) as session:

        def draw(seed: int) -> str:
            return "".join(
                session.generate("hello", max_new_tokens=12, temperature=1.0, top_p=0.9, seed=seed)
            )

        assert draw(1) == draw(1)
        assert len({draw(seed) for seed in range(4)}) > 1
