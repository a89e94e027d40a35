"""config.json as transformers reads it, or one error that says what is wrong there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edge_moe.config_reader import CONFIG_NAME
from edge_moe.errors import SpecError


def load_config(folder: Path) -> Any:
    """The language model's values, with those that transformers gives to missing keys.

    Raises:
        SpecError: transformers refuses it, or could not compute with it.
    """
    from transformers import AutoConfig

    path = folder / CONFIG_NAME
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    except Exception as error:  # its validation's errors share no base but Exception
        raise refused(path, error) from None
    _check_rope(config, path)
    return config


def refused(path: Path, error: Exception) -> SpecError:
    """What transformers says of the file `path`."""
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    reason = " ".join(lines[: 1 + lines[0].endswith(":")])
    return SpecError(
        f"{path}: transformers refuses it: {reason}: correct the file or download it again"
    )


def _check_rope(config: Any, path: Path) -> None:
    """What transformers only warns of, and then fails at in the middle of a model.

    Raises:
        SpecError: an unknown kind of scaling, or text in the place of a number.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for parameters in _rope_parameters(config):
        known = ("default", *ROPE_INIT_FUNCTIONS)
        kind = parameters.get("rope_type", "default")
        if kind not in known:
            raise SpecError(
                f"{path}: rope_type is {kind!r}, transformers knows {', '.join(known)}: correct "
                "the file or download it again"
            )
        for key, value in parameters.items():
            if isinstance(value, str) and key not in ("rope_type", "type"):
                raise SpecError(
                    f"{path}: {key} of rope_parameters is {value!r}, expected a number: correct "
                    "the file or download it again"
                )


def _rope_parameters(config: Any) -> Iterator[Mapping[str, Any]]:
    """One for all layers, or one for each type of them."""
    found = getattr(config, "rope_parameters", None) or {}
    inner = [value for value in found.values() if isinstance(value, dict)]
    yield from inner or [found]
