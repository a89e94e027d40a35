"""`simulate --device this`: what is measured on the machine at hand before a trace is replayed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edge_moe.available_memory import available_memory_bytes
from edge_moe.commands.options import stderr
from edge_moe.units import format_bytes

if TYPE_CHECKING:
    from edge_moe.profile import DeviceProfile
    from edge_moe.runtime.trace import Trace
    from edge_moe.runtime.traced_model import TracedModel

_TIMING_CONTEXT = 64


def measured_here(
    path: Path, model: TracedModel, trace: Trace, *, again: bool
) -> tuple[DeviceProfile, float | None]:
    """(this machine, seconds of a token that finds every expert, or None where that is not known)

    Raises:
        EdgeMoeError: the model cannot be read, or opened.
    """
    from edge_moe.runtime import this_machine

    sizes = model.sizes(trace)
    num_experts = sum(map(len, sizes))
    piece_bytes = sum(map(sum, sizes)) // num_experts // model.pieces_per_expert
    key = model.computed_as
    rates = this_machine.machine_rates(path, piece_bytes, again=again)
    if key not in rates.compute and _fits(model):
        token_ids = [1] * this_machine.NUM_TOKENS
        if trace.token_ids is not None and trace.num_tokens >= len(token_ids):
            token_ids = trace.token_ids[: len(token_ids)].tolist()
        with model.stepping(_TIMING_CONTEXT) as step:
            rates = this_machine.with_compute(rates, key, step, token_ids)
    found = rates.compute.get(key)
    return rates.profile(path, piece_bytes, key), None if found is None else found.value


def _fits(model: TracedModel) -> bool:
    """Whether the model can be computed with every expert in memory; says so where it cannot."""
    needed = sum(term.num_bytes for term in model.terms(_TIMING_CONTEXT, has_budget=False))
    available = available_memory_bytes()
    if available is None or needed <= available:
        return True
    stderr().print(
        f"a token is not timed: the whole model takes {format_bytes(needed)}, "
        f"{format_bytes(available)} is free; the bandwidth of memory stands for it"
    )
    return False
