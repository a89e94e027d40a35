"""Whether two checkpoints are of one architecture: then one is the other and a delta."""

from __future__ import annotations

import dataclasses
from typing import Any

from edge_moe.checkpoint import Checkpoint
from edge_moe.config_reader import CONFIG_NAME, read_config, text_config
from edge_moe.errors import DeltaError

_ROTARY_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
"""Values that change what a model computes without changing a tensor, and that no spec holds."""
_OF_STORAGE = {"dtype", "has_module_names"}
"""Fields that say how tensors are stored."""


def check_pair(base: Checkpoint, tuned: Checkpoint) -> None:
    """Refuse models whose tensors or settings differ in more than values.

    Raises:
        DeltaError: names what differs first.
    """
    _check_settings(base, tuned)
    first, second = _dense_shapes(base), _dense_shapes(tuned)
    for name in sorted(first.keys() | second.keys()):
        if first.get(name) == second.get(name):
            continue
        one, other = (_shape(shapes.get(name)) for shapes in (first, second))
        raise DeltaError(
            f"{tuned.folder}: {name!r} is {other}, in {base.folder} it is {one}: a delta needs a "
            "model that was fine-tuned from this very base (merge adapters into it first)"
        )


def _check_settings(base: Checkpoint, tuned: Checkpoint) -> None:
    for field in dataclasses.fields(base.spec):
        if field.name not in _OF_STORAGE:
            first, second = getattr(base.spec, field.name), getattr(tuned.spec, field.name)
            _require_equal(field.name, first, second, base, tuned)
    ours, theirs = (text_config(read_config(each.folder / CONFIG_NAME)) for each in (base, tuned))
    for key in _ROTARY_KEYS:
        _require_equal(key, ours.get(key), theirs.get(key), base, tuned)


def _require_equal(name: str, first: Any, second: Any, base: Checkpoint, tuned: Checkpoint) -> None:
    if first != second:
        raise DeltaError(
            f"{tuned.folder} has {name} {second}, {base.folder} {first}: a delta carries weights, "
            "not settings; give two models of one architecture and config.json"
        )


def _dense_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {info.name: info.shape for info in checkpoint.dense_tensors}


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {list(shape)}"
