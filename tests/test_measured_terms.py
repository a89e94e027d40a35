"""A run measures the terms of its bill: the KV cache from its tensors, the runtime by its probe."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TinyCheckpoint

from edge_moe.budget import kv_itemsize_bytes
from edge_moe.commands import generation
from edge_moe.overhead import SPREAD, probed_bytes, tokenizer_bytes
from edge_moe.plan import CalibrationOptions, MemoryTerm


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_kv_cache_bytes_are_those_of_the_formula(
    tiny_checkpoint: TinyCheckpoint, family: str
) -> None:
    from edge_moe.runtime.session import Session

    with Session.open(tiny_checkpoint(family), device="cpu", context_tokens=64) as session:
        pieces = session.generate("abc", max_new_tokens=5)
        next(pieces)
        del pieces  # closed early, as after a stop text or Ctrl-C
        timing = session.timing
        itemsize = kv_itemsize_bytes(session.spec, "cpu", "native")
        per_token = session.spec.kv_bytes_per_token(itemsize)
    assert 3 <= timing.cached_tokens <= 8
    assert timing.cache_bytes == timing.cached_tokens * per_token


def test_the_runtime_is_what_the_probe_measured(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("x" * 1000)
    planned = round(1_000_000 * (1 + SPREAD)) + tokenizer_bytes(tmp_path)
    assert probed_bytes(planned, tmp_path) == 1_000_000 + tokenizer_bytes(tmp_path)


@pytest.mark.parametrize(("source", "is_known"), [("measured", True), ("assumed", False)])
def test_an_assumed_runtime_is_not_called_measured(
    tmp_path: Path, source: str, is_known: bool
) -> None:
    class FakeSession:
        measured_terms = {"experts": 5}  # noqa: RUF012

        class timing:  # noqa: N801
            cache_bytes = 7

        @staticmethod
        def memory() -> list[MemoryTerm]:
            return [
                MemoryTerm.model_validate({"name": "runtime", "num_bytes": 9, "source": source})
            ]

    found = generation._measured_terms(FakeSession, tmp_path)  # type: ignore[arg-type]
    assert found["experts"] == 5 and found["KV cache"] == 7
    assert ("runtime" in found) == is_known


def test_calibration_options_know_their_files(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `plan` and the reproduce commands need: whole paths, and every option."""
    from edge_moe.converters.calibrate import calibrate

    (tmp_path / "mine.txt").write_text("some words to watch\n" * 10)
    monkeypatch.chdir(tmp_path)
    stats = calibrate(
        tiny_checkpoint("qwen3_moe"),
        ["mine.txt"],
        tmp_path / "stats",
        window_tokens=16,
        max_windows=4,
        shard=(1, 2),
        forms=("q8_0",),
    )
    assert stats.info.options == CalibrationOptions(
        tasks=(str(tmp_path / "mine.txt"),),
        window_tokens=16,
        max_windows=4,
        forms=("drop", "q8_0"),
        shards=((1, 2),),
    )
