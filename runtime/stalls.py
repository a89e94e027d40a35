"""How long a token may wait for experts that are not in memory, where each has a resident shadow.

`exact`    as long as it takes: shadows are not used, results do not depend on the budget
`bounded`  for the misses with the largest router weights, up to an allowance per token
`never`    not at all: misses are computed from their shadows

A prompt always waits: nearly every expert of a layer is needed by some of its tokens, so each body
is read once for many of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from edge_moe.errors import InputError
from edge_moe.measurement import StallCost
from edge_moe.runtime.fetch_choice import Misses
from edge_moe.runtime.policy import Key, PagingStatistics

Stall = Literal["exact", "bounded", "never"]
DEFAULT_STALL_SECONDS = 0.01
"""Per token, under `bounded`."""


@dataclass(frozen=True)
class StallOptions:
    """What was asked for."""

    mode: Stall = "exact"
    seconds: float | None = None
    """Of waiting per token, under `bounded`; default `DEFAULT_STALL_SECONDS`."""
    bytes_per_second: float | None = None
    """What a second of waiting reads; by default as fast as the slots were filled at first, and
    then as bodies arrive."""
    is_repeatable: bool = False
    """Read bodies between layers, with nobody waiting for them as far as statistics go, instead of
    in the background: results no longer depend on when a read is done. For measuring quality."""

    def __post_init__(self) -> None:
        """Raises InputError for values that mean nothing."""
        if self.mode not in get_args(Stall):
            raise InputError(f"stall {self.mode!r} is unknown: use {', '.join(get_args(Stall))}")
        if self.seconds is not None and self.mode != "bounded":
            raise InputError(
                f"seconds of waiting bound nothing where stall is {self.mode}: use bounded, or "
                "leave them out"
            )
        for name, value in (("seconds", self.seconds), ("bytes/s", self.bytes_per_second)):
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{value:g} {name} of waiting mean nothing: use more than 0")

    @property
    def uses_shadows(self) -> bool:
        return self.mode != "exact"

    def only_fetching(self, misses: Misses) -> Misses:
        """What `misses` comes to: where shadows compute them, what is waited for is fetched.

        Raises:
            InputError: misses are to be computed on the CPU.
        """
        if not self.uses_shadows:
            return misses
        if misses == "cpu":
            raise InputError(
                f"misses are computed from shadows where stall is {self.mode}, or on the CPU: "
                "leave out --misses cpu, or use --stall exact"
            )
        return "fetch"

    @property
    def allowed_seconds(self) -> float:
        """Per token."""
        if self.mode != "bounded":
            return 0.0
        return DEFAULT_STALL_SECONDS if self.seconds is None else self.seconds


EXACT = StallOptions()
"""Results are those of the bodies, whatever is in memory."""


class Miss(NamedTuple):
    """An expert that a token chose and that is not in memory."""

    key: Key
    weight: float
    """As the router gave it."""
    record_bytes: int


class Allowance:
    """Which misses of a token are waited for: integers only, once it is said what a second reads.

    What may be read for a token is shared out evenly over its layers, in order, and what a layer
    leaves is for the next ones. Within a layer the misses with the largest weights come first.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._spent_bytes = 0

    def start_token(self) -> None:
        """Nothing was waited for yet."""
        self._spent_bytes = 0

    def grant(self, layer: int, misses: Sequence[Miss], bytes_per_token: float) -> list[Key]:
        """Those of a layer's `misses` that are worth waiting for, the heaviest first."""
        allowed = bytes_per_token * (layer + 1) / self._num_layers
        granted = []
        for miss in sorted(misses, key=lambda miss: (-abs(miss.weight), miss.key)):
            if self._spent_bytes + miss.record_bytes > allowed:
                break
            self._spent_bytes += miss.record_bytes
            granted.append(miss.key)
        return granted


def stall_cost(
    options: StallOptions, before: PagingStatistics, now: PagingStatistics, num_tokens: int
) -> StallCost:
    """What was computed from what for `num_tokens` tokens, between two states of the counters."""
    hits, misses = now.hits - before.hits, now.misses - before.misses
    routed, weight = hits + misses, now.decoded_weight - before.decoded_weight
    shadow_weight = now.shadow_weight - before.shadow_weight
    return StallCost(
        mode=options.mode,
        allowed_seconds=options.allowed_seconds if options.mode == "bounded" else None,
        bytes_per_second=options.bytes_per_second,
        is_repeatable=options.is_repeatable,
        hit_rate=hits / routed if routed else 1.0,
        shadow_experts_per_token=(now.shadow_experts - before.shadow_experts) / num_tokens,
        shadow_share=shadow_weight / weight if weight else 0.0,
        page_in_bytes_per_token=(now.page_in_bytes - before.page_in_bytes) / num_tokens,
        stall_seconds_per_token=(now.stall_seconds - before.stall_seconds) / num_tokens,
    )
