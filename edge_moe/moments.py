"""Second moments of what experts are given: how much each column of their weights matters.

One file per MoE layer, so that neither calibration nor building holds more than one. The sums are
exact (see `edge_moe.exact_sum`), so shards merge bit for bit. E experts, H hidden_size, I
expert_width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edge_moe.errors import StatsError
from edge_moe.exact_sum import ExactSum
from edge_moe.files import atomic_path
from edge_moe.spec import ModelSpec

FOLDER_NAME = "moments"
"""Inside a statistics folder."""


@dataclass(eq=False)
class LayerMoments:
    """Sums over the tokens that each expert of one layer was chosen for."""

    input_squares: ExactSum
    """[E, H] sum of x_j**2, x what gate_proj and up_proj multiply."""
    inner_squares: ExactSum
    """[E, I] sum of h_j**2, h what down_proj multiplies."""

    @classmethod
    def zeros(cls, num_experts: int, hidden_size: int, expert_width: int) -> LayerMoments:
        return cls(
            ExactSum.zeros((num_experts, hidden_size)), ExactSum.zeros((num_experts, expert_width))
        )

    @classmethod
    def zeros_of(cls, spec: ModelSpec) -> LayerMoments:
        return cls.zeros(spec.num_experts, spec.expert_hidden, spec.expert_width)

    def merge(self, other: LayerMoments) -> None:
        """Add the sums of another shard."""
        self.input_squares.merge(other.input_squares)
        self.inner_squares.merge(other.inner_squares)

    def of_expert(self, expert_id: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """([H], [I]) sums of squares of one expert."""
        return self.input_squares.values(expert_id), self.inner_squares.values(expert_id)

    def save(self, path: Path) -> None:
        """Write atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {
            "input_squares": self.input_squares.limbs(),
            "inner_squares": self.inner_squares.limbs(),
        }
        with atomic_path(path) as temporary:
            save_file(arrays, temporary)

    @classmethod
    def load(cls, path: Path) -> LayerMoments:
        """Read what `save` wrote.

        Raises:
            StatsError: missing, or not two arrays of limbs for the same number of experts.
        """
        try:
            arrays = load_file(path)
        except (OSError, SafetensorError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise StatsError(f"{path} is not readable ({reason}): calibrate again") from None
        empty = np.zeros(0, np.int64)
        inputs, inner = (arrays.get(name, empty) for name in ("input_squares", "inner_squares"))
        for array in (inputs, inner):
            if array.dtype != np.int64 or array.ndim != 3 or array.shape[2] != 2:
                raise StatsError(f"{path} is damaged: it holds no second moments; calibrate again")
        return cls(ExactSum.from_limbs(inputs), ExactSum.from_limbs(inner))


def moments_path(stats_folder: Path, layer_id: int) -> Path:
    """Where the moments of decoder layer `layer_id` lie in a statistics folder."""
    return stats_folder / FOLDER_NAME / f"layer_{layer_id:04}.safetensors"


def load_moments(stats_folder: Path, layer_id: int, spec: ModelSpec) -> LayerMoments:
    """The moments of one layer.

    Raises:
        StatsError: missing, damaged, or of another shape than `spec` says.
    """
    path = moments_path(stats_folder, layer_id)
    found = LayerMoments.load(path)
    wanted = (spec.num_experts, spec.expert_hidden), (spec.num_experts, spec.expert_width)
    shapes = found.input_squares.shape, found.inner_squares.shape
    if shapes != wanted:
        raise StatsError(f"{path} has shapes {shapes}, the model needs {wanted}: calibrate it")
    return found


def merge_moments(inputs: list[Path], output: Path, layer_ids: tuple[int, ...]) -> None:
    """Add the moments of several statistics folders into `output`, one layer at a time.

    Raises:
        StatsError: a folder lacks a layer, or shapes differ.
    """
    for layer_id in layer_ids:
        merged = LayerMoments.load(moments_path(inputs[0], layer_id))
        for folder in inputs[1:]:
            other = LayerMoments.load(moments_path(folder, layer_id))
            if other.input_squares.shape != merged.input_squares.shape:
                raise StatsError(f"cannot merge: {folder} was measured on another model")
            merged.merge(other)
        merged.save(moments_path(output, layer_id))
