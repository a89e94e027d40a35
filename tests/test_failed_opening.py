"""A session that cannot be opened leaves no open file and no thread behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from conftest import TinyCheckpoint
from hand_plan import hand_plan

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.errors import EdgeMoeError, InputError, PackageError
from edge_moe.package import ExpertRecord, Package
from edge_moe.runtime import residency
from edge_moe.runtime.session import Session
from edge_moe.runtime.stalls import StallOptions


@pytest.fixture
def package(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    source = Checkpoint(tiny_checkpoint("qwen3_moe", wide=True))
    plan = hand_plan(source, [["q8_0"] * 8] * 2)
    return build(plan, tmp_path / "out", shadow="tq2_0")


def held() -> tuple[int, int]:
    """(open files, threads) of this process."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def damage(folder: Path, record: ExpertRecord) -> None:
    with (folder / record.file).open("r+b") as file:
        file.seek(record.offset)
        first = file.read(1)
        file.seek(record.offset)
        file.write(bytes([first[0] ^ 1]))


def leaves_nothing(attempt: Callable[[], object], error: type[EdgeMoeError], match: str) -> bool:
    before = held()
    for _ in range(2):
        with pytest.raises(error, match=match):
            attempt()
    return held() == before


def test_a_damaged_expert(package: Path) -> None:
    """It is the third: two were read from files that are open by then."""
    damage(package, Package(package).manifest.layers[0].experts[2])
    match = "layer 0 expert 2 is damaged"
    assert leaves_nothing(lambda: Session.open(package), PackageError, match)


def test_a_damaged_shadow(package: Path) -> None:
    damage(package, Package(package).manifest.layers[1].shadows[7])
    stall = StallOptions("never")
    match = "layer 1 expert 7 is damaged"
    assert leaves_nothing(
        lambda: Session.open(package, num_slots=3, stall=stall), PackageError, match
    )


def test_what_fails_when_all_but_the_session_is_there(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "attach", mock.Mock(side_effect=InputError("no room")))
    assert leaves_nothing(
        lambda: Session.open(package, num_slots=3, prefetch=True), InputError, "no room"
    )
    stall = StallOptions("never")
    assert leaves_nothing(
        lambda: Session.open(package, num_slots=3, stall=stall), InputError, "no room"
    )
