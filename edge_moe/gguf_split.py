"""A model split over several GGUF files, as llama.cpp's gguf-split writes it.

Every part is a GGUF file of its own, `NAME-00001-of-00003.gguf`, with the keys `split.no` (from 0),
`split.count` and `split.tensors.count` (of all parts together). Only the first holds the metadata
(`llama_split_path` and `llama_model_loader` in llama.cpp).
"""

from __future__ import annotations

import re
from pathlib import Path

from edge_moe.errors import CheckpointError
from edge_moe.gguf_header import GgufHeader, read_gguf_header

SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_MAX_PARTS = 99_999
"""What five digits can number."""


def read_parts(path: Path) -> tuple[GgufHeader, ...]:
    """Headers of the model that `path` is, or is the first part of, in order.

    Only files beside `path` are opened, under the names that its own name implies.

    Raises:
        CheckpointError: not the first part, a part that is missing or belongs to another model, or
            parts that together hold other tensors than they should.
    """
    first = read_gguf_header(path)
    count = _integer(first, "split.count", 1)
    if count == 1:
        return (first,)
    names = part_names(path, count)
    number = _integer(first, "split.no", 0)
    if number != 0:
        raise CheckpointError(
            f"{path} is part {number + 1} of {count}: give the first part, "
            f"{path.with_name(names[0])}"
        )
    parts = [first]
    for index, name in enumerate(names[1:], start=1):
        stated = first.metadata.get("split.tensors.count")
        parts.append(_read_part(path.with_name(name), index, count, stated))
    _check_tensors(first, parts)
    return tuple(parts)


def is_gguf_name(path: Path) -> bool:
    """Whether a name ends as those of GGUF files do, in capitals or not."""
    return path.suffix.lower() == ".gguf"


def is_later_part(path: Path) -> bool:
    """Whether a file's name says that it is a part of a split model, and not the first."""
    match = _NAME.fullmatch(path.name)
    return match is not None and int(match.group(2)) != 1


def part_names(path: Path, count: int) -> list[str]:
    """File names of all `count` parts of the model that `path` is a part of.

    Raises:
        CheckpointError: the name of `path` does not say which part it is, or says otherwise.
    """
    match = _NAME.fullmatch(path.name)
    if match is None or not 1 <= count <= _MAX_PARTS:
        raise CheckpointError(
            f"{path} is one of {count} parts of a model, which must be called "
            "NAME-00001-of-00003.gguf and so on: give them their original names"
        )
    if int(match.group(3)) != count:
        raise CheckpointError(
            f"{path}: its name says {int(match.group(3))} parts, its key split.count says {count}: "
            "give the parts their original names, or download them again"
        )
    return [f"{match.group(1)}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def _read_part(path: Path, index: int, count: int, num_tensors: object) -> GgufHeader:
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist: part {index + 1} of {count} is missing; download it too"
        )
    part = read_gguf_header(path)
    found = _integer(part, "split.no", None), _integer(part, "split.count", None)
    if found != (index, count):
        raise CheckpointError(
            f"{path} is part {index + 1} of {count} by its name, but says split.no={found[0]} "
            f"(from 0) and split.count={found[1]}: download it again"
        )
    stated = part.metadata.get("split.tensors.count", num_tensors)
    if stated != num_tensors:
        raise CheckpointError(
            f"{path} has split.tensors.count={stated}, the first part says {num_tensors}: it "
            "belongs to another model; download all parts again"
        )
    return part


def _check_tensors(first: GgufHeader, parts: list[GgufHeader]) -> None:
    homes: dict[str, Path] = {}
    for part in parts:
        for info in part.tensors:
            if info.name in homes:
                raise CheckpointError(
                    f"{part.path}: the tensor {info.name!r} is in {homes[info.name].name} too: "
                    "a part belongs to another model; download all parts again"
                )
            homes[info.name] = part.path
    stated = _integer(first, "split.tensors.count", len(homes))
    if stated != len(homes):
        raise CheckpointError(
            f"{first.path}: split.tensors.count is {stated}, but its {len(parts)} parts hold "
            f"{len(homes)} tensors: a part belongs to another model; download all parts again"
        )


def _integer(header: GgufHeader, key: str, default: int | None) -> int:
    value = header.metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CheckpointError(
            f"{header.path}: the key {key} is {value!r}, expected a count: download it again"
        )
    return value
