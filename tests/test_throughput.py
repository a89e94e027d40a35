"""The throughput benchmark: rows measured again join the others, and every transform has a row."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console
from throughput import chosen_rows
from throughput_jobs import FULL, ROW_NAMES, TRANSFORMS, fewest_learned_tokens
from throughput_record import Costs, Job, Rates, Throughput, merge, show

from edge_moe.converters.recover_text import TrainText
from edge_moe.converters.transforms import METHODS
from edge_moe.errors import InputError
from edge_moe.measurement import Machine, Provenance

PRUNE, NAEE = "transform prune", "transform naee"


def found(
    seconds: dict[str, float], *, flops_per_second: float = 2e9, tokens: int = 8
) -> Throughput:
    """A measurement of one model of a million parameters; every job has 10^9 operations."""
    machine = Machine(cpu="c", cores=2, ram_bytes=1, os="o", python="p", packages={})
    jobs = [
        Job(name=n, seconds=s, cpu_seconds=s, flops=1e9, read_bytes=0, written_bytes=0)
        for n, s in seconds.items()
    ]
    return Throughput(
        provenance=Provenance(
            command="throughput.py",
            time=datetime(2026, 1, len(jobs), tzinfo=UTC),
            edge_moe_version="0",
            machine=machine,
        ),
        load_average=0.5,
        rates=Rates(
            matrix_flops_per_second=flops_per_second,
            read_bytes_per_second=1e9,
            write_bytes_per_second=1e9,
        ),
        models=[
            Costs(
                model="m",
                num_parameters=10**6,
                expert_parameters=1,
                calibration_tokens=tokens,
                forms=7,
                jobs=jobs,
            )
        ],
    )


def test_rows_measured_again_replace_their_own_and_the_others_stay() -> None:
    first = found({FULL: 5.0, NAEE: 3.0})
    merged = merge(first, found({NAEE: 2.0, PRUNE: 1.0, FULL: 4.0}), ROW_NAMES)
    assert {job.name: job.seconds for job in merged.models[0].jobs} == {
        FULL: 4.0,
        PRUNE: 1.0,
        NAEE: 2.0,
    }
    assert [job.name for job in merged.models[0].jobs] == [FULL, PRUNE, NAEE]
    again = merge(merged, found({PRUNE: 0.5}, flops_per_second=4e9), ROW_NAMES)
    assert again.provenance == first.provenance
    assert [each.rows for each in again.reruns] == [[NAEE, FULL], [PRUNE]]
    assert again.rates.matrix_flops_per_second == 4e9
    other = found({PRUNE: 1.0})
    other = other.model_copy(
        update={"models": [other.models[0].model_copy(update={"model": "other"})]}
    )
    assert [costs.model for costs in merge(first, other, ROW_NAMES).models] == ["m", "other"]


def test_rows_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    first = found({FULL: 5.0})
    with pytest.raises(InputError, match="measured on another model or text"):
        merge(first, found({PRUNE: 1.0}, tokens=9), ROW_NAMES)
    elsewhere = first.provenance.machine.model_copy(update={"cores": 64})
    with pytest.raises(InputError, match="on c with 2 cores, this is c with 64"):
        first.require_machine(elsewhere)
    path = tmp_path / "throughput.json"
    path.write_text(first.model_dump_json())
    assert Throughput.load(path) == first
    path.write_text("{")
    with pytest.raises(InputError, match="measure all rows"):
        Throughput.load(path)


def test_seconds_stand_beside_their_bound(capsys: pytest.CaptureFixture[str]) -> None:
    show(merge(found({FULL: 5.0}), found({PRUNE: 1.0}), ROW_NAMES), Console(width=150))
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if PRUNE in line).split("|")
    # 1 s and at least 0.5 s for 10^6 parameters
    assert [text.strip() for text in row[3:8]] == ["1.00", "1.00", "1,000", "500.0 (core)", "2.0"]
    assert "transform prune: 2026-01-01, load average 0.5" in printed


def test_every_transform_has_a_row() -> None:
    assert set(TRANSFORMS) == set(METHODS)
    assert chosen_rows(None) == ROW_NAMES
    assert chosen_rows(["naee", "gradients"]) == ("calibrate --gradients", NAEE)
    with pytest.raises(InputError, match="no row has 'x'"):
        chosen_rows(["prune", "x"])


def test_no_order_of_windows_learns_from_fewer_tokens() -> None:
    text = TrainText([[0] * 4, [0] * 2, [0] * 9, [0] * 3], [True, True, False, True])
    assert fewest_learned_tokens(text, 7) == 2 * (4 + 2 + 3) + 2
