"""The quality of a model on held-out text of its task and of others, alone or beside a reference.

Models are native packages, Hugging Face or ONNX folders, or GGUF files. The reference's logits are
computed once per window, compared, and dropped: memory is that of the open models and two windows
of logits.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from edge_moe import metrics
from edge_moe.delta_file import refuse_delta
from edge_moe.demo import task_dir, task_names
from edge_moe.demo.arithmetic import extract_answer
from edge_moe.errors import InputError, TargetError
from edge_moe.gguf_split import is_gguf_name
from edge_moe.measurement import (
    EvalResult,
    ModelKind,
    Provenance,
    RecoveryKind,
    SkippingCost,
    StallCost,
)
from edge_moe.metrics import Comparison, Estimate, TokenScores
from edge_moe.onnx_folder import is_onnx_folder
from edge_moe.package import is_package
from edge_moe.runtime.comparable import check_same_tokenizer, check_same_vocabulary
from edge_moe.runtime.heldout import is_in_task, text_to_score
from edge_moe.runtime.kernel_choice import Kernels
from edge_moe.runtime.policy import PagingStatistics, RoutedCounts
from edge_moe.runtime.skipping import SkipRule
from edge_moe.runtime.skipping_cost import skipping_cost
from edge_moe.runtime.stalls import EXACT, StallOptions, stall_cost

if TYPE_CHECKING:
    from edge_moe.runtime.pre_gate import PreGate
    from edge_moe.runtime.session import Session

WINDOW_TOKENS = 256
MAX_PROBLEMS = 100
_ANSWER_TOKENS = 48
_PROBLEM_CONTEXT_TOKENS = 256
_PROGRAMS: dict[ModelKind, str] = {"gguf": "llama.cpp", "onnx": "onnxruntime"}
"""What runs a model that does not run in our own runtime."""

Advance = Callable[[], None]


class LanguageModel(Protocol):
    """What evaluation needs of a model; `Session`, `GgufModel` and `OnnxSession` offer it."""

    @property
    def tokenizer(self) -> Any: ...

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]: ...

    def generate(
        self, prompt: str, *, max_new_tokens: int, stop: Sequence[str]
    ) -> Iterator[str]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class _Settings:
    """How much is scored."""

    window_tokens: int
    max_windows: int | None
    max_problems: int

    def check(self) -> None:
        if self.window_tokens < 2:
            raise InputError(
                f"--window-tokens is {self.window_tokens}, which predicts nothing: use 2 or more"
            )
        if self.max_windows is not None and self.max_windows < 1:
            raise InputError(f"--max-windows is {self.max_windows}: use 1 or more")
        if self.max_problems < 0:
            raise InputError(f"--max-problems is {self.max_problems}: use 0 or more")


@dataclass(frozen=True)
class _Pair:
    """The opened model under test, and its reference."""

    path: Path
    model: LanguageModel
    against: Path | None
    base: LanguageModel | None
    budget_bytes: int | None
    skip: SkipRule | None
    stall: StallOptions | None
    delta: Path | None


def evaluate(
    model: Path,
    against: Path | None,
    tasks: Sequence[str],
    *,
    max_windows: int | None = None,
    window_tokens: int = WINDOW_TOKENS,
    max_problems: int = MAX_PROBLEMS,
    budget_bytes: int | None = None,
    skip: SkipRule | None = None,
    kernels: Kernels | None = None,
    stall: StallOptions | None = None,
    pre_gate: PreGate | None = None,
    delta: Path | None = None,
) -> list[EvalResult]:
    """Evaluate `model` on the held-out text of every task, beside `against` when it is given.

    `delta` is added to `model` only, `budget_bytes` caps its memory, `skip` leaves out experts of
    it, and `kernels` (else auto) compute them: the reference is exact, and as it is. `pre_gate`
    chooses the experts of `model` only, so that `model` itself `against` shows its cost. Tasks that
    come with problems to solve are scored by exact match too, on the first `max_problems` of them.

    With a `stall` that uses shadows, text is scored token by token, as if it were generated, since
    a prompt waits for all bodies. What such a model computes depends on which bodies have arrived,
    and so on time: with `stall.is_repeatable` (the command line's choice) bodies are read between
    layers, and numbers repeat, except that `bounded` needs `stall.bytes_per_second`, too.

    Raises:
        InputError: no task, a window below 2 tokens, models with different tokenizers, or logits
            that are not finite.
        MissingExtraError: a GGUF file without llama-cpp-python.
    """
    settings = _Settings(window_tokens, max_windows, max_problems)
    settings.check()
    if not tasks:
        raise InputError(f"no task to evaluate on: give --task, such as {', '.join(task_names())}")
    context_tokens = max(window_tokens, _PROBLEM_CONTEXT_TOKENS)
    with ExitStack() as stack:
        tested = open_model(
            model,
            context_tokens=context_tokens,
            budget_bytes=budget_bytes,
            skip=skip,
            kernels=kernels,
            stall=stall,
            pre_gate=pre_gate,
            delta=delta,
        )
        stack.callback(tested.close)
        base = _open_reference(stack, against, context_tokens) if against else None
        if base is not None and against is not None:
            check_same_tokenizer({str(model): tested, str(against): base})
        pair = _Pair(model, tested, against, base, budget_bytes, skip, stall, delta)
        return [_evaluate_task(pair, task, settings) for task in tasks]


def open_model(
    path: Path,
    *,
    context_tokens: int,
    budget_bytes: int | None = None,
    skip: SkipRule | None = None,
    kernels: Kernels | None = None,
    stall: StallOptions | None = None,
    pre_gate: PreGate | None = None,
    delta: Path | None = None,
) -> LanguageModel:
    """A native package or Hugging Face folder as a Session, others through their own programs.

    Raises:
        TargetError: a skipping rule for a .gguf file or an ONNX folder, which route themselves, or
            kernels, which they have of their own, or shadows, a pre-gate or a delta; a budget for
            a .gguf file.
        BudgetError: an ONNX folder that takes more than the budget.
    """
    kind = model_kind(path)
    if kind in _PROGRAMS:
        _refuse_options(path, _PROGRAMS[kind], skip, kernels, stall, pre_gate, delta)
    if kind == "onnx":
        from edge_moe.runtime.onnx_session import OnnxSession

        return OnnxSession.open(
            path,
            context_tokens=context_tokens,
            budget_bytes=budget_bytes,
            scored_tokens=context_tokens,
        )
    if kind == "gguf":
        if budget_bytes is not None:
            raise TargetError(
                f"{path} runs in llama.cpp, which keeps to no budget: leave out --budget"
            )
        from edge_moe.runtime.gguf_logits import open_untrusted

        return open_untrusted(path, context_tokens)
    from edge_moe.runtime.session import Session

    return Session.open(
        path,
        budget_bytes=budget_bytes,
        context_tokens=context_tokens,
        skip=skip,
        scored_tokens=context_tokens,
        kernels=kernels or "auto",
        stall=stall or EXACT,
        pre_gate=pre_gate,
        delta=delta,
    )


def _refuse_options(
    path: Path,
    program: str,
    skip: SkipRule | None,
    kernels: Kernels | None,
    stall: StallOptions | None,
    pre_gate: PreGate | None,
    delta: Path | None,
) -> None:
    """Raise TargetError for what only edge-moe's own runtime has; `program` runs the model."""
    if kernels is not None:
        raise TargetError(
            f"{path} does not run in edge-moe's own runtime: leave out --kernels, or use a native "
            "package or a Hugging Face folder"
        )
    if pre_gate is not None:
        raise TargetError(
            f"{path} routes by itself, outside edge-moe's own runtime: leave out --pre-gate, or "
            "use a native package or a Hugging Face folder"
        )
    if stall is not None:
        raise TargetError(
            f"{path} holds no shadows to compute misses from: leave out --stall, or use a native "
            "package that was built with --shadow"
        )
    refuse_delta(path, program, delta)
    if skip is not None:
        raise TargetError(
            f"{path} runs in {program}, which cannot skip experts: use a native package or a "
            "Hugging Face folder with --skip"
        )


def model_kind(path: Path) -> ModelKind:
    """What `path` is, from its name and its manifest."""
    if is_gguf_name(path):
        return "gguf"
    if is_onnx_folder(path):
        return "onnx"
    return "package" if is_package(path) else "checkpoint"


def score_windows(
    models: Mapping[str, LanguageModel],
    base: LanguageModel,
    windows: Sequence[Sequence[int]],
    advance: Advance = lambda: None,
) -> dict[str, TokenScores]:
    """Each model's scores beside `base`, whose logits are computed once per window.

    Raises:
        InputError: logits that are not finite, or of another vocabulary than the reference's.
    """
    parts: dict[str, list[TokenScores]] = {name: [] for name in models}
    for window in windows:
        base_logits = _finite_logits("the reference", base, window)
        for name, model in models.items():
            logits = _finite_logits(name, model, window)
            check_same_vocabulary(name, logits, base_logits)
            parts[name].append(metrics.compare_tokens(logits, base_logits, window))
        advance()
    return {name: TokenScores.join(found) for name, found in parts.items()}


def solve_problems(
    model: LanguageModel, problems: Sequence[Mapping[str, str]], advance: Advance = lambda: None
) -> list[bool]:
    """For every problem, whether the greedy answer is exactly right."""
    is_correct = []
    for problem in problems:
        pieces = model.generate(problem["prompt"], max_new_tokens=_ANSWER_TOKENS, stop=("\n",))
        is_correct.append(extract_answer("".join(pieces)) == problem["answer"])
        advance()
    return is_correct


def task_problems(task: str, max_problems: int) -> list[dict[str, str]]:
    """{"prompt", "answer"} of a shipped task that is scored by exact match; none for others."""
    if task not in task_names():
        return []
    folder = task_dir(task)
    about = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    if about.get("metric") != "exact_match":
        return []
    lines = (folder / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    problems = [json.loads(line) for line in lines[:max_problems]]
    return problems if len(problems) >= 2 else []


@contextmanager
def progress(description: str, total: int) -> Iterator[Advance]:
    """A bar on stderr, only when somebody is looking."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        bar_id = bar.add_task(description, total=total)
        yield lambda: bar.advance(bar_id)


def _evaluate_task(pair: _Pair, task: str, settings: _Settings) -> EvalResult:
    start = time.perf_counter()
    tokenizer = (pair.base or pair.model).tokenizer
    text = text_to_score(pair.path, task, tokenizer, settings.window_tokens, settings.max_windows)
    windows = text.windows
    before, paged_before = _routed(pair), _paged(pair)
    with progress(f"{task}: held-out text", len(windows)) as advance:
        quality = _text_quality(pair, windows, advance)
    num_tokens = sum(map(len, windows))
    skipping = _skipping_cost(pair, before, num_tokens)
    stalling = _stall_cost(pair, paged_before, num_tokens)
    problems = task_problems(task, settings.max_problems)
    if problems:
        quality |= _problem_quality(pair, task, problems)
    elif comparison := quality.get("comparison"):
        quality |= _text_recovery(comparison)
    return EvalResult(
        provenance=Provenance.here(),
        model=str(pair.path),
        model_kind=model_kind(pair.path),
        against=str(pair.against) if pair.against else None,
        task=task,
        in_task=is_in_task(pair.path, task),
        delta=str(pair.delta) if pair.delta else None,
        budget_bytes=pair.budget_bytes,
        kernels=str(getattr(pair.model, "kernels", "")),
        pre_gate=str(getattr(pair.model, "pre_gate", "")),
        window_tokens=text.window_tokens,
        num_windows=len(windows),
        num_search_windows=text.num_search_windows,
        num_problems=len(problems),
        skipping=skipping,
        stall=stalling,
        seconds=time.perf_counter() - start,
        **quality,
    )


def _text_quality(
    pair: _Pair, windows: Sequence[Sequence[int]], advance: Advance
) -> dict[str, Any]:
    name = str(pair.path)
    if pair.base is not None:
        scores = score_windows({name: pair.model}, pair.base, windows, advance)[name]
        return {
            "num_tokens": scores.nll.size,
            "perplexity": metrics.perplexity(scores.nll),
            "base_perplexity": metrics.perplexity(scores.base_nll),
            "comparison": metrics.compare(scores),
        }
    parts = []
    for window in windows:
        parts.append(metrics.token_nll(_finite_logits(name, pair.model, window), window))
        advance()
    nll = np.concatenate(parts)
    return {"num_tokens": nll.size, "perplexity": metrics.perplexity(nll)}


def _problem_quality(
    pair: _Pair, task: str, problems: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """Shares solved, and where the reference solves any, its recovery."""
    models = [pair.model] if pair.base is None else [pair.model, pair.base]
    with progress(f"{task}: problems", len(problems) * len(models)) as advance:
        solved, *others = [solve_problems(each, problems, advance) for each in models]
    found: dict[str, Any] = {"exact_match": metrics.exact_match(solved)}
    for base in others:
        found["base_exact_match"] = metrics.exact_match(base)
        if any(base):
            found |= _recovery("exact match", metrics.paired_ratio(solved, base))
    return found


def _text_recovery(comparison: Comparison) -> dict[str, Any]:
    """Base perplexity / perplexity; its error is paired, token by token."""
    ratio = comparison.ppl_ratio
    return _recovery("1 / perplexity", Estimate(1 / ratio.value, ratio.error / ratio.value**2))


def _recovery(kind: RecoveryKind, share: Estimate) -> dict[str, Any]:
    """The fields of `EvalResult.recovery`."""
    return {
        "recovery_of": kind,
        "recovery_percent": 100 * share.value,
        "recovery_error_percent": 100 * share.error,
    }


def _session(pair: _Pair) -> Session | None:
    """The model under test where a skipping rule is in force; only sessions have rules."""
    from edge_moe.runtime.session import Session

    return pair.model if pair.skip is not None and isinstance(pair.model, Session) else None


def _routed(pair: _Pair) -> RoutedCounts | None:
    session = _session(pair)
    return session.statistics().routed if session else None


def _skipping_cost(
    pair: _Pair, before: RoutedCounts | None, num_tokens: int
) -> SkippingCost | None:
    """What the rule did to `num_tokens` tokens since `before`."""
    session = _session(pair)
    if session is None or before is None or pair.skip is None:
        return None
    return skipping_cost(
        pair.skip.name,
        session.statistics().routed.since(before),
        num_tokens,
        dense_parameters=session.dense_parameters,
        expert_parameters=session.spec.expert_weights,
    )


def _paged(pair: _Pair) -> PagingStatistics | None:
    """What paging did so far, where the model under test may use shadows."""
    from edge_moe.runtime.session import Session

    if pair.stall is None or not isinstance(pair.model, Session):
        return None
    return replace(pair.model.statistics())


def _stall_cost(pair: _Pair, before: PagingStatistics | None, num_tokens: int) -> StallCost | None:
    now = _paged(pair)
    if now is None or before is None or pair.stall is None:
        return None
    return stall_cost(pair.stall, before, now, num_tokens)


def _open_reference(stack: ExitStack, path: Path, context_tokens: int) -> LanguageModel:
    """Exact where there is a choice."""
    is_ours = model_kind(path) in ("package", "checkpoint")
    model = open_model(path, context_tokens=context_tokens, kernels="exact" if is_ours else None)
    stack.callback(model.close)
    return model


def _finite_logits(
    name: str, model: LanguageModel, window: Sequence[int]
) -> npt.NDArray[np.float32]:
    logits = model.logits(window)
    if not np.isfinite(logits).all():
        raise InputError(
            f"{name} computes logits that are not finite: its weights are damaged or its form does "
            "not suit this engine; build it again"
        )
    return logits
