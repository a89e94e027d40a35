"""Experts of a GGUF paged by us: bit for bit what stock llama.cpp computes, whatever is there."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import memory_cgroup
import numpy as np
import numpy.typing as npt
import pytest
from conftest import TinyCheckpoint
from float32_gguf import float32_gguf
from gguf_files import requantised

from edge_moe.cli import run
from edge_moe.errors import BudgetError, CheckpointError, DiskSpaceError, InputError
from edge_moe.families import FAMILIES
from edge_moe.gguf_model import GgufModel
from edge_moe.runtime import (
    gguf_experts,
    gguf_session,
    llama_region,
    llama_stream,
    paged_llama,
)
from edge_moe.runtime.direct_reads import DirectReads
from edge_moe.runtime.gguf_session import GgufSession
from edge_moe.runtime.interleaved_trial import FastestOf
from edge_moe.runtime.policies import DEFAULT_POLICY
from edge_moe.runtime.policy import LeastRecentlyUsed
from edge_moe.runtime.policy_memory import TERM_NAME
from edge_moe.runtime.predictor_choice import PREDICTORS
from edge_moe.runtime.predictors import Repeat, Transitions
from edge_moe.runtime.read_ahead import ReadAhead

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

FloatArray = npt.NDArray[np.float32]
IDS = [int(i) for i in np.random.default_rng(0).integers(1, 250, 40)]
CONTEXT = 64
UNWRITTEN = ("deepseek_v2", "phimoe")
"""Families whose minimal models llama.cpp routes otherwise."""
READ = sorted(
    name for name, family in FAMILIES.items() if family.gguf_arch and name not in UNWRITTEN
)


@pytest.fixture(scope="module")
def gguf_of(
    tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp("gguf")
            made[family] = float32_gguf(tiny_checkpoint(family), folder / f"{family}.gguf")
        return made[family]

    return make


def stock_logits(path: Path, batch_tokens: int, *, rearranges: bool = False) -> FloatArray:
    """[T, V] by llama.cpp with its own mapping of the file: prompt, then token by token."""
    from llama_cpp import llama_cpp as llama

    llama.llama_backend_init()
    options = llama.llama_model_default_params()
    options.use_extra_bufts, options.n_gpu_layers = rearranges, 0
    model = llama.llama_model_load_from_file(os.fsencode(path), options)
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = CONTEXT, batch_tokens, batch_tokens
    settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
    context = llama.llama_init_from_model(model, settings)
    width = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    rows: list[FloatArray] = []
    for start, ids in _pieces(batch_tokens):
        batch = llama.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index], batch.logits[index] = token, start + index, 1
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        assert llama.llama_decode(context, batch) == 0
        rows += [
            np.ctypeslib.as_array(llama.llama_get_logits_ith(context, index), (width,)).copy()
            for index in range(len(ids))
        ]
        llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return np.stack(rows)


def _pieces(batch_tokens: int) -> Iterator[tuple[int, list[int]]]:
    """30 tokens in batches, then one at a time."""
    for start in range(0, 30, batch_tokens):
        yield start, IDS[start : min(start + batch_tokens, 30)]
    for start in range(30, len(IDS)):
        yield start, IDS[start : start + 1]


def paged_logits(session: GgufSession) -> FloatArray:
    context = session._context
    context.clear()
    rows = [context.decode(IDS[:30], 0, keep_all=True)]
    rows += [context.decode([token], 30 + index) for index, token in enumerate(IDS[30:])]
    session.check_integrity()
    return np.concatenate(rows)


@pytest.fixture
def unprobed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of our own need not be opened in another process first."""
    monkeypatch.setattr(gguf_session, "require_loadable", lambda *_: None)


@pytest.mark.parametrize("family", READ)
@pytest.mark.usefixtures("unprobed")
def test_logits_are_those_of_stock_llama_cpp(family: str, gguf_of: Callable[[str], Path]) -> None:
    path = gguf_of(family)
    spec = GgufModel(path).spec
    total = spec.num_experts * spec.num_moe_layers
    expected: dict[int, FloatArray] = {}
    for num_slots in sorted({spec.top_k, spec.top_k + 1, spec.num_experts, total - 1, total}):
        for prefetch in (False, True):
            with GgufSession.open(
                path, context_tokens=CONTEXT, num_slots=num_slots, prefetch=prefetch
            ) as session:
                found = paged_logits(session)
                batch_tokens = session._context._batch_tokens
                assert session.is_paging == (num_slots < total)
                if num_slots <= spec.num_experts:
                    assert session.statistics().misses > 0
            if batch_tokens not in expected:
                expected[batch_tokens] = stock_logits(path, batch_tokens)
            assert np.array_equal(found, expected[batch_tokens]), num_slots


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("name", sorted({*PREDICTORS} - {"linear"}))
def test_no_guess_changes_a_result(name: str, gguf_of: Callable[[str], Path]) -> None:
    path = gguf_of("qwen3_moe")
    options: dict[str, Any] = {"context_tokens": CONTEXT, "num_slots": 5}
    with GgufSession.open(path, **options, prefetch=False) as session:
        expected = paged_logits(session)
        assert session.statistics().predicted_misses == 0
    with GgufSession.open(path, **options, prefetch=True, predictors=[name]) as session:
        assert np.array_equal(paged_logits(session), expected)
        was_asked = session.statistics().predicted_misses > 0
        assert was_asked == (name != "token")  # none comes twice
        assert session.prefetch_trial is None
    with GgufSession.open(path, **options, predictors=[name, "router"]) as session:
        assert np.array_equal(paged_logits(session), expected)
        assert session.prefetch_trial is not None and not session.prefetch_trial.is_over


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["oracle"], "predictor 'oracle' is unknown"),
        ([], "no predictor is named"),
        (["linear"], "a linear map guesses in edge-moe's own runtime"),
    ],
)
def test_predictors_that_cannot_be_had(
    names: list[str], message: str, gguf_of: Callable[[str], Path]
) -> None:
    with pytest.raises(InputError, match=message):
        GgufSession.open(gguf_of("qwen3_moe"), num_slots=5, predictors=names)


@pytest.mark.usefixtures("unprobed")
def test_threads_read_where_the_system_does_not(
    gguf_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = gguf_of("qwen3_moe")
    found = []
    for is_direct in (True, False):
        if not is_direct:
            monkeypatch.setattr(gguf_experts, "open_direct_queue", lambda *_: None)
        before = threading.active_count()
        with GgufSession.open(path, context_tokens=CONTEXT, num_slots=3, prefetch=True) as session:
            found.append(paged_logits(session))
            has_threads = threading.active_count() > before
            assert has_threads == (not is_direct or not session._experts._files.are_direct)
    assert np.array_equal(found[0], found[1])


@pytest.mark.usefixtures("unprobed")
def test_parts_of_a_split_model_page_as_one(
    tiny_checkpoint: TinyCheckpoint, gguf_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("qwen3_moe")
    first = float32_gguf(source, tmp_path / "split.gguf", split_max_tensors=5)
    assert len(list(tmp_path.glob("split-*.gguf"))) > 2
    with GgufSession.open(first, context_tokens=CONTEXT, num_slots=3) as session:
        found = paged_logits(session)
    with GgufSession.open(gguf_of("qwen3_moe"), context_tokens=CONTEXT, num_slots=3) as session:
        assert np.array_equal(found, paged_logits(session))


@pytest.fixture
def quantised(gguf_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """Experts of 4 and 6 bits, whose rows end anywhere in a page."""
    types = {"ffn_(gate|up)_exps": "Q4_0", "ffn_down_exps": "Q8_0"}
    return requantised(gguf_of("qwen3_moe"), tmp_path / "quantised.gguf", types)


@pytest.fixture(scope="module")
def wide(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of many pages."""
    folder = tmp_path_factory.mktemp("wide")
    whole = float32_gguf(tiny_checkpoint("qwen3_moe", wide=True), folder / "float32.gguf")
    types = {"ffn_(gate|up)_exps": "Q4_0", "ffn_down_exps": "Q4_1"}
    types["attn_(q|k|v|output).weight"] = "Q4_0"  # which llama.cpp rearranges by default
    return requantised(whole, folder / "wide.gguf", types)


def test_text_and_chat_are_those_of_llama_cpp_python(quantised: Path) -> None:
    from llama_cpp import Llama

    stock = Llama(str(quantised), n_ctx=CONTEXT, n_batch=512, verbose=False)
    asked = stock.create_completion("def f(", max_tokens=20, temperature=0.0, repeat_penalty=1.0)
    expected = asked["choices"][0]["text"]  # type: ignore[index]
    stock.close()
    for num_slots in (2, 5, 15):
        with GgufSession.open(quantised, context_tokens=CONTEXT, num_slots=num_slots) as session:
            assert "".join(session.generate("def f(", max_new_tokens=20)) == expected
            assert "".join(session.generate("def f(", max_new_tokens=20)) == expected, "again"
            assert session.timing.generated_tokens == 20
            with pytest.raises(InputError, match="no chat template"):
                next(session.generate([{"role": "user", "content": "hello"}]))
            with pytest.raises(InputError, match="prompt has .* tokens but the context holds 64"):
                next(session.generate("x" * 200))


def test_a_sequence_is_forgotten_by_the_next(quantised: Path) -> None:
    with GgufSession.open(quantised, context_tokens=CONTEXT, num_slots=4) as session:
        first = session.logits(IDS[:20])
        session.logits(IDS[20:])
        assert np.array_equal(session.logits(IDS[:20]), first)


def test_of_a_chat_only_what_is_new_is_computed(quantised: Path) -> None:
    changed = [*IDS[:15], 7, 8, 9]
    with GgufSession.open(quantised, context_tokens=CONTEXT, num_slots=4) as session:
        context, expected = session._context, session.logits(changed)
        for first, kept in ((IDS[:20], 15), (changed, 17), (IDS[20:], 0)):
            session.logits(first)
            assert context.keep_prefix(changed) == kept
            found = context.decode(changed[kept:], kept, keep_all=True)
            assert np.abs(found - expected[kept:]).max() < 1e-4


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("family", ["qwen3_next", "gpt_oss"])
def test_states_and_windows_are_never_cut(family: str, gguf_of: Callable[[str], Path]) -> None:
    with GgufSession.open(gguf_of(family), context_tokens=CONTEXT, num_slots=4) as session:
        changed = [*IDS[:15], 7, 8, 9]
        expected = session.logits(changed)
        session.logits(IDS)
        assert session._context.keep_prefix(changed) == 0
        assert np.array_equal(session._context.decode(changed, 0, keep_all=True), expected)


# ---------------------------------------------------------------------------- rearranged


@pytest.mark.parametrize("num_slots", [2, 3, 7, 15])
def test_rearranged_experts_give_what_llama_cpp_gives_by_default(
    num_slots: int, wide: Path, tmp_path: Path
) -> None:
    with GgufSession.open(
        wide, context_tokens=CONTEXT, num_slots=num_slots, rearranged=tmp_path
    ) as session:
        found = paged_logits(session)
        batch_tokens = session._context._batch_tokens
        names = session._loaded.rearranger().names
    assert np.array_equal(found, stock_logits(wide, batch_tokens, rearranges=True))
    stacks = [info for layer in GgufModel(wide).layers.values() for info in layer.stacks]
    fast = [info for info in stacks if "down" not in info.name]  # q4_1 has no faster kernels
    assert names == {info.name for info in fast}
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size >= sum(info.num_bytes for info in fast)


def rearrange(path: Path, folder: Path) -> list[tuple[int, int]]:
    told: list[tuple[int, int]] = []
    GgufSession.open(
        path,
        context_tokens=CONTEXT,
        num_slots=2,
        rearranged=folder,
        on_bytes=lambda *each: told.append(each),
    ).close()
    return told


def test_rearranged_experts_are_kept_and_made_anew_where_they_are_not_the_models(
    wide: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    told = rearrange(wide, tmp_path)
    (file,) = tmp_path.iterdir()
    expected = file.read_bytes()
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (len(expected), len(expected)) and len(told) > 2
    assert rearrange(wide, tmp_path) == []

    for damage in (expected[:-1], b"\x01" + expected[1:]):  # of another size, CPU or llama.cpp
        file.write_bytes(damage)
        assert rearrange(wide, tmp_path) == told
        assert file.read_bytes() == expected and list(tmp_path.iterdir()) == [file]

    last = expected.rstrip(b"\0")
    file.write_bytes(last[:-300] + bytes(len(expected) - len(last) + 300))  # a hole at the end
    assert rearrange(wide, tmp_path) == told and file.read_bytes() == expected

    partial = file.with_suffix(".part")
    file.unlink()
    partial.write_bytes(expected[: told[1][0] + 100])
    moment = partial.stat().st_ino
    assert rearrange(wide, tmp_path) == told
    assert file.read_bytes() == expected and file.stat().st_ino == moment, "it goes on"
    other = Path(shutil.copy(wide, tmp_path_factory.mktemp("other") / wide.name))
    assert rearrange(other, tmp_path) == told and file in tmp_path.iterdir()
    os.utime(wide, ns=(1, 1))
    assert rearrange(wide, tmp_path) == told
    assert len(list(tmp_path.iterdir())) == 2 and not file.exists(), "of what it was before"


def test_two_processes_rearrange_one_after_the_other(wide: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; told = []\n"
        "from edge_moe.runtime.gguf_session import GgufSession\n"
        "path, folder = map(Path, sys.argv[1:])\n"
        "GgufSession.open(path, context_tokens=64, num_slots=2, rearranged=folder,\n"
        "    on_bytes=lambda *each: told.append(each)).close()\n"
        "print(len(told))"
    )
    command = [sys.executable, "-c", program, str(wide), str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = sorted(int(process.communicate()[0]) for process in processes)
    assert told[0] == 0 and told[1] > 2 and len(list(tmp_path.iterdir())) == 1


def test_types_without_faster_kernels_say_so(
    gguf_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no faster kernels for its experts on this CPU: leave"):
        rearrange(gguf_of("qwen3_moe"), tmp_path)


def test_no_room_for_rearranged_experts(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        DiskSpaceError, match="rearranging the experts needs .* only 1.00 kB is free"
    ):
        rearrange(wide, tmp_path)


def test_a_disk_that_becomes_full_while_experts_are_rearranged(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.pwrite, 100_000

    def full(descriptor: int, content: memoryview, offset: int) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = real(descriptor, content[:left], offset)
        left -= count
        return count

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*\.experts'"):
            rearrange(wide, tmp_path)
    rearrange(wide, tmp_path)
    (file,) = tmp_path.glob("*.experts")
    found = file.read_bytes()
    file.unlink()
    rearrange(wide, tmp_path)
    assert file.read_bytes() == found


def test_the_command_rearranges_into_the_cache(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = ["run", str(wide), "--prompt", "def f(", "--raw", "--ctx", "64", "--slots", "4"]
    command += ["--max-new-tokens", "4", "--json", "--rearranged"]
    assert run(command) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["paging"]["misses"] > 0
    assert "rearranging" in printed.err and "edge-moe/rearranged" in printed.err.replace("\n", "")
    assert run(command) == 0
    assert "rearranging" not in capsys.readouterr().err


# ---------------------------------------------------------------------------- memory


def test_experts_never_take_more_than_their_limit(
    quantised: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes in memory are counted by the system: pages of the region that are there."""
    with GgufSession.open(quantised, context_tokens=CONTEXT, num_slots=5) as session:
        experts, most = session._experts, 0
        real = experts.wait

        def counted(index: int) -> None:
            nonlocal most
            real(index)
            experts.check_integrity()
            most = max(most, _present_bytes(session))
            assert _present_bytes(session) <= experts.used_bytes <= experts.limit_bytes

        monkeypatch.setattr(experts, "wait", counted)
        session.logits(IDS)
        assert most > experts.limit_bytes / 2
        assert session.statistics().evictions > 10


def _present_bytes(session: GgufSession) -> int:
    """Of the experts' addresses, what has memory behind it: /proc/self/pagemap."""
    total = 0
    with open("/proc/self/pagemap", "rb") as handle:
        for start, num_bytes in session._loaded.region._ranges:
            handle.seek(start // 4096 * 8)
            entries = np.frombuffer(handle.read(num_bytes // 4096 * 8), np.uint64)
            total += 4096 * int((entries >> np.uint64(63)).sum())
    return total


def test_loading_reads_no_expert(quantised: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = GgufModel(quantised), []
    real = os.preadv

    def counted(descriptor: int, buffers: list[Any], offset: int) -> int:
        asked.append((offset, offset + sum(len(each) for each in buffers)))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    with GgufSession.open(quantised, context_tokens=CONTEXT, num_slots=4) as session:
        assert session._experts.used_bytes == _present_bytes(session) == 0
        stacks = [info for layer in model.layers.values() for info in layer.stacks]
        for start, end in asked:
            for info in stacks:
                assert end <= info.offset or start >= info.offset + info.num_bytes
        assert asked


@pytest.mark.skipif(memory_cgroup.missing_reason() is not None, reason="no memory cgroup")
@pytest.mark.slow
def test_runs_in_a_cgroup_of_its_budget(quantised: Path) -> None:
    """The kernel would kill it; with every expert in memory it takes more than that."""
    command = [sys.executable, "-m", "edge_moe", "run", str(quantised), "--raw", "--json"]
    command += ["--prompt", "def f(", "--max-new-tokens", "30", "--ctx", "64"]
    fails = subprocess.run([*command, "--budget", "1MB"], capture_output=True, text=True)
    found = re.search(r"smallest that works is ([0-9.]+)MB", fails.stderr)
    assert fails.returncode == 3 and found is not None, fails.stderr
    budget_bytes = int(float(found[1]) * 1e6) + 200_000
    with memory_cgroup.memory_cgroup(int(1.05 * budget_bytes)) as group:
        done = memory_cgroup.run_in(group, [*command, "--budget", f"{budget_bytes}B"])
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["peak_memory_bytes"] <= budget_bytes
    assert measured["paging"]["evictions"] > 0 and measured["generated_tokens"] == 30


def test_budgets_and_slots_that_are_too_small(quantised: Path) -> None:
    with pytest.raises(InputError, match="1 slots are fewer than top_k=2: give at least that"):
        GgufSession.open(quantised, num_slots=1)
    with pytest.raises(BudgetError, match="too small even when experts are paged: dense") as error:
        GgufSession.open(quantised, budget_bytes=10**6)
    with GgufSession.open(quantised, budget_bytes=error.value.minimum_bytes) as session:
        assert session.is_paging and session._context._batch_tokens == 1
        assert any("nearly every expert is read anew" in each for each in session.warnings)
        terms = {term.name: term.num_bytes for term in session.memory()}
        assert sum(terms.values()) <= error.value.minimum_bytes
        assert terms[TERM_NAME] == DEFAULT_POLICY.order_bytes(
            session.spec.num_moe_layers, session.spec.num_experts
        )
    with GgufSession.open(quantised, num_slots=8, policy=LeastRecentlyUsed) as session:
        assert session.is_paging and TERM_NAME not in {term.name for term in session.memory()}


# ---------------------------------------------------------------------------- what goes wrong


@pytest.fixture
def by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the system does not read by itself."""
    monkeypatch.setattr(gguf_experts, "open_direct_queue", lambda *_: None)


@pytest.fixture
def running(quantised: Path) -> Iterator[GgufSession]:
    with GgufSession.open(quantised, context_tokens=CONTEXT, num_slots=4) as session:
        session.expected = session.logits(IDS)  # type: ignore[attr-defined]
        yield session


def recovers(session: GgufSession) -> bool:
    session.check_integrity()
    return np.array_equal(session.logits(IDS), session.expected)  # type: ignore[attr-defined]


def test_a_file_that_is_written_to_while_it_runs(running: GgufSession, quantised: Path) -> None:
    os.utime(quantised, ns=(1, 1))
    with pytest.raises(
        CheckpointError, match=r"quantised\.gguf has changed while the model was running"
    ):
        running.logits(IDS)


def test_a_file_that_is_replaced_while_it_runs(running: GgufSession, quantised: Path) -> None:
    other = quantised.with_name("other")
    other.write_bytes(b"nothing")
    os.replace(other, quantised)
    assert recovers(running), "the old file stays open"


@pytest.mark.usefixtures("by_threads")
@pytest.mark.parametrize("kind", ["error", "short", "end"])
def test_disk_errors_end_in_an_error_and_nothing_is_corrupted(
    kind: str, running: GgufSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.preadv, 0

    def failing(descriptor: int, buffers: list[Any], offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls % 7:
            return real(descriptor, buffers, offset)
        if kind == "error":
            raise OSError(errno.EIO, "bad sector")
        if kind == "end":
            return 0
        return real(descriptor, [memoryview(buffers[0])[:4096]], offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        if kind == "short":
            assert recovers(running)
        else:
            with pytest.raises((OSError, CheckpointError), match="quantised.gguf") as error:
                for _ in range(20):
                    running.logits(IDS)
            assert "Input/output" in str(error.value) or "ended early" in str(error.value)
    assert recovers(running)


@pytest.mark.parametrize("kind", ["error", "short", "end"])
def test_errors_of_reads_without_threads_end_in_an_error_too(
    kind: str, running: GgufSession, quantised: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not running._experts._files.are_direct:
        pytest.skip("read by threads here")
    real, calls = DirectReads.over, 0

    def failing(self: DirectReads, at_least: int = 0) -> list[tuple[int, int]]:
        nonlocal calls
        found = []
        for number, result in real(self, at_least):
            calls += 1
            bad = {"error": -errno.EIO, "short": 4096, "end": 0}[kind]
            found.append((number, result if calls % 7 else bad))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(DirectReads, "over", failing)
        if kind == "error":
            with pytest.raises(OSError, match=r"Input/output error: '.*quantised.gguf'"):
                running.logits(IDS)
        else:
            assert recovers(running), "what the disk left out is read again"
        assert calls > 7
    assert recovers(running)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("moment", [0, 3, 40, 500])
def test_ctrl_c_stops_the_graph_and_leaves_the_session_whole(
    moment: int, running: GgufSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised in a callback it would be dropped by ctypes, and the graph go on without experts."""
    context, asked = running._context, 0
    real = context._api.beginning

    def interrupted(*arguments: Any) -> int:
        nonlocal asked
        asked += 1
        if asked == moment + 1:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(context._api, "beginning", interrupted)
        with pytest.raises(KeyboardInterrupt):
            running.logits(IDS)
        assert asked <= moment + 2 and context._sequence == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert recovers(running)


@pytest.mark.usefixtures("ctrl_c")
def test_bookkeeping_is_not_interrupted(
    running: GgufSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = running._experts
    for name in ("_take", "_settle", "_remove"):
        real, is_first = getattr(experts, name), True

        def interrupted(*arguments: Any, real: Any = real, **options: Any) -> Any:
            nonlocal is_first
            found = real(*arguments, **options)
            if is_first:
                is_first = False
                signal.raise_signal(signal.SIGINT)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(experts, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                running.logits(IDS)
        assert not is_first and recovers(running)


@pytest.mark.usefixtures("by_threads")
def test_what_a_router_chose_waits_for_guesses_that_hold_the_room(
    running: GgufSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that was begun cannot be called back: the room is there when it ends."""
    experts = running._experts
    num_fitting = experts.limit_bytes // experts.num_bytes((0, 0))
    experts.settle()
    for key in list(experts._entries):
        experts._drop(key)
    experts._link.bytes_per_second, experts._link.layer_seconds = 1e9, 1.0
    queue: Any = experts._queue
    real, is_free, begun = queue._read, threading.Event(), threading.Event()

    def slow(piece: Any) -> None:
        begun.set()
        assert is_free.wait(60)
        real(piece)

    monkeypatch.setattr(queue, "_read", slow)
    experts.prefetch(1, range(num_fitting), current=())
    assert len(experts._loading) == num_fitting and begun.wait(60)
    later = threading.Timer(0.2, is_free.set)
    later.start()
    experts.require(0, range(num_fitting))
    later.join()
    experts.wait_for_all(0)
    assert {key[0] for key in experts._entries} == {0}
    assert recovers(running)


def test_results_of_a_changed_file_are_never_given(
    running: GgufSession, quantised: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written to between the check and the read, once; nothing is trusted afterwards."""
    real = running._experts._queue.submit

    def changed(*arguments: Any, **options: Any) -> Any:
        os.utime(quantised, ns=(1, 1))
        return real(*arguments, **options)

    monkeypatch.setattr(running._experts._queue, "submit", changed)
    for _ in range(2):
        running._context.clear()
        with pytest.raises(CheckpointError, match="has changed while the model was running"):
            running._context.decode(IDS[:1], 0)


def test_what_cannot_be_opened_leaves_nothing(
    wide: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    closed: list[object] = []
    real = paged_llama.LoadedModel.close

    def noted(self: paged_llama.LoadedModel) -> None:
        closed.append(self)
        real(self)

    monkeypatch.setattr(paged_llama.LoadedModel, "close", noted)
    monkeypatch.setattr(gguf_session, "PagedContext", mock.Mock(side_effect=InputError("no")))
    before = count()
    for _ in range(3):
        with pytest.raises(InputError, match="no"):
            GgufSession.open(wide, context_tokens=CONTEXT, num_slots=4)
    assert count() == before and len(closed) == 3


def test_a_layer_whose_router_is_not_seen_is_refused(
    quantised: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_llama, "TOPK", "unheard_of")
    with GgufSession.open(quantised, context_tokens=CONTEXT, num_slots=4) as session:
        with pytest.raises(InputError, match="no node unheard_of in layer 0"):
            session.logits(IDS)


def test_a_matrix_that_is_used_unseen_is_refused(running: GgufSession) -> None:
    """Its experts would not have been waited for."""
    uses = running._context._uses
    place = next(place for place in uses._places.values() if place[0] == 1)
    uses._places = {node: each for node, each in uses._places.items() if each != place}
    with pytest.raises(InputError, match="llama.cpp's graph has changed in layer 1"):
        running.logits(IDS)


def test_matrices_are_waited_for_in_the_order_of_their_use(
    running: GgufSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, events = running._experts, []
    for name in ("require", "wait"):
        real = getattr(experts, name)

        def noted(*arguments: Any, name: str = name, real: Any = real) -> None:
            events.append((name, arguments[0]))
            real(*arguments)

        monkeypatch.setattr(experts, name, noted)
    assert recovers(running)
    layers = len(experts.layer_ids)
    per_layer = [events[at : at + 4] for at in range(0, len(events), 4)]
    assert len(per_layer) % layers == 0
    for at, (first, *waits) in enumerate(per_layer):
        layer = at % layers
        assert first == ("require", layer)
        assert waits == [("wait", index) for index in experts._order[layer]]


@pytest.mark.parametrize("can_move", [True, False])
def test_memory_is_handed_on_where_the_system_can(
    can_move: bool, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with GgufSession.open(wide, context_tokens=CONTEXT, num_slots=4) as session:
        experts, region, moved = session._experts, session._loaded.region, []
        move, wait = region.move, experts.wait

        def noted(source: int, target: int, num_bytes: int) -> bool:
            moved.append(can_move and move(source, target, num_bytes))
            return moved[-1]

        def counted(index: int) -> None:
            wait(index)
            assert _present_bytes(session) <= experts.used_bytes <= experts.limit_bytes

        monkeypatch.setattr(region, "move", noted)
        monkeypatch.setattr(experts, "wait", counted)
        found = paged_logits(session)
        assert np.array_equal(found, stock_logits(wide, session._context._batch_tokens))
        assert len(moved) > 20 and all(each is can_move for each in moved)


def test_mappings_are_left_for_others(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every range that was moved is a mapping of its own, and the system counts them."""
    monkeypatch.setattr(llama_region, "_most_mappings", lambda: 30)
    with GgufSession.open(wide, context_tokens=CONTEXT, num_slots=4) as session:
        region = session._loaded.region
        session.logits(IDS)
        before = len(region._moved)
        assert before == 10
        found = paged_logits(session)
        assert len(region._moved) == before and session.statistics().evictions > 20
        assert np.array_equal(found, stock_logits(wide, session._context._batch_tokens))
        assert _present_bytes(session) <= session._experts.used_bytes


def test_systems_without_callback_streams_say_so(
    quantised: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_stream, "_OPEN", "fopen_something_else")
    with pytest.raises(InputError, match="takes glibc's fopencookie, which this system lacks"):
        GgufSession.open(quantised, context_tokens=CONTEXT, num_slots=4)
    monkeypatch.undo()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(InputError, match="run it on Linux, or with llama.cpp itself"):
        GgufSession.open(quantised, context_tokens=CONTEXT, num_slots=4)


def test_a_damaged_file_is_refused_before_it_is_loaded(quantised: Path) -> None:
    quantised.write_bytes(quantised.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match="quantised.gguf"):
        GgufSession.open(quantised)


# ---------------------------------------------------------------------------- the command


def test_the_command(quantised: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", str(quantised), "--prompt", "def f(", "--raw", "--ctx", "64"]
    command += ["--max-new-tokens", "8"]
    assert run([*command, "--slots", "4", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["model_kind"] == "gguf" and measured["paging"]["misses"] > 0
    assert run([*command, "--slots", "4"]) == 0
    printed = capsys.readouterr()
    assert printed.out.rstrip("\n") == measured["text"].rstrip("\n")
    assert "resident), " in printed.err
    for option in (["--task", "code"], ["--skip", "top-p=0.9"], ["--device", "cuda"]):
        assert run([*command, *option]) == 2
        assert "build with --target native" in " ".join(capsys.readouterr().err.split())


# ---------------------------------------------------------------------------- reading ahead


@pytest.mark.parametrize(
    ("gains", "best", "num_tokens"),
    [
        ({"router": 0.1}, "router", 80),
        ({"router": 0.0}, None, 80),
        ({"router": -0.1}, None, 80),
        ({"router": 0.1, "wide": 0.2}, "wide", 72),
        ({"router": 0.1, "wide": -0.2}, "router", 72),
        ({"router": 0.01, "wide": -0.2, "token": 0.015}, None, 96),
    ],
)
def test_the_fastest_way_stays(gains: dict[str, float], best: str | None, num_tokens: int) -> None:
    trial, now = FastestOf(list(gains)), [0.0]
    asked: list[str | None] = []
    with mock.patch("time.perf_counter", lambda: now[0]):
        while not trial.is_over:
            asked.append(trial.start_token())
            now[0] += 1 - gains.get(asked[-1] or "", 0.0)
            trial.end_token()
        assert trial.best == best == trial.start_token()
        trial.end_token()
    assert trial.gains == pytest.approx(gains) and len(asked) == num_tokens
    assert asked[:9] == [next(iter(gains))] * 8 + [[*gains, None][1]]


def test_only_who_won_is_asked_and_learns() -> None:
    predictors = {"repeat": Repeat([4, 4]), "transitions": Transitions([4, 4], 2)}
    trial, now = FastestOf(list(predictors)), [0.0]
    ahead = ReadAhead(2, predictors, trial)
    with mock.patch("time.perf_counter", lambda: now[0]):
        while not trial.is_over:
            ahead.start_token(7)
            guessed = [ahead.guess(layer, [1]) for layer in range(2)]
            assert guessed[1] == [] and (ahead.is_on or guessed[0] == [])
            now[0] += 1 if guessed[0] else 2
            ahead.end_token()
    assert trial.best is not None
    ahead.start_token(7)
    assert ahead.guess(0, [1]) == [1] and ahead.guess(1, [3]) == []
    loser = predictors["transitions" if trial.best == "repeat" else "repeat"]
    assert loser.guess(0, [1]) == [1] and 3 in predictors[trial.best].guess(0, [1])
    first = ReadAhead(2, predictors)
    first.start_token(7)
    assert first.is_on and first.guess(0, [1])[0] in (1, 3)
