"""Which predictors a trace can feed, and what it lacks for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

from edge_moe.runtime.predictors import (
    LINEAR_GUESSES,
    ROUTER_GUESSES,
    Popular,
    Predictor,
    Repeat,
    Replayed,
    TokenPrior,
    Transitions,
)
from edge_moe.runtime.simulate import Replay
from edge_moe.runtime.trace import NO_GUESS, Trace

Maker = Callable[[], Predictor]
"""Makes a predictor that has seen nothing."""
_LABELS = {ROUTER_GUESSES: "next router", LINEAR_GUESSES: "linear map"}
_ADVICE = {
    ROUTER_GUESSES: "the trace holds no guesses of the next router; record it again, some tokens "
    "one by one",
    LINEAR_GUESSES: "the trace holds no guesses of one; fit one with `edge-moe fit-guesses`, and "
    "record again with --linear-map",
}


def predictor_makers(replay: Replay, top_k: int) -> list[Maker]:
    """Everything that the trace can feed, as wide as top_k and wider, and the bound last."""
    num_rows = [len(layer) for layer in replay.sizes]
    widths = sorted({top_k, min(2 * top_k, min(num_rows))})
    by_width = [_of_width(replay.trace, num_rows, width) for width in widths]
    return [
        lambda: Repeat(num_rows),
        *chain.from_iterable(zip(*by_width, strict=True)),
        lambda: Replayed(
            "exact", ((ask.layer, ask.rows) for ask in replay.asks() if ask.is_decoding)
        ),
    ]


def lacking(trace: Trace, never: Mapping[str, str] | None = None) -> list[str]:
    """Predictors that cannot be scored, each with what the trace lacks and what to do.

    `never` says of guesses that no trace of the model can hold why that is.
    """
    found = []
    if trace.token_ids is None:
        found.append("token prior: the trace holds no token ids; record it again")
    return found + [
        f"{_LABELS[name]}: {(never or {}).get(name, advice)}"
        for name, advice in _ADVICE.items()
        if name not in trace.guesses
    ]


def _of_width(trace: Trace, num_rows: Sequence[int], width: int) -> list[Maker]:
    makers: list[Maker] = [
        lambda: Popular(num_rows, width),
        lambda: Transitions(num_rows, width),
    ]
    if trace.token_ids is not None:
        makers.append(lambda: TokenPrior(len(num_rows), width))
    return [*makers, *(_recorded(trace, name, width) for name in sorted(trace.guesses))]


def _recorded(trace: Trace, name: str, width: int) -> Maker:
    label = f"{_LABELS.get(name, name)} {width}"
    return lambda: Replayed(label, _guessed(trace, name, width))


def _guessed(trace: Trace, name: str, width: int) -> Iterator[tuple[int, list[int]]]:
    """For every layer of every single token: what was guessed for it; nothing for the first."""
    for step in trace.steps():
        if step.stop - step.start > 1:
            continue
        table = trace.guesses[name][step.start, :, :width]
        for layer, rows in enumerate(table.tolist()):
            yield layer, [row for row in rows if row != NO_GUESS]
