"""`DeviceProfile`: how much memory a device has and how fast it moves, with a source per number.

Upper bounds from specifications, not measurements: they bound a plan's tokens per second.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from typing import Any, get_args

from edge_moe.errors import InputError
from edge_moe.plan import Device
from edge_moe.units import parse_bytes

_REQUIRED = ("memory_bytes", "memory_bytes_per_second")
_OPTIONAL = ("host_link_bytes_per_second", "storage_bytes_per_second")


@dataclass(frozen=True)
class DeviceProfile:
    """One device, as its makers specify it."""

    label: str
    device: Device
    memory_bytes: int
    """VRAM of a `cuda` device, RAM of a `cpu` one."""
    memory_bytes_per_second: int
    host_link_bytes_per_second: int | None
    """RAM to VRAM, one direction; None for a `cpu` device, which needs no link."""
    storage_bytes_per_second: int | None
    """Disk to RAM; None where the device does not determine it."""
    sources: dict[str, str]
    """Where each of the numbers above comes from, by field name."""

    @classmethod
    def from_toml(cls, text: str, source: str = "device profile") -> DeviceProfile:
        """Parse a file of `profiles/devices`: `label`, `device`, then {value, source} per number.

        Raises:
            InputError: not TOML, an unknown or missing key, a bad number, or one without source.
        """
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{source} is not TOML: {error}") from None
        known = {"label", "device", *_REQUIRED, *_OPTIONAL}
        if unknown := sorted(table.keys() - known):
            raise InputError(f"{source}: unknown key {unknown[0]!r}, known: {sorted(known)}")
        if table.get("device") not in get_args(Device) or not isinstance(table.get("label"), str):
            raise InputError(f"{source}: needs a label, and a device of {get_args(Device)}")
        numbers = {key: _read_number(table, key, source) for key in (*_REQUIRED, *_OPTIONAL)}
        for key in _REQUIRED:
            if numbers[key] is None:
                raise InputError(f"{source}: {key} is missing")
        sources = {key: str(table[key]["source"]) for key in numbers if key in table}
        return cls(label=table["label"], device=table["device"], sources=sources, **numbers)


def _read_number(table: dict[str, Any], key: str, source: str) -> Any:
    """Bytes under `key`, or None when it is absent."""
    if key not in table:
        return None
    entry = table[key]
    if not isinstance(entry, dict) or entry.keys() != {"value", "source"} or not entry["source"]:
        raise InputError(f"{source}: {key} needs a value such as '12 GiB', a source, and no more")
    return parse_bytes(str(entry["value"]))
