"""Shipped data about devices and tasks, and the code that finds it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from edge_moe.errors import InputError
from edge_moe.profile import DeviceProfile
from edge_moe.task_pattern import TaskPattern

_SUFFIX = ".toml"


def device_names() -> tuple[str, ...]:
    """Names of the shipped device profiles, sorted."""
    folder = files("edge_moe.profiles") / "devices"
    names = (entry.name for entry in folder.iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)))


def load_device(name: str) -> DeviceProfile:
    """The shipped profile called `name`, or the only one whose name begins so.

    Raises:
        InputError: unknown name, with the known ones; or a damaged file.
    """
    known = device_names()
    if name not in known:
        beginning = [each for each in known if each.startswith(f"{name}-")]
        name = beginning[0] if len(beginning) == 1 else name
    if name not in known:
        raise InputError(f"device {name!r} is unknown; known devices: {', '.join(known)}")
    entry = files("edge_moe.profiles") / "devices" / f"{name}{_SUFFIX}"
    return DeviceProfile.from_toml(entry.read_text(encoding="utf-8"), source=entry.name)


def load_patterns(model_fingerprint: str, folder: Path | None = None) -> dict[str, TaskPattern]:
    """Task patterns of one model by name: the shipped ones, or those in `folder`.

    Raises:
        InputError: `folder` does not exist.
        StatsError: a damaged file.
    """
    if folder is not None and not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give one that `edge-moe patterns` wrote")
    place = files("edge_moe.profiles") / "tasks" if folder is None else folder
    entries = (entry for entry in place.iterdir() if entry.name.endswith(".json"))
    found = [
        TaskPattern.parse(entry.read_text(encoding="utf-8"), source=entry.name)
        for entry in sorted(entries, key=lambda entry: entry.name)
    ]
    return {each.name: each for each in found if each.model_fingerprint == model_fingerprint}
