"""What fetching and computing an expert cost on this machine: a probe of well under a second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from edge_moe.runtime.cpu_misses import CpuMisses
from edge_moe.runtime.fetch_choice import Prices
from edge_moe.runtime.host_tier import HostTier
from edge_moe.runtime.policy import Key
from edge_moe.runtime.transfer import Transfer

_ROUNDS = 5
_LINK_BYTES = 64 * 2**20
"""Copied at most to learn a bandwidth."""


class PriceProbe:
    """Measures with the experts that the host tier holds, at least one."""

    def __init__(
        self,
        misses: CpuMisses,
        host: HostTier,
        transfer: Transfer,
        modules: Sequence[Any],
        hidden: torch.Tensor,
        top_k: int,
    ) -> None:
        """`modules` are the experts modules of all layers, `hidden` [1, H] is on the device."""
        self._misses = misses
        self._host = host
        self._transfer = transfer
        self._hidden = hidden
        layers: dict[int, list[Key]] = {}
        for key in host.keys():
            layers.setdefault(key[0], []).append(key)
        self._keys = max(layers.values(), key=len)[:top_k]
        self._module = modules[self._keys[0][0]]

    def prices(self) -> Prices:
        """Medians of a few rounds; the first, which warms up, is left out."""
        records = [record for key in self._keys if (record := self._host.hold(key)) is not None]
        num_bytes = sum(record.numel() for record in records)
        target = torch.empty(
            max(record.numel() for record in records), dtype=torch.uint8, device=self._hidden.device
        )
        try:
            alone = self._copy(records, target, least_bytes=_LINK_BYTES)
            rounds = [self._contend(records, target) for _ in range(1 + _ROUNDS)][1:]
        finally:
            for key in self._keys:
                self._host.let_go(key, None)
        merges = [self._merge() for _ in range(1 + 4 * _ROUNDS)][1:]
        return Prices(
            link_bytes_per_second=alone,
            contended_bytes_per_second=min(alone, statistics.median(rate for rate, _ in rounds)),
            cpu_seconds_per_byte=statistics.median(seconds for _, seconds in rounds) / num_bytes,
            merge_seconds=statistics.median(merges),
        )

    def _copy(
        self, records: Sequence[torch.Tensor], target: torch.Tensor, least_bytes: int
    ) -> float:
        """Bytes per second of one copy after another, until there are `least_bytes`."""
        start, copied = time.perf_counter(), 0
        arrival = None
        while copied < least_bytes:
            for record in records:
                arrival = self._transfer.from_host(record, target[: record.numel()], None)
                copied += record.numel()
        if arrival is not None:
            self._transfer.wait(arrival)
        return copied / (time.perf_counter() - start)

    def _contend(
        self, records: Sequence[torch.Tensor], target: torch.Tensor
    ) -> tuple[float, float]:
        """(bytes per second of copies, seconds of the experts) while both are under way."""
        done: list[float] = []
        start = time.perf_counter()
        result = self._submit()
        result.add_done_callback(lambda _: done.append(time.perf_counter() - start))
        one_by_one = [[record] for record in records]
        rates: list[float] = []
        while not result.done():
            record = one_by_one[len(rates) % len(one_by_one)]
            rates.append(self._copy(record, target, least_bytes=1))
        result.result()
        while not done:
            time.sleep(0)
        return (statistics.median(rates) if rates else float("inf")), done[0]

    def _merge(self) -> float:
        """Seconds to hand nothing to the CPU and to add it to what the device has."""
        start = time.perf_counter()
        output = torch.zeros_like(self._hidden)
        found = self._misses.idle(self._hidden).result()
        total = output.add_(found.to(output.device, output.dtype))
        float(total[0, 0])  # waits for the device
        return time.perf_counter() - start

    def _submit(self) -> Any:
        self._host.acquire_residents(self._keys)
        pairs = [(row, 1.0) for _, row in self._keys]
        return self._misses.submit(self._module, self._keys[0][0], self._hidden, pairs, self._keys)
