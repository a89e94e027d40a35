"""The soak: its verdicts can fail, leaks are noticed, and both engines survive disk errors."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyCheckpoint
from float32_gguf import float32_gguf
from hand_plan import hand_plan
from soak import soak, table
from soak_faults import EXPECTED, INJECTED, damage, failing_reads, is_expected, provoked
from soak_verdicts import Ending, Fault, Run, Sample, growth, verdicts

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.errors import PackageError
from edge_moe.runtime.session import Session

IDS = list(range(1, 30))
CONTEXT = 64


def sample(seconds: float, **changes: int) -> Sample:
    known = {"rss_bytes": 900, "peak_bytes": 950, "data_bytes": 2000, "mappings": 100}
    known |= {"threads": 3, "files": 5, "answers": 1, "tokens": 1}
    return Sample(seconds=seconds, **(known | changes))


ENDING = Ending(
    seconds=9.0,
    fixed_answers=4,
    changed_answers=0,
    opened_sessions=1,
    misses=2,
    evictions=1,
    page_in_bytes=10,
    steps={},
)
FAULT = Fault(kind="EIO", seconds=1.0, seen="an error", is_as_expected=True, is_repaired=True)


def made(**changes: Any) -> Run:
    known: dict[str, Any] = {
        "engine": "gguf",
        "budget_bytes": 1000,
        "cgroup_bytes": None,
        "context_tokens": 8,
        "expert_bytes": 10,
        "max_map_count": 1000,
        "fault_kinds": ["EIO"],
        "samples": [sample(second) for second in range(10)],
        "faults": [FAULT],
        "ending": ENDING,
    }
    return Run(**(known | changes))


def failing(run: Run) -> list[str]:
    return [each.claim for each in verdicts(run) if not each.holds]


def rising(**steps: float) -> list[Sample]:
    """Samples in which a quantity rises by so much per second."""
    first = sample(0)
    return [
        sample(i, **{name: getattr(first, name) + int(step * i) for name, step in steps.items()})
        for i in range(10)
    ]


def test_growth_is_the_slope_of_the_second_half() -> None:
    assert growth(rising(files=2), "files") == pytest.approx(2 * 4)
    early = [sample(second, files=min(second, 4)) for second in range(10)]
    assert growth(early[:5] + [sample(second, files=4) for second in range(5, 10)], "files") == 0


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"samples": rising(rss_bytes=3)}, "resident memory does not grow"),
        ({"samples": rising(data_bytes=3)}, "data memory"),
        ({"samples": rising(mappings=6)}, "mappings do not grow"),
        ({"samples": rising(threads=0.5)}, "threads do not grow"),
        ({"samples": rising(files=0.5)}, "files do not grow"),
        ({"samples": [*rising(), sample(10, peak_bytes=1001)]}, "within the budget"),
        ({"samples": [sample(i, mappings=501) for i in range(10)]}, "far below the system's limit"),
        ({"samples": rising()[:2]}, "ran to its end"),
        ({"ending": None, "failure": "exit status 1"}, "ran to its end"),
        ({"ending": ENDING.model_copy(update={"changed_answers": 1})}, "gives the same bytes"),
        ({"ending": ENDING.model_copy(update={"evictions": 0})}, "experts were paged"),
        ({"faults": []}, "disk errors"),
        ({"faults": [FAULT.model_copy(update={"is_repaired": False})]}, "disk errors"),
        ({"faults": [FAULT.model_copy(update={"is_as_expected": False})]}, "disk errors"),
    ],
)
def test_every_verdict_can_fail(changes: dict[str, Any], claim: str) -> None:
    assert failing(made()) == []
    (found,) = failing(made(**changes))
    assert claim in found


# ---------------------------------------------------------------------------- processes

LEAKS = """
import threading
import soak_worker

kept, step = [], soak_worker.Soak.step

def leaking(self):
    step(self)
    kept.append(bytearray(b"x") * 1_000_000)
    kept.append(open(__file__))
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    self.expected = ""

soak_worker.Soak.step = leaking
soak_worker.main()
"""


@pytest.fixture
def tiny(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    return float32_gguf(tiny_checkpoint("qwen3_moe"), tmp_path / "tiny.gguf")


def run_of(model: Path, folder: Path, **options: Any) -> Run:
    text = folder / "text.txt"
    text.write_text("def read(path):\n    return open(path).read()\n" * 40)
    times = {"seconds": 5, "every_seconds": 0.3, "context_tokens": CONTEXT}
    return soak("gguf", model, text, **(times | options))


@pytest.mark.slow
def test_a_short_soak_of_a_tiny_model(tiny: Path, tmp_path: Path) -> None:
    run = run_of(tiny, tmp_path)
    assert run.failure == "" and run.ending is not None
    assert {each.kind for each in run.faults} == set(EXPECTED)
    assert run.ending.opened_sessions == 8 and run.ending.fixed_answers > 10
    assert len(run.ending.steps) > 2, "kinds of work"
    # in five seconds the first sessions' memory still looks like growth
    growing = "resident memory does not grow", "data memory (VmData) does not grow"
    assert [claim for claim in failing(run) if not claim.startswith(growing)] == []
    assert abs(growth(run.samples, "rss_bytes")) < 5e6
    assert table(verdicts(run)).row_count == 10


@pytest.mark.slow
def test_leaks_are_noticed(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "leaking.py"
    worker.write_text(LEAKS)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent / "benchmarks"), ":")
    monkeypatch.setattr("soak.CGROUP_MARGIN", 3)  # else the kernel ends it
    run = run_of(tiny, tmp_path, worker=worker)
    assert run.failure == ""
    found = " ".join(failing(run))
    for word in (
        "the budget",
        "resident",
        "data memory",
        "threads",
        "files",
        "same bytes",
        "disk errors",
    ):
        assert word in found


def test_a_process_that_dies_is_a_verdict(tiny: Path, tmp_path: Path) -> None:
    worker = tmp_path / "dying.py"
    worker.write_text("raise SystemExit('out of luck')")
    (found,) = verdicts(run_of(tiny, tmp_path, worker=worker))
    assert not found.holds and "exit status 1: out of luck" in found.seen


# ---------------------------------------------------------------------------- the native engine


@pytest.fixture
def package(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    plan = hand_plan(Checkpoint(tiny_checkpoint("qwen3_moe")), [["bf16"] * 8] * 2)
    return build(plan, tmp_path / "package")


@pytest.fixture
def running(package: Path) -> Iterator[Session]:
    with Session.open(package, context_tokens=CONTEXT, num_slots=3) as session:
        yield session


@pytest.mark.parametrize("kind", INJECTED)
def test_errors_of_a_package_name_its_file(kind: str, package: Path, running: Session) -> None:
    expected = running.logits(IDS)
    with failing_reads(kind):
        error = provoked(lambda: running.logits(IDS), (OSError, PackageError))
    assert is_expected(kind, error, package), error
    running.check_integrity()
    assert running.logits(IDS).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", ["truncated", "written to"])
def test_a_package_that_changes_while_it_runs(kind: str, package: Path, running: Session) -> None:
    """Checksums are verified only once."""
    running.logits(IDS)
    damage(kind, package)
    with pytest.raises(
        PackageError, match=r"experts-.* has changed while the model was running: start"
    ):
        running.logits(IDS)


def opened_and_closed(package: Path, *, is_after_error: bool) -> list[weakref.ref[Any]]:
    """The model and the cache of a session that nobody has any more."""
    session = Session.open(package, context_tokens=CONTEXT, num_slots=3)
    session.generate_ids(IDS, 3)
    if is_after_error:
        with failing_reads("EIO"):
            assert provoked(lambda: session.logits(IDS), (OSError,)) is not None
    session.close()
    return [weakref.ref(session.model), weakref.ref(session._residency.cache)]


@pytest.mark.parametrize("is_after_error", [False, True])
def test_closing_frees_the_slots_at_once(package: Path, is_after_error: bool) -> None:
    gc.disable()
    try:
        model, cache = opened_and_closed(package, is_after_error=is_after_error)
        assert model() is None and cache() is None
    finally:
        gc.enable()
