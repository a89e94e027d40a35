"""Shipped data about devices, and the code that finds it."""

from __future__ import annotations

from importlib.resources import files

from edge_moe.errors import InputError
from edge_moe.profile import DeviceProfile

_SUFFIX = ".toml"


def device_names() -> tuple[str, ...]:
    """Names of the shipped device profiles, sorted."""
    folder = files("edge_moe.profiles") / "devices"
    names = (entry.name for entry in folder.iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)))


def load_device(name: str) -> DeviceProfile:
    """The shipped profile called `name`.

    Raises:
        InputError: unknown name, with the known ones; or a damaged file.
    """
    known = device_names()
    if name not in known:
        raise InputError(f"device {name!r} is unknown; known devices: {', '.join(known)}")
    entry = files("edge_moe.profiles") / "devices" / f"{name}{_SUFFIX}"
    return DeviceProfile.from_toml(entry.read_text(encoding="utf-8"), source=entry.name)
