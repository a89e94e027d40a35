"""A GGUF file's numbers under its architecture's keys, checked before they are used."""

from __future__ import annotations

from edge_moe.errors import SpecError
from edge_moe.gguf_header import GgufArray, GgufHeader


class GgufKeys:
    """Positive integers under an architecture's keys, with errors that name the key."""

    def __init__(self, header: GgufHeader) -> None:
        self._header = header

    def fail(self, key: str, value: object, wanted: str) -> SpecError:
        name = f"{self._header.architecture}.{key}"
        return SpecError(
            f"{self._header.path}: the key {name} is {value!r}, expected {wanted}: "
            "download or export the file again"
        )

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """One integer, or an array that repeats it for every layer."""
        values = self._counts(key, default, least)
        if len(set(values)) > 1:
            raise self.fail(key, list(values)[:8], "one number for all layers")
        return values[0]

    def largest(self, key: str, default: int | None = None) -> int:
        """The largest of an array that may hold 0 for layers without attention."""
        value = max(self._counts(key, default, 0))
        if value < 1:
            raise self.fail(key, value, "an integer of at least 1")
        return value

    def per_layer(self, key: str, num_layers: int, default: int) -> tuple[int, ...]:
        """One integer per layer; one number stands for all of them."""
        values = self._counts(key, default, 0)
        if len(values) == 1:
            return values * num_layers
        if len(values) < num_layers:
            raise self.fail(key, list(values)[:8], f"a number for each of {num_layers} layers")
        return values[:num_layers]

    def flagged_layers(self, key: str, num_layers: int) -> set[int] | None:
        """Layers that an array of booleans is true for; None where the key is no array."""
        if not isinstance(
            self._header.metadata.get(f"{self._header.architecture}.{key}"), GgufArray
        ):
            return None
        values = self._header.numbers(key) or ()
        if len(values) < num_layers:
            raise self.fail(key, list(values)[:8], f"a boolean for each of {num_layers} layers")
        return {layer for layer, value in enumerate(values[:num_layers]) if value}

    def number(self, key: str) -> float | None:
        values = self._header.numbers(key)
        return None if values is None else float(values[0])

    def _counts(self, key: str, default: int | None, least: int) -> tuple[int, ...]:
        values = self._header.numbers(key)
        if values is None:
            if default is None:
                raise self.fail(key, None, f"an integer of at least {least}")
            return (default,)
        for value in values:
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise self.fail(key, value, f"an integer of at least {least}")
        return tuple(int(value) for value in values)
