"""One answer of a session: streamed, timed, and summed up. Shared by `run` and its chat."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_moe.errors import InputError
from edge_moe.units import format_bytes

if TYPE_CHECKING:
    from edge_moe.measurement import RunMeasurement
    from edge_moe.runtime.session import Session

Prompt = str | list[dict[str, str]]
"""Text to continue, or chat messages."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]

    def check(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            InputError: names the option, the value and the range.
        """
        if self.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens is {self.max_new_tokens}: use 1 or more")
        if self.temperature < 0:
            raise InputError(f"--temperature is {self.temperature:g}: use 0 or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p is {self.top_p:g}: use a number above 0, at most 1")
        if "" in self.stop:
            raise InputError("--stop is empty: give the text to stop at")


@dataclass(frozen=True)
class Answer:
    """What was generated, and how long it took."""

    text: str
    prompt_tokens: int
    generated_tokens: int
    prefill_seconds: float
    """Until the first token."""
    decode_seconds: float
    """From the first token to the last."""
    was_interrupted: bool
    """By Ctrl-C; the text is what there was."""

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed; the first token belongs to the prefill."""
        if self.generated_tokens < 2 or self.decode_seconds <= 0:
            return 0.0
        return (self.generated_tokens - 1) / self.decode_seconds


def as_prompt(session: Session, text: str, is_raw: bool) -> Prompt:
    """`text` as a chat message where the model has a chat template, else as it is."""
    if is_raw or not getattr(session.tokenizer, "chat_template", None):
        return text
    return [{"role": "user", "content": text}]


def answer(
    session: Session, prompt: Prompt, sampling: Sampling, show: Callable[[str], None]
) -> Answer:
    """Generate, handing every piece to `show` as it comes. Ctrl-C ends the answer early."""
    started = time.perf_counter()
    first = 0.0
    pieces: list[str] = []
    was_interrupted = False
    try:
        for piece in session.generate(prompt, **dataclasses.asdict(sampling)):
            first = first or time.perf_counter()
            pieces.append(piece)
            show(piece)
    except KeyboardInterrupt:
        was_interrupted = True
    ended = time.perf_counter()
    text = "".join(pieces)
    return Answer(
        text=text,
        prompt_tokens=_count_prompt(session.tokenizer, prompt),
        generated_tokens=len(session.tokenizer.encode(text, add_special_tokens=False)),
        prefill_seconds=(first or ended) - started,
        decode_seconds=ended - first if first else 0.0,
        was_interrupted=was_interrupted,
    )


def ignore(piece: str) -> None:
    """Show nothing."""


def _count_prompt(tokenizer: Any, prompt: Prompt) -> int:
    if isinstance(prompt, str):
        return len(tokenizer.encode(prompt))
    return len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])


def measure(
    session: Session, model: Path, found: Answer, load_seconds: float, seed: int
) -> RunMeasurement:
    """The run as a record: what the memory was planned to hold, what was used, how fast."""
    from edge_moe.measurement import Provenance, RunMeasurement
    from edge_moe.package import is_package
    from edge_moe.runtime.memory import peak_memory_bytes

    return RunMeasurement(
        provenance=Provenance.here(seed=seed),
        model=str(model),
        model_kind="package" if is_package(model) else "checkpoint",
        device=session.device,
        budget_bytes=session.budget_bytes,
        context_tokens=session.context_tokens,
        terms=session.memory(),
        peak_memory_bytes=peak_memory_bytes(),
        prompt_tokens=found.prompt_tokens,
        generated_tokens=found.generated_tokens,
        load_seconds=load_seconds,
        prefill_seconds=found.prefill_seconds,
        decode_seconds=found.decode_seconds,
        tokens_per_second=found.tokens_per_second,
        paging=_paging(session),
        text=found.text,
    )


def _paging(session: Session) -> dict[str, float]:
    statistics = session.statistics()
    return dataclasses.asdict(statistics) | {"hit_rate": statistics.hit_rate}


def statistics_lines(measured: RunMeasurement) -> list[str]:
    """The measurement in a few lines, for a person."""
    speed = f"{measured.tokens_per_second:.1f} tokens/s"
    lines = [
        f"{measured.generated_tokens} tokens in {measured.decode_seconds:.2f} s ({speed}); prompt "
        f"{measured.prompt_tokens} tokens in {measured.prefill_seconds:.2f} s; "
        f"loaded in {measured.load_seconds:.2f} s",
        _memory_line(measured),
    ]
    paging = measured.paging
    if paging.get("misses"):
        lines.append(
            f"paging: {paging['hits']:.0f} hits, {paging['misses']:.0f} misses "
            f"({paging['hit_rate']:.1%} resident), {format_bytes(paging['page_in_bytes'])} read, "
            f"{paging['stall_seconds']:.2f} s waited"
        )
    if paging.get("prefetch_issued_bytes"):
        useful, late, wasted = (
            format_bytes(paging[f"prefetch_{name}_bytes"]) for name in ("useful", "late", "wasted")
        )
        lines.append(f"prefetch: {useful} useful, {late} late, {wasted} wasted")
    return lines


def _memory_line(measured: RunMeasurement) -> str:
    planned, peak = measured.planned_bytes, measured.peak_memory_bytes
    budget = measured.budget_bytes
    limit = f", budget {format_bytes(budget)}" if budget else ""
    error = f" ({peak / planned - 1:+.1%})" if planned else ""
    return f"peak memory {format_bytes(peak)}, planned {format_bytes(planned)}{error}{limit}"
