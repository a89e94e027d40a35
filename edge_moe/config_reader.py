"""Reading config.json: plain JSON, and integers under any of several keys. No guessing here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_moe.errors import SpecError
from edge_moe.json_files import read_json

CONFIG_NAME = "config.json"
TEXT_CONFIG = "text_config"
_OUTER_KEYS = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")


def read_config(path: Path) -> dict[str, Any]:
    """The values of `config.json`.

    Raises:
        SpecError: the file is missing, not readable or not a JSON object.
    """
    missing = (
        f"{path} does not exist: give a folder with config.json and safetensors, a package, a "
        ".gguf file, or a hub id such as Qwen/Qwen3-30B-A3B"
    )
    config = read_json(path, SpecError, missing=missing, damaged="download the file again")
    if not isinstance(config, dict):
        raise SpecError(f"{path} holds no JSON object: download the file again")
    return config


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The values of the language model: `text_config`, and what the outer config decides."""
    inner = config.get(TEXT_CONFIG)
    if not isinstance(inner, dict):
        return config
    outer = {key: config[key] for key in _OUTER_KEYS if key in config}
    return {**inner, **outer}


class ConfigReader:
    """Reads positive integers under any of several keys, with errors that name the key."""

    def __init__(self, config: dict[str, Any], source: str) -> None:
        self._config = config
        self.source = source

    def count(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """The integer under the first of `keys` that has a value.

        Raises:
            SpecError: no value and no default, or one that is no integer of at least `least`.
        """
        for key in keys:
            value = self._config.get(key)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise SpecError(
                    f"{self.source}: {key} is {value!r}, expected an integer of at least {least}: "
                    "correct the file or download it again"
                )
            return value
        if default is not None:
            return default
        names = f"the key {keys[0]}" if len(keys) == 1 else f"none of the keys {', '.join(keys)}"
        raise SpecError(
            f"{self.source}: {names} has {'no' if len(keys) == 1 else 'a'} value: "
            "add it or download the file again"
        )

    def items(self, key: str) -> list[Any] | None:
        """The list under `key`; None where there is none.

        Raises:
            SpecError: something else than a list.
        """
        value = self._config.get(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise SpecError(
                f"{self.source}: {key} is {value!r}, expected a list: "
                "correct the file or download it again"
            )
        return list(value)

    def sections(self, key: str) -> list[ConfigReader] | None:
        """One reader for each value of the object under `key`; None where there is none.

        Raises:
            SpecError: something else than an object of objects.
        """
        value = self._config.get(key)
        if value is None:
            return None
        if not isinstance(value, dict) or not all(isinstance(v, dict) for v in value.values()):
            raise SpecError(
                f"{self.source}: {key} is no object of objects: "
                "correct the file or download it again"
            )
        return [ConfigReader(part, f"{self.source}: {key}") for part in value.values()]

    def text(self, key: str) -> str | None:
        """The string under `key`; None where there is none."""
        value = self._config.get(key)
        return value if isinstance(value, str) else None

    def number(self, key: str) -> float:
        """The number under `key`, at least 0; 0 where there is none.

        Raises:
            SpecError: something else.
        """
        value = self._config.get(key)
        if value is None:
            return 0.0
        if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
            raise SpecError(
                f"{self.source}: {key} is {value!r}, expected a number of at least 0: "
                "correct the file or download it again"
            )
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """Whether the value under `key` is true; `default` where there is none.

        Raises:
            SpecError: something else than true or false.
        """
        value = self._config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise SpecError(
                f"{self.source}: {key} is {value!r}, expected true or false: "
                "correct the file or download it again"
            )
        return value
