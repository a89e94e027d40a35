"""One run of one engine of `paging.py`, in a process of its own; prints JSON.

    python benchmarks/paging_worker.py ENGINE FILE TEXT BUDGET_BYTES PROMPT_TOKENS TOKENS

ENGINE: edge-moe; rearranged (the same with --rearranged); lru (evicting by LRU); stock (llama.cpp's
mapping); random (the mapping told MADV_RANDOM); willneed (and routed experts told MADV_WILLNEED
after routing); ram (llama.cpp without mapping). Tokens are given, not sampled: all compute alike.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edge_moe.runtime.llama_api import calm_threads
from edge_moe.runtime.memory import peak_memory_bytes

CONTEXT_TOKENS = 1024
REARRANGED_FOLDER = "rearranged"
"""Beside the model."""
PAGED = ("edge-moe", "rearranged", "lru")
_MADV_RANDOM, _MADV_WILLNEED = 1, 3
_LOAD_NONE, _LOAD_MMAP = 0, 1
_TOPK = "ffn_moe_topk-"
_KEPT: list[Any] = []
"""Callbacks that C calls: ctypes keeps no reference."""


def read_bytes() -> int:
    """From the disk, by this process so far, page faults included."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


Step = Callable[[list[int], int], Any]
"""(ids, position of the first) -> logits [V] of the last."""
Facts = Callable[[int], dict[str, Any]]
"""Number of the first step that counts -> what is known of the run."""


class ReadsOfSteps:
    """What every step had the disk read."""

    def __init__(self, experts: Any) -> None:
        """`experts` are edge-moe's `GgufExperts`."""
        self._experts = experts
        self._steps: list[list[Any]] = []
        real = experts._queue.submit

        def submit(piece: Any, *, is_wanted: bool) -> Any:
            read = real(piece, is_wanted=is_wanted)
            if self._steps:
                self._steps[-1].append(read)
            return read

        experts._queue.submit = submit

    def next_step(self) -> None:
        self._steps.append([])

    def again_seconds(self, first_step: int) -> float:
        """How long the disk takes for the same pieces in the same order, where nobody computes."""
        from edge_moe.runtime.storage_rate import read_by_itself

        reads = [read for step in self._steps[first_step:] for read in step]
        pieces = [read.piece for read in reads if read.end_seconds]  # the others were cancelled
        if not pieces:
            return 0.0
        descriptor = self._experts._files.descriptor
        again = [(descriptor(each.path), each.offset, each.num_bytes) for each in pieces]
        return read_by_itself(again)[1]


def paged(path: Path, budget_bytes: int, policy: str) -> tuple[Step, Facts]:
    """edge-moe's engine."""
    from edge_moe.runtime.gguf_session import GgufSession
    from edge_moe.runtime.policies import DEFAULT_POLICY, policy_named

    session = GgufSession.open(
        path,
        budget_bytes=budget_bytes or None,
        context_tokens=CONTEXT_TOKENS,
        policy=policy_named(policy) if policy == "lru" else DEFAULT_POLICY,
        rearranged=path.parent / REARRANGED_FOLDER if policy == "rearranged" else None,
    )

    reads = ReadsOfSteps(session._experts)

    def step(ids: list[int], start: int) -> Any:
        reads.next_step()
        return session._context.decode(ids, start)[-1]

    def facts(first_step: int) -> dict[str, Any]:
        found = session.statistics()
        trial = session.prefetch_trial
        return {
            "hit_rate": found.hit_rate,
            "stall_seconds": found.stall_seconds,
            "expert_bytes": session._experts.limit_bytes,
            "planned_bytes": sum(term.num_bytes for term in session.memory()),
            "prefetch": None if trial is None else trial.best,
            "prefetch_gains": None if trial is None else trial.gains,
            "warm_reads_again_seconds": reads.again_seconds(first_step),
        }

    return step, facts


def stock(path: Path, engine: str) -> tuple[Step, Facts]:
    """llama.cpp alone, or with advice on its mapping."""
    from llama_cpp import llama_cpp as llama

    from edge_moe.measurement import usable_cores

    llama.llama_backend_init()
    options = llama.llama_model_default_params()
    options.n_gpu_layers, options.use_extra_bufts = 0, engine == "ram"
    options.load_mode = _LOAD_NONE if engine == "ram" else _LOAD_MMAP
    model = llama.llama_model_load_from_file(os.fsencode(path), options)
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = CONTEXT_TOKENS, 512, 512
    settings.n_threads = settings.n_threads_batch = usable_cores()
    if engine in ("random", "willneed"):
        advise = _Advice(path)
        advise.whole(_MADV_RANDOM)
        if engine == "willneed":
            _KEPT.append(llama.ggml_backend_sched_eval_callback(advise.callback()))
            settings.cb_eval = _KEPT[-1]
    context = llama.llama_init_from_model(model, settings)
    return stepper(llama, model, context), lambda _: {}


def stepper(llama: Any, model: Any, context: Any) -> Step:
    """Batches of a context of llama.cpp's."""
    width = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def step(ids: list[int], start: int) -> Any:
        batch = llama.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index] = token, start + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = index == len(ids) - 1
        assert llama.llama_decode(context, batch) == 0
        llama.llama_batch_free(batch)
        return np.ctypeslib.as_array(
            llama.llama_get_logits_ith(context, len(ids) - 1), (width,)
        ).copy()

    return step


class _Advice:
    """madvise on llama.cpp's mapping of the file."""

    def __init__(self, path: Path) -> None:
        from edge_moe.gguf_model import GgufModel
        from edge_moe.runtime.llama_api import llama_api

        self._model = GgufModel(path)
        self._api = llama_api(path)
        self._libc = ctypes.CDLL(None)
        self._libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        own = [line for line in lines if line[-1] == str(path.resolve())]
        self._maps = [
            (*(int(end, 16) for end in line[0].split("-")), int(line[2], 16)) for line in own
        ]

    def whole(self, advice: int) -> None:
        for start, end, _ in self._maps:
            self._libc.madvise(start, end - start, advice)

    def callback(self) -> Callable[[int, bool, object], bool]:
        count = self._model.spec.num_experts

        def on_node(tensor: int, is_asking: bool, _data: object) -> bool:
            name = self._api.name(tensor)
            if is_asking:
                return name.startswith(_TOPK)
            layer = self._model.layers[int(name.removeprefix(_TOPK))]
            for row in np.unique(self._api.strided_int32(tensor)).tolist():
                for info in layer.stacks:
                    stride = info.num_bytes // count
                    self._advise(info.offset + row * stride, stride)
            return True

        return on_node

    def _advise(self, offset: int, num_bytes: int) -> None:
        for start, end, at in self._maps:
            if at <= offset < at + end - start:
                first = (start + offset - at) // 4096 * 4096
                length = start + offset - at + num_bytes - first
                self._libc.madvise(first, length, _MADV_WILLNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", choices=(*PAGED, "stock", "random", "willneed", "ram"))
    for name in ("file", "text", "budget_bytes", "prompt_tokens", "tokens"):
        parser.add_argument(name)
    found = parser.parse_args()
    calm_threads()  # for all engines alike
    engine, path, text_path, budget = found.engine, found.file, found.text, found.budget_bytes
    prompt_tokens, num_tokens = found.prompt_tokens, found.tokens
    text = np.load(text_path).tolist()
    start = time.perf_counter()
    step, facts = (
        paged(Path(path), int(budget), engine) if engine in PAGED else stock(Path(path), engine)
    )
    loaded = time.perf_counter()
    prompt = text[: int(prompt_tokens)]
    logits = step(prompt, 0)
    prefilled, read_before = time.perf_counter(), read_bytes()
    checksum, seconds = float(logits.sum()), []
    half = int(num_tokens) // 2
    for index in range(int(num_tokens)):
        if index == half:
            read_at_half = read_bytes()
        before = time.perf_counter()
        logits = step([text[len(prompt) + index]], len(prompt) + index)
        seconds.append(time.perf_counter() - before)
        checksum += float(logits.sum())
    print(
        json.dumps(
            {
                "engine": engine,
                "load_seconds": loaded - start,
                "first_token_seconds": prefilled - start,
                "prefill_tokens_per_second": len(prompt) / (prefilled - loaded),
                "decode_tokens_per_second": len(seconds) / sum(seconds),
                "warm_tokens_per_second": (len(seconds) - half) / sum(seconds[half:]),
                "read_bytes_per_token": (read_bytes() - read_before) / len(seconds),
                "warm_read_bytes_per_token": (read_bytes() - read_at_half) / (len(seconds) - half),
                "peak_bytes": peak_memory_bytes(),
                "checksum": checksum,
                "facts": facts(1 + half),
            }
        )
    )


if __name__ == "__main__":
    main()
