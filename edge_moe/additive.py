"""What the kinds of statistics share: exact sums that add up over shards, in one pair of files.

`STEM.json` holds the settings, `STEM.safetensors` integer arrays. L MoE layers, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edge_moe.errors import StatsError
from edge_moe.exact_sum import ExactSum
from edge_moe.files import atomic_path, write_text
from edge_moe.json_files import checked, read_json

if TYPE_CHECKING:
    from edge_moe.stats import StatsInfo

InfoT = TypeVar("InfoT", bound="StatsInfo")
Arrays = dict[str, npt.NDArray[np.generic]]


@dataclass(eq=False)
class AdditiveStats(ABC, Generic[InfoT]):
    """Sums over calibration tokens."""

    info: InfoT
    routed_tokens: npt.NDArray[np.int64]
    """[L, E] tokens that chose the expert."""

    STEM: ClassVar[str]
    INFO: ClassVar[Any]
    """`InfoT` itself."""
    VERSION: ClassVar[int]
    REMEDY: ClassVar[str]
    """How to make them where there are none."""

    @classmethod
    @abstractmethod
    def zeros(cls, info: InfoT) -> Self:
        """No tokens yet."""

    @abstractmethod
    def sums(self) -> dict[str, ExactSum]:
        """Every running sum, by the name it is stored under."""

    def to_arrays(self) -> Arrays:
        """Flat named arrays, as stored."""
        limbs = {name: total.limbs() for name, total in self.sums().items()}
        return {"routed_tokens": self.routed_tokens, **limbs}

    def _add(self, arrays: Arrays) -> None:
        """Add what `to_arrays` gives for other tokens."""
        self.routed_tokens += arrays["routed_tokens"].astype(np.int64)
        for name, total in self.sums().items():
            total.merge(ExactSum.from_limbs(arrays[name].astype(np.int64, copy=False)))

    @classmethod
    def from_arrays(cls, info: InfoT, arrays: Arrays) -> Self:
        """Inverse of `to_arrays`.

        Raises:
            StatsError: an array is missing or has another shape or dtype.
        """
        found = cls.zeros(info)
        for name, wanted in found.to_arrays().items():
            array = arrays.get(name)
            if array is None or array.shape != wanted.shape or array.dtype != wanted.dtype:
                raise StatsError(f"statistics are damaged: array {name!r} is missing or misshapen")
        found._add(arrays)
        return found

    def merge(self, other: Self) -> Self:
        """The statistics of both shards: bit for bit what one run over both gives.

        Raises:
            StatsError: another model, text or setting, or windows counted twice.
        """
        merged = self.zeros(self.info.merged(other.info))
        for part in (self, other):
            merged._add(part.to_arrays())
        return merged

    @classmethod
    def settings_path(cls, folder: Path) -> Path:
        """The file that is written last: where it is, the statistics are complete."""
        return folder / f"{cls.STEM}.json"

    def save(self, folder: Path) -> None:
        """Write both files atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / f"{self.STEM}.safetensors") as temporary:
            save_file(self.to_arrays(), temporary)
        write_text(self.settings_path(folder), self.info.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            StatsError: missing, incomplete, damaged, or written by another version.
        """
        path = cls.settings_path(folder)
        missing = f"{folder} holds no finished statistics (no {path.name}): {cls.REMEDY}"
        raw = read_json(path, StatsError, missing=missing, damaged="calibrate again")
        versions, again = (cls.VERSION,), "calibrate again"
        info = checked(raw, cls.INFO, str(path), versions=versions, again=again, kind=StatsError)
        try:
            arrays = load_file(path.with_suffix(".safetensors"))
        except (OSError, ValueError, SafetensorError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise StatsError(f"{folder} is damaged ({reason}): calibrate again") from None
        return cls.from_arrays(info, arrays)
