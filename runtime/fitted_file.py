"""What files that were fitted for a model have: a header that says for which, checked arrays.

`edge-moe fit-guesses` and `fit-pre-gate` write them; anybody may have written what is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from edge_moe.errors import InputError
from edge_moe.json_files import parse_info
from edge_moe.runtime.tensor_file import read_tensor_file, write_tensor_file


class FittedInfo(BaseModel):
    """The header."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int
    model_fingerprint: str
    """Of the checkpoint that the model is, or was built from."""
    hidden_size: int
    kept: tuple[tuple[int, ...], ...]
    """Per MoE layer the expert ids of the rows that were fitted."""
    tasks: tuple[str, ...]
    num_tokens: int


InfoT = TypeVar("InfoT", bound=FittedInfo)


@dataclass(frozen=True)
class FittedKind:
    """One kind of such files."""

    name: str
    """As in `linear map`."""
    key: str
    """Of the header, in the file's metadata."""
    command: str
    """What fits one."""
    version: int

    def read(self, path: Path, info_type: type[InfoT]) -> tuple[InfoT, dict[str, Any]]:
        """(header, arrays), the arrays not checked yet.

        Raises:
            InputError: missing, damaged, another kind of file, or another version.
        """
        text, arrays = read_tensor_file(path, self.key, kind=self.name, again="fit it again")
        if text is None:
            raise InputError(f"{path} is no {self.name}: fit one with `{self.command}`")
        info = parse_info(
            *(path, text, info_type, (self.version,)), kind=self.name, again="fit it again"
        )
        return info, arrays

    def write(
        self, path: Path, info: FittedInfo, arrays: Mapping[str, npt.NDArray[np.float32]]
    ) -> None:
        """Write what `read` reads, atomically."""
        contiguous = {name: np.ascontiguousarray(each, np.float32) for name, each in arrays.items()}
        write_tensor_file(path, contiguous, self.key, info)

    def check_arrays(
        self, path: Path, arrays: dict[str, Any], shapes: dict[str, tuple[int, ...]]
    ) -> None:
        """Raise InputError unless these are the arrays, float32 and finite."""
        if arrays.keys() != shapes.keys():
            raise InputError(
                f"{self.name} {path} is damaged: its layers are not complete; fit it again"
            )
        for name, shape in shapes.items():
            self._check_array(path, arrays[name], shape)

    def _check_array(
        self, path: Path, array: npt.NDArray[np.generic], shape: tuple[int, ...]
    ) -> None:
        if array.dtype != np.float32 or array.shape != shape:
            raise InputError(
                f"{self.name} {path} is damaged: {array.dtype} {list(array.shape)} instead of "
                f"float32 {list(shape)}; fit it again"
            )
        if not np.isfinite(array).all():
            raise InputError(f"{self.name} {path} is damaged: a value is no number; fit it again")

    def require_model(
        self, info: FittedInfo, fingerprint: str, hidden_size: int, num_layers: int
    ) -> None:
        """Raise InputError unless the file was fitted for this model."""
        if info.model_fingerprint != fingerprint:
            raise InputError(
                f"the {self.name} was fitted for another model ({info.model_fingerprint[:12]}, not "
                f"{fingerprint[:12]}): fit one for this model with `{self.command}`"
            )
        if (info.hidden_size, len(info.kept)) != (hidden_size, num_layers):
            raise InputError(
                f"the {self.name} is for {len(info.kept)} MoE layers of width {info.hidden_size}, "
                f"the model has {num_layers} of width {hidden_size}: fit it again"
            )

    def rows_of(self, info: FittedInfo, layer: int, kept: Sequence[int]) -> list[int]:
        """Rows of the experts `kept` in MoE layer `layer`.

        Raises:
            InputError: the file lacks one of them.
        """
        row_of = {expert: row for row, expert in enumerate(info.kept[layer])}
        missing = [expert for expert in kept if expert not in row_of]
        if missing:
            raise InputError(
                f"the {self.name} knows nothing of expert {missing[0]} in MoE layer {layer}: "
                "fit one with the whole model"
            )
        return [row_of[expert] for expert in kept]
