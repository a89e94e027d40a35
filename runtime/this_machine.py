"""`MachineRates`: the machine at hand as a device profile, measured and remembered with its date.

    memory    every core reads arrays that no cache holds
    storage   pieces of an expert at random places of the model's own files, past the page cache
    compute   seconds of a token with everything in memory, where that fits

Kept in `machine.json` beside the other measurements in the user's cache folder; another processor,
or other versions of what computes, are measured anew.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_moe.errors import InputError
from edge_moe.files import write_text
from edge_moe.measurement import Machine, this_machine, usable_cores
from edge_moe.overhead import cache_path
from edge_moe.profile import DeviceProfile
from edge_moe.runtime.storage_rate import storage_rate

_ARRAY_BYTES = 64 * 2**20
_REPEATS = 5
_WARM_TOKENS, _TIMED_TOKENS = 4, 24

NUM_TOKENS = _WARM_TOKENS + _TIMED_TOKENS
"""That are computed to time one."""
Step = Callable[[int], object]
"""Computes one token, given its id."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Measured(_Model):
    """One number, and when it was taken."""

    value: float = Field(gt=0)
    time: datetime
    how: str

    @classmethod
    def now(cls, value: float, how: str) -> Measured:
        """Taken at this moment."""
        return cls(value=value, time=datetime.now(UTC).replace(microsecond=0), how=how)

    def describe(self) -> str:
        """`measured on 2026-01-31: 4 threads read ...`"""
        return f"measured on {self.time:%Y-%m-%d}: {self.how}"


class MachineRates(_Model):
    """What is known of one machine."""

    machine: Machine
    memory: Measured
    """Bytes per second."""
    storage: dict[str, Measured] = Field(default_factory=dict)
    """Bytes per second, by disk and size of the pieces."""
    compute: dict[str, Measured] = Field(default_factory=dict)
    """Seconds per token, by what is computed: see `TracedModel.computed_as`."""

    def profile(self, path: Path, piece_bytes: int, computed_as: str) -> DeviceProfile:
        """This machine for the model at `path`, whose storage was measured."""
        storage, compute = self.storage[_disk(path, piece_bytes)], self.compute.get(computed_as)
        machine, memory = self.machine, self.memory
        sources = {
            "memory_bytes": "as the system says",
            "memory_bytes_per_second": memory.describe(),
            "storage_bytes_per_second": storage.describe(),
        }
        if compute is not None:
            sources["compute_seconds"] = compute.describe()
        return DeviceProfile(
            label=f"this machine ({machine.cpu}, {machine.cores} cores)",
            device="cpu",
            memory_bytes=machine.ram_bytes,
            memory_bytes_per_second=round(memory.value),
            host_link_bytes_per_second=None,
            storage_bytes_per_second=round(storage.value),
            sources=sources,
        )


def machine_rates(path: Path, piece_bytes: int, *, again: bool = False) -> MachineRates:
    """Memory, and the disk of the model at `path`, whose experts come in pieces of `piece_bytes`.

    What is remembered is not measured again, unless `again` says so.

    Raises:
        InputError: a file that cannot be read.
    """
    machine = this_machine()
    known = None if again else _remembered(machine)
    rates = known or MachineRates(machine=machine, memory=memory_rate())
    key = _disk(path, piece_bytes)
    if key not in rates.storage:
        measured = Measured.now(*storage_rate(weight_files(path), piece_bytes))
        rates = rates.model_copy(update={"storage": rates.storage | {key: measured}})
    _remember(rates)
    return rates


def with_compute(
    rates: MachineRates, computed_as: str, step: Step, token_ids: Sequence[int]
) -> MachineRates:
    """`rates` and what a token of a model takes, measured by computing `token_ids`."""
    measured = token_seconds(step, token_ids)
    rates = rates.model_copy(update={"compute": rates.compute | {computed_as: measured}})
    _remember(rates)
    return rates


def memory_rate() -> Measured:
    """Bytes per second that all cores read together: dot products of arrays larger than caches."""
    cores = usable_cores()
    arrays = [np.ones(_ARRAY_BYTES // 4, np.float32) for _ in range(cores)]

    def read(array: np.ndarray) -> None:
        half = len(array) // 2
        float(np.dot(array[:half], array[half:]))

    rates = []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(_REPEATS):
            start = time.perf_counter()
            list(pool.map(read, arrays))
            rates.append(cores * _ARRAY_BYTES / (time.perf_counter() - start))
    how = f"{cores} threads read arrays of {_ARRAY_BYTES // 2**20} MiB"
    return Measured.now(statistics.median(rates), how)


def weight_files(path: Path) -> list[Path]:
    """The large files of a model: the file itself, or those of a folder that hold most bytes.

    Raises:
        InputError: nothing is there.
    """
    if path.is_file():
        return [path.resolve()]
    found = sorted(
        (each.resolve() for each in path.rglob("*") if each.is_file()),
        key=lambda each: each.stat().st_size,
        reverse=True,
    )
    if not found:
        raise InputError(f"{path} holds no file: give the model that was traced")
    least = found[0].stat().st_size // 4
    return [each for each in found if each.stat().st_size >= least]


def token_seconds(step: Step, token_ids: Sequence[int]) -> Measured:
    """Median seconds per token, of `NUM_TOKENS`."""
    seconds = []
    for token_id in token_ids:
        start = time.perf_counter()
        step(token_id)
        seconds.append(time.perf_counter() - start)
    how = f"median of {_TIMED_TOKENS} tokens with every expert in memory"
    return Measured.now(statistics.median(seconds[_WARM_TOKENS:]), how)


def rates_path() -> Path:
    """File that remembers the rates."""
    return cache_path().with_name("machine.json")


def _remember(rates: MachineRates) -> None:
    """Write the file; a cache folder that cannot be written to is no error."""
    try:
        rates_path().parent.mkdir(parents=True, exist_ok=True)
        write_text(rates_path(), rates.model_dump_json(indent=1) + "\n")
    except OSError:
        return


def _disk(path: Path, piece_bytes: int) -> str:
    return f"disk {weight_files(path)[0].stat().st_dev}, pieces of {piece_bytes} bytes"


def _remembered(machine: Machine) -> MachineRates | None:
    try:
        found = MachineRates.model_validate(json.loads(rates_path().read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        return None
    return found if found.machine == machine else None
