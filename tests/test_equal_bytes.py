"""The README's table of equal bytes, asserted: each contender really built, run and measured."""

from __future__ import annotations

import pytest

from edge_moe.converters.calibrate_gradients import calibrate_with_gradients
from edge_moe.demo import demo_model_dir
from edge_moe.demo.equal_bytes import PLAN_NAME, EqualBytes, equal_bytes
from edge_moe.gradient_stats import GradientStats, load_gradients
from edge_moe.stats import ExpertStats

pytestmark = pytest.mark.slow

TASK = "code"
WINDOWS = 6
MIXED_BITS = "quantise only"


Stats = tuple[ExpertStats, GradientStats | None]


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> Stats:
    folder = tmp_path_factory.mktemp("equal") / "stats"
    found = calibrate_with_gradients(demo_model_dir(), [TASK], folder, max_windows=24)
    return found, load_gradients(folder, found.info)


def measured(found: ExpertStats, gradients: GradientStats | None, share: float) -> dict[str, float]:
    """Contender -> mean KL divergence on held-out text of the task."""
    result: EqualBytes = equal_bytes(
        demo_model_dir(), found, TASK, share, gradients=gradients, max_windows=WINDOWS
    )
    budget_bytes = round(share * result.full_expert_bytes)
    assert all(each.expert_bytes <= budget_bytes for each in result.contenders)
    return {each.name: each.in_task_kld.value for each in result.contenders}


def test_at_half_the_bytes_the_plan_beats_every_single_method(stats: Stats) -> None:
    """Mixed bits without dropping are the plan's own optimum there: dropping pays further down.

    Planned without gradients, as `calibrate` does by default. With them it was
    less than twice below one type for all on these windows (six times on the benchmark's 24).
    """
    kld = measured(stats[0], None, 0.5)
    plan, mixed = kld.pop(PLAN_NAME), kld.pop(MIXED_BITS)
    assert plan <= 1.2 * mixed
    assert len(kld) == 5, "prune only, one type for all, three random draws"
    assert all(10 * plan < rival for rival in kld.values()), kld


def test_at_an_eighth_of_the_bytes_dropping_beats_mixed_bits(stats: Stats) -> None:
    kld = measured(*stats, 0.125)
    plan, mixed = kld.pop(PLAN_NAME), kld.pop(MIXED_BITS)
    assert 1.15 * plan < mixed
    assert all(3 * plan < rival for rival in kld.values()), kld
