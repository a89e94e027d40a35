"""The machine at hand as a device of `simulate`: measured, remembered, and used."""

from __future__ import annotations

import json
import math
import mmap
import os
import time
from pathlib import Path
from unittest import mock

import pytest
from conftest import TinyCheckpoint
from float32_gguf import float32_gguf
from hand_plan import hand_plan

from edge_moe.checkpoint import Checkpoint
from edge_moe.cli import run
from edge_moe.commands import this_device
from edge_moe.commands.this_device import measured_here
from edge_moe.converters.build import build
from edge_moe.errors import InputError
from edge_moe.package import Package
from edge_moe.runtime import storage_rate, this_machine, traced_model
from edge_moe.runtime.session import Session
from edge_moe.runtime.this_machine import Measured, machine_rates
from edge_moe.runtime.traced_model import open_traced


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nobody's own; and little time for the disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(storage_rate, "_SECONDS", 0.05)
    monkeypatch.setattr(this_machine, "_ARRAY_BYTES", 2**20)
    return tmp_path / "cache" / "edge-moe" / "machine.json"


def file_of(folder: Path, name: str, num_bytes: int) -> Path:
    (folder / name).write_bytes(bytes(num_bytes))
    return folder / name


def test_rates_are_measured_once(cache: Path, tmp_path: Path) -> None:
    model = file_of(tmp_path, "model.gguf", 3 * 2**20)
    first = machine_rates(model, 20_000)
    assert first.memory.value > 1e6 and len(first.storage) == 1
    assert machine_rates(model, 20_000) == first
    assert json.loads(cache.read_text()) == json.loads(first.model_dump_json())
    more = machine_rates(model, 40_000)
    assert more.memory == first.memory and len(more.storage) == 2
    profile = more.profile(model, 40_000, "nobody")
    assert profile.device == "cpu" and profile.storage_bytes_per_second is not None
    assert "pieces of 36864 bytes" in profile.sources["storage_bytes_per_second"]
    assert profile.sources["memory_bytes_per_second"].startswith("measured on 20")
    assert "compute_seconds" not in profile.sources
    again = machine_rates(model, 20_000, again=True)
    assert len(again.storage) == 1 and again.memory != first.memory
    with mock.patch.object(this_machine, "this_machine") as other:
        other.return_value = first.machine.model_copy(update={"cpu": "another"})
        assert machine_rates(model, 20_000).memory != again.memory
    cache.write_text('{"machine": 3}')  # damaged: measured anew
    assert len(machine_rates(model, 20_000).storage) == 1


class FakeDisk:
    """Reads 1 GB per second of the clock, whoever reads."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.under_way: list[int] = []

    def seconds(self) -> float:
        return self.num_bytes / 1e9

    def preadv(self, _descriptor: int, buffers: list[mmap.mmap], offset: int) -> int:
        assert offset % 4096 == 0 and offset + 8192 <= 2**20
        self.num_bytes += len(buffers[0])
        return len(buffers[0])

    def set_list(self, reads: list[tuple[int, int, int, int]]) -> None:
        assert all(offset % 4096 == 0 and offset + 8192 <= 2**20 for _, offset, _, _ in reads)
        assert all(address % 4096 == 0 and size == 8192 for _, _, address, size in reads)

    def begin(self, indices: list[int]) -> int:
        self.under_way += indices
        return len(indices)

    def over(self, at_least: int) -> list[tuple[int, int]]:
        assert 0 < at_least <= len(self.under_way) <= 12
        self.num_bytes += 8192
        return [(self.under_way.pop(0), 8192)]

    def close(self) -> None:
        assert not self.under_way


@pytest.mark.parametrize("has_threads", [False, True])
def test_storage_is_that_of_reads_at_random(
    has_threads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, disk = file_of(tmp_path, "weights", 2**20), FakeDisk()
    reads = mock.Mock(side_effect=OSError) if has_threads else lambda _: disk
    monkeypatch.setattr(storage_rate, "DirectReads", reads)
    monkeypatch.setattr(storage_rate, "open_direct", lambda path: (os.open(path, 0), True))
    monkeypatch.setattr(os, "preadv", disk.preadv)
    monkeypatch.setattr(time, "perf_counter", disk.seconds)
    found, how = storage_rate.storage_rate([file], 9000)
    assert found == pytest.approx(1e9, rel=0.01)
    expected = "4 threads read pieces" if has_threads else "12 pieces"
    assert how.startswith(f"{expected} of 8192 bytes") and how.endswith("past the page cache")


def test_storage_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing cannot be read \(No such file"):
        storage_rate.storage_rate([tmp_path / "nothing"], 9000)


def test_files_that_hold_the_weights(tmp_path: Path) -> None:
    large = [file_of(tmp_path, name, 40_000) for name in ("a.safetensors", "b.safetensors")]
    file_of(tmp_path, "config.json", 100)
    assert sorted(this_machine.weight_files(tmp_path)) == large
    assert this_machine.weight_files(large[0]) == large[:1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no file"):
        this_machine.weight_files(tmp_path / "empty")


def test_a_token_is_the_median() -> None:
    now, taken = [0.0], iter([9.0] * 4 + [1.0, 2.0, 3.0] * 8)

    def step(_: int) -> None:
        now[0] += next(taken)

    with mock.patch("time.perf_counter", lambda: now[0]):
        found = this_machine.token_seconds(step, [1] * this_machine.NUM_TOKENS)
    assert found.value == 2.0 and found.how.startswith("median of 24 tokens")


@pytest.mark.parametrize("kind", ["native", "gguf"])
def test_command_line(
    kind: str,
    cache: Path,
    tiny_checkpoint: TinyCheckpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_checkpoint("qwen3_moe")
    if kind == "gguf":
        pytest.importorskip("gguf")
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
        model = float32_gguf(model, tmp_path / "model.gguf")
    text, trace = tmp_path / "text.txt", tmp_path / "t.safetensors"
    text.write_text("\n".join(f"line {n} of a text" for n in range(60)))
    shape = ["--window-tokens", "40", "--prompt-tokens", "4", "--max-windows", "2"]
    assert run(["trace", str(model), "--task", str(text), "-o", str(trace), *shape]) == 0
    asked = ["simulate", str(trace), str(model), "--slots", "3", "--device", "this"]
    capsys.readouterr()
    assert run([*asked, "--predictors", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rates = this_machine.MachineRates.model_validate_json(cache.read_text())
    (compute,), (storage,) = rates.compute.values(), rates.storage.values()
    assert found["device"].startswith("this machine (")
    assert found["sources"]["compute_seconds"] == compute.describe()
    assert "every expert in memory" in compute.how
    size = found["sizes"][0]
    term, paged = size["limit"], size["policies"][0]["page_in_bytes_per_token"]
    assert term["measured_compute_seconds"] == compute.value
    assert term["storage_seconds"] == pytest.approx(paged / storage.value, rel=1e-6)
    serial = 1 / (compute.value + term["storage_seconds"])
    assert term["serial_tokens_per_second"] == pytest.approx(serial)
    plain = next(each for each in size["timelines"] if each["predictor"] == "none")
    single = plain["num_tokens"] * compute.value
    assert plain["seconds"] == pytest.approx(single + plain["stall_seconds"])
    assert run(asked) == 0  # nothing is measured again
    printed = capsys.readouterr().out
    assert "computing, measured" in printed and "dense weights" not in printed
    assert rates == this_machine.MachineRates.model_validate_json(cache.read_text())
    monkeypatch.setattr(this_device, "available_memory_bytes", lambda: 10**6)
    assert run([*asked, "--measure-again", "--json"]) == 0
    captured = capsys.readouterr()
    assert "a token is not timed: the whole model takes" in " ".join(captured.err.split())
    term = json.loads(captured.out)["sizes"][0]["limit"]
    assert term["measured_compute_seconds"] is None and math.isfinite(term["dense_seconds"])
    assert run([*asked[:-1], "cpu", "--measure-again"]) == 2
    assert "add --device this" in " ".join(capsys.readouterr().err.split())


def test_a_token_of_each_build_is_timed_for_itself(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint's trace fits its packages, whose forms and kernels take another time."""
    folder = tiny_checkpoint("qwen3_moe", wide=True)
    builds = [
        build(hand_plan(Checkpoint(folder), [[form] * 8] * 2), tmp_path / form)
        for form in ("bf16", "q8_0", "q4_k")
    ]
    models = [open_traced(path, "cpu") for path in (folder, *builds)]
    assert len({model.fingerprint for model in models}) == 1
    with Session.open(folder) as session, session.tracing() as recorder:
        session.logits(list(range(1, 29)))
        trace = recorder.finish(session.trace_info())
    taken = iter([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(
        this_machine, "token_seconds", lambda *_: Measured.now(next(taken), "by hand")
    )
    for _ in range(2):  # the second time all are remembered
        found = [
            measured_here(path, model, trace, again=False)[1]
            for path, model in zip((folder, *builds), models, strict=True)
        ]
        assert found == [1.0, 2.0, 3.0, 4.0]
    key = models[2].computed_as
    for kernels in ("exact", "ggml"):
        monkeypatch.setattr(traced_model, "automatic_label", lambda _, name=kernels: name)
        assert models[2].computed_as.endswith(f", kernels {kernels}")
    with Session.open(builds[1]) as session:
        assert key == f"{Package(builds[1]).own_fingerprint}, kernels {session.kernels}"


def test_what_was_measured_says_when() -> None:
    found = Measured.now(2.0, "by hand")
    assert found.describe() == f"measured on {found.time:%Y-%m-%d}: by hand"
