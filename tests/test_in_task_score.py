"""The table of `benchmarks/in_task_score.py`."""

from __future__ import annotations

from typing import Any

import pytest
from in_task_score import print_scores
from rich.console import Console

from edge_moe.measurement import EvalResult, Provenance
from edge_moe.metrics import Comparison, Estimate


def result(task: str, **values: Any) -> EvalResult:
    some = Estimate(0.1, 0.01)
    comparison = Comparison(
        ln_ppl_ratio=some,
        ppl_ratio=some,
        mean_kld=some,
        median_kld=0.1,
        kld_90=0.1,
        kld_95=0.1,
        kld_99=0.1,
        max_kld=0.1,
        rms_delta_p=some,
        same_top_p=Estimate(0.905, 0.004),
    )
    settings: dict[str, Any] = {
        "provenance": Provenance.published(),
        "model": "50%",
        "model_kind": "package",
        "against": "tiny",
        "task": task,
        "in_task": True,
        "window_tokens": 256,
        "num_windows": 2,
        "num_tokens": 510,
        "perplexity": some,
        "comparison": comparison,
        "seconds": 1.0,
    }
    return EvalResult(**settings | values)


def rows(*results: EvalResult, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    print_scores(results, Console(width=120))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return [[text.strip() for text in line.split("|")[1:-1]] for line in lines[2:]]


def test_what_is_kept_has_an_error_bar(capsys: pytest.CaptureFixture[str]) -> None:
    solved = result(
        "arithmetic",
        num_problems=200,
        exact_match=Estimate(0.6, 0.03),
        base_exact_match=Estimate(0.8, 0.025),
        recovery_of="exact match",
        recovery_percent=75.0,
        recovery_error_percent=2.5,
    )
    assert rows(result("code"), solved, capsys=capsys) == [
        ["code", "same top token, of 510", "100 %", "90.5 ± 0.4 %", "90.5 ± 0.4 %"],
        ["arithmetic", "problems solved, of 200", "80.0 ± 2.5 %", "60.0 ± 3.0 %", "75.0 ± 2.5 %"],
    ]


def test_tokens_count_where_the_original_solves_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    nothing = Estimate(0.0, 0.01)
    found = result("arithmetic", num_problems=9, exact_match=nothing, base_exact_match=nothing)
    assert rows(found, capsys=capsys)[0][1] == "same top token, of 510"
    with pytest.raises(ValueError, match="code was not evaluated beside the original"):
        rows(result("code", comparison=None), capsys=capsys)
