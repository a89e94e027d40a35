"""Replaying a trace on a clock: does reading ahead pay on a link of this rate?

One link brings one expert after another, those that are waited for behind those already on their
way. A layer waits for its experts, guesses are admitted as the engine admits them, and it computes:
where a layer's experts come together (GGUF), what can be read until the next choice is, of the last
expert perhaps a part; else what `AdmissionRule` finds worth it. Prompts move experts and take no
time: only single tokens are timed.
"""

from __future__ import annotations

from collections import Counter

from pydantic import BaseModel, ConfigDict

from edge_moe.runtime.policy import AdmissionRule, EvictionPolicy, Key
from edge_moe.runtime.predictors import Predictor
from edge_moe.runtime.replay import Residents, Room
from edge_moe.runtime.simulate import Replay

_MATRICES = 3
"""Of an expert, of which the first are read ahead where not all fit."""


class ReadAhead(BaseModel):
    """What became of the bytes that were read ahead."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    useful_bytes: int
    """There in time, and used."""
    late_bytes: int
    """Used, but waited for."""
    wasted_bytes: int
    """Evicted without use, or left over."""


class Timeline(ReadAhead):
    """What decoding took, and what was read ahead of it."""

    predictor: str
    num_tokens: int
    """Timed ones."""
    seconds: float
    stall_seconds: float
    page_in_bytes: int
    rejected: int
    """Guesses that the rule did not admit."""
    layers: tuple[ReadAhead, ...]

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds else 0.0


def timeline(
    replay: Replay,
    room: Room,
    policy: type[EvictionPolicy],
    predictor: Predictor | None,
    *,
    bytes_per_second: float,
    layer_seconds: float,
) -> Timeline:
    """Replay on a clock; None reads nothing ahead. `layer_seconds` are those of computing.

    Raises:
        InputError: no slot at all for a size, or too few for one step.
    """
    kind = _IdleClock if room.comes_together else _Clock
    clock = kind(replay.residents(room, policy), bytes_per_second, layer_seconds)
    num_layers, num_tokens = len(replay.sizes), 0
    for ask in replay.asks(room.most_tokens):
        if not ask.is_decoding:
            clock.skip(ask.layer, ask.rows)
            continue
        num_tokens += ask.layer == 0
        clock.require(ask.layer, ask.rows)
        if predictor is not None:
            if ask.layer == 0:
                predictor.begin(replay.token_id(ask))
            predictor.learn(ask.layer, ask.rows)
            if ask.layer + 1 < num_layers:
                clock.prefetch(ask.layer, ask.rows, predictor.guess(ask.layer, ask.rows))
        clock.now += layer_seconds
    layers = tuple(clock.read_ahead(layer) for layer in range(num_layers))
    return Timeline(
        predictor=predictor.name if predictor else "none",
        num_tokens=num_tokens,
        seconds=clock.now,
        stall_seconds=clock.stall_seconds,
        page_in_bytes=clock.demanded_bytes + clock.issued.total(),
        useful_bytes=sum(each.useful_bytes for each in layers),
        late_bytes=sum(each.late_bytes for each in layers),
        wasted_bytes=sum(each.wasted_bytes for each in layers),
        rejected=clock.rejected,
        layers=layers,
    )


class _Clock:
    def __init__(self, residents: Residents, bytes_per_second: float, layer_seconds: float) -> None:
        self._residents = residents
        self._rate = bytes_per_second
        self._layer_seconds = layer_seconds
        self._rule = AdmissionRule(bytes_per_second=bytes_per_second)
        self._arrival: dict[Key, float] = {}  # of what was read ahead and not used yet
        self._guessed: set[int] = set()
        self._link_free = 0.0
        self._last = 0.0
        self.now = self.stall_seconds = 0.0
        self.demanded_bytes = self.rejected = 0
        self.issued: Counter[int] = Counter()  # bytes by layer, as the next two
        self._useful: Counter[int] = Counter()
        self._late: Counter[int] = Counter()
        residents.is_busy = lambda key: self._arrival.get(key, 0.0) > self.now
        residents.on_evicted = self._forget

    def read_ahead(self, layer: int) -> ReadAhead:
        """What became of a layer's guesses so far."""
        useful, late = self._useful[layer], self._late[layer]
        return ReadAhead(
            useful_bytes=useful,
            late_bytes=late,
            wasted_bytes=self.issued[layer] - useful - late,
        )

    def skip(self, layer: int, rows: list[int]) -> None:
        """A piece of a prompt: experts move, time stands still."""
        self._arrival = dict.fromkeys(self._arrival, self.now)
        self._link_free, self._guessed = self.now, set()
        self._residents.ask(layer, rows)
        for row in rows:
            self._count((layer, row))

    def require(self, layer: int, rows: list[int]) -> None:
        """Wait until `rows` are there."""
        for row in self._guessed:
            self._rule.learn_precision(layer, row in rows)
        self._guessed = set()
        ready = max((self._count((layer, row)) for row in rows), default=self.now)
        for key in self._residents.ask(layer, rows):
            ready = self._demand(self._residents.num_bytes(key))
        stall = max(0.0, ready - self.now)
        self.stall_seconds += stall
        self.now += stall
        self._rule.learn_busy(stall, self.now - self._last)
        self._last = self.now

    def prefetch(self, layer: int, rows: list[int], guess: list[int]) -> None:
        """Put on the link what is worth it; experts in use stay."""
        keys = [(layer + 1, row) for row in guess]
        missing = [key for key in keys if key not in self._residents]
        self._guessed = {row for _, row in missing}
        keep = frozenset([*keys, *((layer, row) for row in rows)])
        self._read_ahead(missing, keep)

    def _read_ahead(self, missing: list[Key], keep: frozenset[Key]) -> None:
        for key in missing:
            size = self._residents.num_bytes(key)
            queued = sum(
                self._residents.num_bytes(other)
                for other, arrival in self._arrival.items()
                if arrival > self.now
            )
            if not self._rule.admits(key[0], size, queued):
                self.rejected += 1
            elif self._residents.admit(key, keep):
                self._issue(key, size)

    def _issue(self, key: Key, size: int) -> None:
        self.issued[key[0]] += size
        self._arrival[key] = self._transfer(size)

    def _count(self, key: Key) -> float:
        """When a wanted expert arrives, if it was read ahead; the present otherwise."""
        arrival = self._arrival.pop(key, None)
        if arrival is None:
            return self.now
        size = self._residents.num_bytes(key)
        counts = self._late if arrival > self.now else self._useful
        counts[key[0]] += size
        return arrival

    def _demand(self, size: int) -> float:
        """When bytes have come that are waited for."""
        self.demanded_bytes += size
        return self._transfer(size)

    def _forget(self, key: Key) -> None:
        self._arrival.pop(key, None)

    def _transfer(self, size: int) -> float:
        """When `size` more bytes have come over the link."""
        self._link_free = max(self._link_free, self.now) + size / self._rate
        return self._link_free


class _IdleClock(_Clock):
    """Guesses fill the time in which the link has nothing else to do, as `IdleLink` tells it."""

    def __init__(self, residents: Residents, bytes_per_second: float, layer_seconds: float) -> None:
        super().__init__(residents, bytes_per_second, layer_seconds)
        self._parts: dict[Key, int] = {}
        """Bytes that were read of an expert that did not fit whole."""

    def skip(self, layer: int, rows: list[int]) -> None:
        self._drop_parts(layer, rows)
        super().skip(layer, rows)

    def require(self, layer: int, rows: list[int]) -> None:
        self._drop_parts(layer, rows)
        super().require(layer, rows)

    def _read_ahead(self, missing: list[Key], keep: frozenset[Key]) -> None:
        spare_bytes = int(self._layer_seconds * self._rate)
        for at, key in enumerate(missing):
            size = self._residents.num_bytes(key)
            part = min(_MATRICES, _MATRICES * spare_bytes // size) * size // _MATRICES
            if not part:
                self.rejected += len(missing) - at
                return
            if self._residents.admit(key, keep):
                self._issue(key, part)
                spare_bytes -= part
                if part < size:
                    self._parts[key] = part

    def _drop_parts(self, layer: int, rows: list[int]) -> None:
        """What was read in part for nothing makes room at once."""
        for key in [key for key in self._parts if key[0] == layer and key[1] not in rows]:
            self._residents.drop(key)

    def _count(self, key: Key) -> float:
        part = self._parts.pop(key, None)
        if part is None:
            return super()._count(key)
        self._useful[key[0]] += part  # there by now: it fitted until this choice
        del self._arrival[key]
        return self._demand(self._residents.num_bytes(key) - part)

    def _forget(self, key: Key) -> None:
        super()._forget(key)
        self._parts.pop(key, None)
