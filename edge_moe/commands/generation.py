"""One answer of a session: streamed, timed, and summed up. Shared by `run` and its chat."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_moe.errors import InputError
from edge_moe.units import format_bytes

if TYPE_CHECKING:
    from edge_moe.measurement import RunMeasurement
    from edge_moe.runtime.gguf_session import GgufSession
    from edge_moe.runtime.onnx_session import OnnxSession
    from edge_moe.runtime.session import Session

    Runnable = Session | OnnxSession | GgufSession

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
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"--temperature is {self.temperature:g}: use 0 or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p is {self.top_p:g}: use a number above 0, at most 1")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed is {self.seed}: use 0 to {2**63 - 1}")
        if "" in self.stop:
            raise InputError("--stop is empty: give the text to stop at")


def as_prompt(session: Runnable, text: str, is_raw: bool) -> Prompt:
    """`text` as a chat message where the model has a chat template, else as it is."""
    if is_raw or not session.has_chat_template:
        return text
    return [{"role": "user", "content": text}]


def answer(
    session: Runnable, prompt: Prompt, sampling: Sampling, show: Callable[[str], None]
) -> tuple[str, bool]:
    """(text, whether Ctrl-C ended it early); every piece goes to `show` as it comes.

    `session.timing` says afterwards how many tokens it was and how long it took.
    """
    pieces: list[str] = []
    try:
        for piece in session.generate(prompt, **dataclasses.asdict(sampling)):
            pieces.append(piece)
            show(piece)
    except KeyboardInterrupt:
        return "".join(pieces), True
    except Exception:
        if pieces:
            show("\n")  # what went wrong begins a line of its own
        raise
    return "".join(pieces), False


def ignore(piece: str) -> None:
    """Show nothing."""


def measure(
    session: Runnable, model: Path, text: str, *, budget_bytes: int | None, seed: int | None
) -> RunMeasurement:
    """The run as a record: what the memory was planned to hold, what was used, how fast."""
    from edge_moe.measurement import Provenance, RunMeasurement
    from edge_moe.runtime.accelerator import accelerator_name
    from edge_moe.runtime.evaluate import model_kind
    from edge_moe.runtime.memory import peak_memory_bytes

    timing, kind = session.timing, model_kind(model)
    return RunMeasurement(
        provenance=Provenance.here(seed=seed, accelerator=accelerator_name(session.device.type)),
        model=str(model),
        model_kind=kind,
        device=session.device.type,
        budget_bytes=budget_bytes,
        context_tokens=session.context_tokens,
        terms=session.memory(),
        host_terms=session.host_memory(),
        measured_terms=_measured_terms(session, model),
        cached_tokens=timing.cached_tokens,
        peak_memory_bytes=peak_memory_bytes(
            session.device.type if kind in ("package", "checkpoint") else "cpu"
        ),
        prompt_tokens=timing.prompt_tokens,
        generated_tokens=timing.generated_tokens,
        load_seconds=session.load_seconds,
        prefill_seconds=timing.prefill_seconds,
        decode_seconds=timing.decode_seconds,
        tokens_per_second=timing.tokens_per_second,
        paging=_paging(session),
        kernels=_kernels(session),
        misses=str(getattr(session, "misses", "")),
        graphs=str(getattr(session, "graphs", "")),
        pre_gate=str(getattr(session, "pre_gate", "")),
        text=text,
    )


def _measured_terms(session: Runnable, model: Path) -> dict[str, int]:
    from edge_moe.overhead import probed_bytes

    found = session.measured_terms | {"KV cache": session.timing.cache_bytes}
    runtime = next(term for term in session.memory() if term.name == "runtime")
    if runtime.source == "measured":
        found["runtime"] = probed_bytes(runtime.num_bytes, model)
    return found


def _kernels(session: Runnable) -> str:
    """Whose kernels compute the experts; only edge-moe's own runtime has a choice."""
    return str(getattr(session, "kernels", ""))


def _paging(session: Runnable) -> dict[str, float]:
    statistics = session.statistics()
    if statistics is None:
        return {}
    return dataclasses.asdict(statistics) | {
        "hit_rate": statistics.hit_rate,
        "shadow_share": statistics.shadow_share,
    }


def statistics_lines(measured: RunMeasurement) -> list[str]:
    """The measurement in a few lines, for a person."""
    speed = f"{measured.tokens_per_second:.1f} tokens/s"
    lines = [
        f"{measured.generated_tokens} tokens in {measured.decode_seconds:.2f} s ({speed}); prompt "
        f"{measured.prompt_tokens} tokens in {measured.prefill_seconds:.2f} s; "
        f"loaded in {measured.load_seconds:.2f} s",
        _memory_line(measured),
    ]
    if measured.host_terms:
        held = ", ".join(
            f"{term.name} {format_bytes(term.num_bytes)}" for term in measured.host_terms
        )
        lines.append(f"in RAM beside the slots: {held}")
    if measured.kernels:
        lines.append(f"kernels of the experts: {measured.kernels}")
    if measured.pre_gate:
        lines.append(f"pre-gate: {measured.pre_gate}")
    paging = measured.paging
    if paging.get("misses"):
        lines.append(
            f"paging: {paging['hits']:.0f} hits, {paging['misses']:.0f} misses "
            f"({paging['hit_rate']:.1%} resident), {format_bytes(paging['page_in_bytes'])} read, "
            f"{paging['stall_seconds']:.2f} s waited"
        )
    if measured.graphs:
        lines.append(f"graphs: {measured.graphs}")
    if measured.misses:
        lines.append(
            f"misses {measured.misses}; {paging.get('cpu_experts', 0):.0f} computed on the CPU, "
            f"{format_bytes(paging.get('cpu_bytes', 0))} not moved"
        )
    if shadows := paging.get("shadow_experts"):
        lines.append(
            f"shadows: {shadows:.0f} misses computed from shadows, "
            f"{paging['shadow_share']:.1%} of the decoded tokens' router weight"
        )
    if skipped := paging.get("skipped_experts"):
        routed = paging["routed_experts"]
        lines.append(
            f"skipping: {skipped:.0f} of {routed:.0f} chosen experts left out "
            f"({skipped / routed:.1%}), {format_bytes(paging['skipped_bytes'])} not used, "
            f"{format_bytes(paging['not_paged_bytes'])} of them not paged in"
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
