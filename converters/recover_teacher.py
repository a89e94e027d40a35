"""What the original model predicts, kept on disk: the likeliest tokens and what is left for others.

One file per window, so that a killed run goes on with the next one. Per token: K ids (int32) and K
log-probabilities (float16), K = 64, and the logarithm of the remaining mass. The divergence over
these K + 1 outcomes is a lower bound of the one over the whole vocabulary, since outcomes are only
put together (data-processing inequality).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from edge_moe.errors import CheckpointError, InputError
from edge_moe.files import atomic_path

NUM_CANDIDATES = 64
_NO_MASS = -1e4  # logarithm of "nothing left", finite in float16


class Predictor(Protocol):
    """A model that reads a window."""

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """[W, V]"""


@dataclass(frozen=True)
class TeacherWindow:
    """The original's prediction after each of W tokens."""

    token_ids: Tensor
    """[W, K] int64, likeliest first."""
    log_probs: Tensor
    """[W, K + 1] float32, normalised; the last one is the rest."""

    def to(self, device: torch.device) -> TeacherWindow:
        """The same on `device`."""
        return TeacherWindow(self.token_ids.to(device), self.log_probs.to(device))


class TeacherCache:
    """A folder of predictions, one file per window."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()

    def missing(self, indices: Iterable[int]) -> list[int]:
        """Those of `indices` that are not there yet."""
        return [index for index in indices if not self._path(index).exists()]

    def fill(
        self,
        original: Predictor,
        windows: Sequence[Sequence[int]],
        advance: Callable[[], None] = lambda: None,
        indices: Iterable[int] | None = None,
    ) -> None:
        """Let the original read every window that is missing, or those of `indices` alone.

        Raises:
            CheckpointError: logits that are not finite.
        """
        for index in self.missing(range(len(windows)) if indices is None else indices):
            logits = original.logits(windows[index])
            if not np.isfinite(logits).all():
                raise CheckpointError(
                    "the original model computes logits that are not finite: it is damaged"
                )
            with atomic_path(self._path(index)) as temporary:
                save_file(compress(logits), temporary)
            advance()

    def read(self, index: int) -> TeacherWindow:
        """The prediction for window `index`.

        Raises:
            InputError: the file is damaged.
        """
        path = self._path(index)
        try:
            arrays = load_file(path)
            ids, log_probs = arrays["token_ids"], arrays["log_probs"]
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"{path} is damaged ({error}): remove it and start again") from None
        return TeacherWindow(
            torch.from_numpy(ids.astype(np.int64)),
            F.log_softmax(torch.from_numpy(log_probs.astype(np.float32)), dim=1),
        )

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:06}.safetensors"


def cache_bytes(num_tokens: int) -> int:
    """Disk bytes of the predictions for `num_tokens` tokens, headers not counted."""
    return num_tokens * (4 * NUM_CANDIDATES + 2 * (NUM_CANDIDATES + 1))


def compress(logits: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[np.generic]]:
    """[W, V] -> `token_ids` int32 [W, K], `log_probs` float16 [W, K + 1]."""
    values = torch.from_numpy(logits)
    num_kept = min(NUM_CANDIDATES, values.shape[1])
    log_probs = F.log_softmax(values, dim=1)
    top, ids = torch.topk(log_probs, num_kept, dim=1)
    rest = _log_rest(log_probs, ids)
    return {
        "token_ids": ids.numpy().astype(np.int32),
        "log_probs": torch.cat([top, rest], dim=1).clamp(min=_NO_MASS).half().numpy(),
    }


def divergence(logits: Tensor, teacher: TeacherWindow) -> Tensor:
    """Mean KL(teacher || student) in nats per token over the K + 1 outcomes; logits [W, V]."""
    log_probs = F.log_softmax(logits.float(), dim=1)
    kept = log_probs.gather(1, teacher.token_ids)
    found = torch.cat([kept, _log_rest(log_probs, teacher.token_ids)], dim=1)
    found = found.clamp(min=_NO_MASS)
    wanted = teacher.log_probs
    return (wanted.exp() * (wanted - found)).sum(dim=1).mean()


def _log_rest(log_probs: Tensor, token_ids: Tensor) -> Tensor:
    """[W, 1] logarithm of the mass outside `token_ids`; `_NO_MASS` where they are all there are."""
    if token_ids.shape[1] == log_probs.shape[1]:
        return log_probs.new_full((len(log_probs), 1), _NO_MASS)
    return log_probs.scatter(1, token_ids, -torch.inf).logsumexp(dim=1, keepdim=True)
