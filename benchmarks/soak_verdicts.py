"""What `soak.py` concludes from what its processes reported: samples, disk errors, and the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

MEMORY_SHARE = 0.01
"""Memory may grow by this share of the budget over the second half: what a fit of noise gives."""
MAPPING_SHARE = 0.05
"""... and mappings by this share of their mean: which pages are merged depends on who is here."""
FEWEST_MAPPINGS = 20
COUNT = 0.5
"""... and threads and files by less than one."""
FEWEST_SAMPLES = 6


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sample(_Model):
    """The process at one moment, after the fixed prompt."""

    seconds: float
    """Since the session was opened."""
    rss_bytes: int
    peak_bytes: int
    """Highest resident set since the sample before."""
    data_bytes: int
    """VmData: what was asked of the system."""
    mappings: int
    threads: int
    files: int
    answers: int
    tokens: int


class Fault(_Model):
    """One disk error, and what came of it."""

    kind: str
    seconds: float
    seen: str
    """The error that the caller got, or that there was none."""
    is_as_expected: bool
    """A clear error that names the file, or none where reading can go on."""
    is_repaired: bool
    """The next answer has the bytes of the first one, and the bookkeeping is consistent."""


class Ending(_Model):
    """Counted over all sessions of the process."""

    seconds: float
    fixed_answers: int
    changed_answers: int
    opened_sessions: int
    misses: int
    evictions: int
    page_in_bytes: int
    steps: dict[str, int]


class Run(_Model):
    """One engine."""

    engine: str
    budget_bytes: int
    cgroup_bytes: int | None
    """None where no memory cgroup could be made."""
    context_tokens: int
    expert_bytes: int
    """Of the whole model."""
    max_map_count: int
    fault_kinds: list[str]
    samples: list[Sample]
    faults: list[Fault]
    ending: Ending | None
    """None if the process did not come to its end; then `failure` says why."""
    failure: str = ""


class Verdict(_Model):
    """One claim, what was seen, and whether it holds."""

    engine: str
    claim: str
    seen: str
    limit: str
    holds: bool


def growth(samples: Sequence[Sample], name: str) -> float:
    """Over the second half of the time: the slope of least squares, times the half's length."""
    half = second_half(samples)
    seconds = np.array([each.seconds for each in half])
    values = np.array([getattr(each, name) for each in half], np.float64)
    moved = seconds - seconds.mean()
    slope = float(moved @ (values - values.mean()) / (moved @ moved))
    return slope * float(seconds[-1] - seconds[0])


def second_half(samples: Sequence[Sample]) -> list[Sample]:
    """Caches are full, and the trial of guesses is over."""
    middle = samples[-1].seconds / 2
    return [each for each in samples if each.seconds >= middle]


def verdicts(run: Run) -> list[Verdict]:
    """Every claim about one engine."""
    end = run.ending
    if end is None or len(run.samples) < FEWEST_SAMPLES or len(second_half(run.samples)) < 3:
        failure = run.failure or f"{len(run.samples)} samples: too few for a verdict"
        return [
            Verdict(engine=run.engine, claim="ran to its end", seen=failure, limit="", holds=False)
        ]
    found = [_budget(run), _paging(run, end), _answers(run, end), _faults(run), _map_count(run)]
    return found + [_growth(run, name) for name in ("rss_bytes", "data_bytes")] + _counts(run)


def _budget(run: Run) -> Verdict:
    peak = max(each.peak_bytes for each in run.samples)
    cgroup = "" if run.cgroup_bytes is None else f", cgroup of {run.cgroup_bytes / 1e6:.1f} MB"
    return Verdict(
        engine=run.engine,
        claim="peak memory is within the budget",
        seen=f"{peak / 1e6:.1f} MB{cgroup}",
        limit=f"{run.budget_bytes / 1e6:.1f} MB",
        holds=peak <= run.budget_bytes,
    )


def _paging(run: Run, end: Ending) -> Verdict:
    return Verdict(
        engine=run.engine,
        claim="experts were paged",
        seen=f"{end.evictions} evictions, {end.page_in_bytes / 1e9:.1f} GB read",
        limit="at least 1",
        holds=end.evictions > 0,
    )


def _answers(run: Run, end: Ending) -> Verdict:
    return Verdict(
        engine=run.engine,
        claim="a fixed prompt gives the same bytes",
        seen=f"{end.changed_answers} of {end.fixed_answers} differ",
        limit="0",
        holds=end.changed_answers == 0 and end.fixed_answers > 1,
    )


def _faults(run: Run) -> Verdict:
    missing = sorted(set(run.fault_kinds) - {each.kind for each in run.faults})
    bad = [each for each in run.faults if not (each.is_as_expected and each.is_repaired)]
    said = "; ".join(f"{each.kind}: {each.seen}" for each in bad[:2])
    return Verdict(
        engine=run.engine,
        claim="disk errors are said, and corrupt nothing",
        seen=f"{len(bad)} of {len(run.faults)} do not {said}".strip()
        + (f", missing: {', '.join(missing)}" if missing else ""),
        limit="0",
        holds=not bad and not missing,
    )


def _map_count(run: Run) -> Verdict:
    most = max(each.mappings for each in run.samples)
    return Verdict(
        engine=run.engine,
        claim="memory mappings stay far below the system's limit",
        seen=str(most),
        limit=str(run.max_map_count // 2),
        holds=most <= run.max_map_count // 2,
    )


def _growth(run: Run, name: str) -> Verdict:
    grown, allowed = growth(run.samples, name), MEMORY_SHARE * run.budget_bytes
    label = {"rss_bytes": "resident memory", "data_bytes": "data memory (VmData)"}[name]
    return Verdict(
        engine=run.engine,
        claim=f"{label} does not grow in the second half",
        seen=f"{grown / 1e6:+.2f} MB",
        limit=f"{allowed / 1e6:.2f} MB",
        holds=grown <= allowed,
    )


def _counts(run: Run) -> list[Verdict]:
    mean = float(np.mean([each.mappings for each in second_half(run.samples)]))
    limits = {
        "mappings": max(FEWEST_MAPPINGS, MAPPING_SHARE * mean),
        "threads": COUNT,
        "files": COUNT,
    }
    found = []
    for name, allowed in limits.items():
        grown = growth(run.samples, name)
        found.append(
            Verdict(
                engine=run.engine,
                claim=f"{name} do not grow in the second half",
                seen=f"{grown:+.1f}, {getattr(run.samples[-1], name)} at the end",
                limit=f"{allowed:.1f}",
                holds=grown <= allowed,
            )
        )
    return found


def max_map_count() -> int:
    """How many mappings the system lets a process have."""
    return int(Path("/proc/sys/vm/max_map_count").read_text())
