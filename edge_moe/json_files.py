"""JSON files that may be missing, damaged or of another version: one wording of what is wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from edge_moe.errors import EdgeMoeError, InputError
from edge_moe.files import os_problem

M = TypeVar("M", bound=BaseModel)


def read_json(path: Path, kind: type[EdgeMoeError], *, missing: str, damaged: str) -> Any:
    """The JSON in file `path`; whatever goes wrong is one `kind`.

    `missing` is the whole message where there is no such file; `damaged` says what to do with a
    file that is not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise kind(missing) from None
    except OSError as error:
        raise kind(f"{path} cannot be read: {os_problem(error)}") from None
    except UnicodeDecodeError as error:
        raise kind(f"{path} is not readable JSON ({error}): {damaged}") from None
    return parse_json(text, str(path), kind, damaged)


def parse_json(text: str, what: str, kind: type[EdgeMoeError], damaged: str) -> Any:
    """The JSON that `text` is; `what` names it in the `kind` that is raised otherwise."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, or nested too deeply
        raise kind(f"{what} is not readable JSON ({error}): {damaged}") from None


def checked(
    raw: Any,
    model: type[M],
    what: str,
    *,
    versions: Sequence[int],
    again: str,
    kind: type[EdgeMoeError] = InputError,
) -> M:
    """`raw` JSON as a `model` of one of `versions`; otherwise a `kind` is raised.

    `what` names the file in messages, `again` says how to get another.
    """
    found = raw.get("version") if isinstance(raw, dict) else None
    if type(found) is not int or found not in versions:  # True and 1.0 equal 1
        read = " and ".join(map(str, versions))
        raise kind(f"{what} has version {found}, this edge-moe reads {read}: {again}")
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise kind(f"{what} is damaged: {first_problem(error)}: {again}") from None


def first_problem(error: ValidationError) -> str:
    """`terms.0.num_bytes: Input should be greater than 0`"""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    problem = first["msg"].removeprefix("Value error, ")
    return f"{where}: {problem}" if where else problem


def parse_info(
    path: Path,
    text: str,
    info_type: type[M],
    versions: Sequence[int],
    *,
    kind: str,
    again: str,
    error: type[EdgeMoeError] = InputError,
) -> M:
    """The header that `text` of file `path` is in JSON; whatever is wrong with it is an `error`.

    `kind` says what the file should be, `again` how to get another.
    """
    what = f"the header of {kind} {path}"
    raw = parse_json(text, what, error, again)
    return checked(raw, info_type, what, versions=versions, again=again, kind=error)
