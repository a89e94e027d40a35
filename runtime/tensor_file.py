"""Arrays and a header from a safetensors file that anybody may have written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edge_moe.errors import InputError
from edge_moe.files import atomic_path


def read_tensor_file(
    path: Path, key: str, *, kind: str, again: str
) -> tuple[str | None, dict[str, npt.NDArray[Any]]]:
    """(the metadata under `key`, every array); numpy knows no bfloat16 and no 8-bit floats.

    `kind` says what `path` should be, `again` how to get another.

    Raises:
        InputError: missing, damaged, or arrays that numpy has no type for.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(key)
            return text, {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{kind} {path} is not readable ({error}): {again}") from None


def write_tensor_file(
    path: Path, arrays: Mapping[str, npt.NDArray[Any]], key: str, info: BaseModel
) -> None:
    """Write contiguous arrays and their header atomically."""
    with atomic_path(path) as temporary:
        save_file(dict(arrays), temporary, metadata={key: info.model_dump_json()})
