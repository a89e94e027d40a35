"""A folder that `build --target onnx` wrote: its names, its checksums, how to tell it from others.

`checksums.json` has the size and the CRC-32 of every graph and every file of weights; files that
people edit (genai_config.json, the card) are not in it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_moe.errors import InputError
from edge_moe.files import write_text
from edge_moe.json_files import first_problem, read_json

MODEL_NAME = "model.onnx"
HEAD_NAME = "model_head.onnx"
"""Logits of every position from `model.onnx`'s hidden states: to score a text, not to go on."""
STANDARD_NAME = "model_standard.onnx"
"""The same decoder in standard operations, where it was asked for."""
CHECKSUMS_NAME = "checksums.json"
_LISTED_SUFFIXES = (".onnx", ".data")
"""Of graphs and weights: `CHECKSUMS_NAME` has an entry for each."""
_CHUNK_BYTES = 2**20


class FileRecord(BaseModel):
    """What one file must be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_bytes: int = Field(ge=0)
    crc32: int = Field(ge=0, lt=2**32)
    """zlib.crc32 of the file."""


class Checksums(BaseModel):
    """`checksums.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = 1
    files: dict[str, FileRecord]
    """By name, within the folder."""


def write_checksums(folder: Path, names: Sequence[str]) -> None:
    """Read the files `names` of `folder`, and write down what they are."""
    files = {
        name: FileRecord(num_bytes=(folder / name).stat().st_size, crc32=_crc32(folder / name))
        for name in names
    }
    content = Checksums(files=files).model_dump_json(indent=1)
    write_text(folder / CHECKSUMS_NAME, content + "\n")


def require_whole(folder: Path) -> None:
    """Compare every file of weights, and every graph, with `checksums.json`; reads them all.

    Raises:
        InputError: one is missing, truncated, changed or not listed.
    """
    files = _read_checksums(folder).files
    for name, record in files.items():
        path = folder / name
        num_bytes = path.stat().st_size if path.is_file() else None
        if num_bytes != record.num_bytes:
            found = "missing" if num_bytes is None else f"truncated: {num_bytes} bytes"
            raise InputError(
                f"{path} is {found}, {record.num_bytes} bytes are expected; build the folder "
                "again, or copy it again"
            )
    for name, record in files.items():
        if _crc32(folder / name) != record.crc32:
            raise InputError(
                f"{folder / name} is damaged: its CRC-32 is not the one in {CHECKSUMS_NAME}; build "
                "the folder again, or copy it again"
            )


def _read_checksums(folder: Path) -> Checksums:
    path = folder / CHECKSUMS_NAME
    raw = read_json(
        path,
        InputError,
        missing=f"{path} is missing (removed, or the folder was built by an older edge-moe): "
        f"build {folder} again",
        damaged=f"build {folder} again",
    )
    try:
        found = Checksums.model_validate(raw)
    except ValidationError as error:
        raise InputError(
            f"{path} is damaged ({first_problem(error)}): build {folder} again"
        ) from None
    outside = [name for name in found.files if not _is_plain(name)]
    if outside:
        raise InputError(f"{path} points outside the folder: {outside[0]!r}: build {folder} again")
    present = (each.name for each in folder.iterdir() if each.suffix in _LISTED_SUFFIXES)
    unlisted = sorted({MODEL_NAME, *present} - found.files.keys())
    if unlisted:
        raise InputError(
            f"{path} does not list {unlisted[0]}, so nothing tells whether it is whole: build "
            f"{folder} again, or move what does not belong to it elsewhere"
        )
    return found


def _is_plain(name: str) -> bool:
    """Whether it names something in the folder itself."""
    return Path(name).name == name and name not in ("", "..")


def _crc32(path: Path) -> int:
    found = 0
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            found = zlib.crc32(chunk, found)
    return found


@dataclass(frozen=True)
class OnnxOptions:
    """What `build` may be told about an ONNX graph."""

    is_exact: bool = False
    """4-bit experts multiply with float32 activations. Otherwise these are rounded to 8 bits too,
    as llama.cpp does: on a CPU two to six times faster, and 2 to 3 % off in random models. Experts
    that are branches of the graph (`edge_moe.onnx_branches`) do so at every width."""
    with_standard: bool = False
    """Write `STANDARD_NAME` as well."""


def is_onnx_folder(folder: Path) -> bool:
    """Whether `folder` holds a decoder for onnxruntime, or what is left of one."""
    return any((folder / name).is_file() for name in (MODEL_NAME, CHECKSUMS_NAME))
