"""A transform's request, checked before any work: model, method, settings, shape and text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import edge_moe
from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.calibrate import calibration_text
from edge_moe.converters.transforms import Method
from edge_moe.converters.transforms.base import Value
from edge_moe.converters.transforms.heapr import check_width
from edge_moe.converters.transforms.selection import check_num_experts
from edge_moe.errors import InputError
from edge_moe.formats import DROP
from edge_moe.packed_tensors import PackedInfo
from edge_moe.stats import StatsInfo

PLAIN_QUANTISER = "nearest"
"""Nothing is packed here, so no quantiser needs to be prepared."""


@dataclass(frozen=True)
class TextLimits:
    """Which part of the calibration text is used."""

    window_tokens: int = 512
    max_windows: int | None = None
    sample_tokens: int | None = None
    """Most tokens that layers are run on, in evenly spread windows; None: as the method says."""


@dataclass(frozen=True)
class Request:
    """What is made of what, by which method."""

    checkpoint: Checkpoint
    name: str
    """The source as the user wrote it."""
    method: Method
    settings: dict[str, Value]
    num_experts: int
    expert_width: int
    tasks: tuple[str, ...]
    info: StatsInfo
    """The whole calibration text, in the words of a calibration."""
    windows: list[list[int]]
    sampled: tuple[int, ...]
    """Windows that the layers are run on; none where the method needs no samples."""
    limits: TextLimits

    @property
    def texts(self) -> list[list[int]]:
        """The sampled windows."""
        return [self.windows[index] for index in self.sampled]

    @property
    def sample_tokens(self) -> int:
        return sum(map(len, self.texts))

    def fingerprint(self, stats: str | None) -> str:
        """sha256 over everything that decides the result; a killed run resumes only its equal.

        `stats` is the fingerprint of the statistics that scores are taken from, if they exist.
        """
        described = {
            "edge_moe": edge_moe.__version__,
            "model": self.checkpoint.fingerprint,
            "method": self.method.name,
            "settings": self.settings,
            "shape": [self.num_experts, self.expert_width],
            "text": self.info.data_fingerprint,
            "windows": [self.limits.window_tokens, list(self.sampled)],
            "stats": stats,
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def sample_info(self) -> StatsInfo:
        """The pass over the sampled windows, in the words of a calibration."""
        changes = {"windows": self.sampled, "num_tokens": self.sample_tokens}
        return self.info.model_copy(update=changes)


def check_request(
    model: Path,
    name: str,
    method: Method,
    settings: Mapping[str, Value],
    tasks: Sequence[str],
    limits: TextLimits,
    num_experts: int | None,
    expert_width: int | None,
) -> Request:
    """Everything that can be refused without reading a weight.

    Raises:
        EdgeMoeError: bad model, setting, shape, task or window.
    """
    checkpoint = Checkpoint(model)
    checkpoint.spec.require_plain_blocks(f"method {name}")
    if any(isinstance(info, PackedInfo) for info in checkpoint.tensors.values()):
        raise InputError(
            f"{model} is stored in 8 or 4 bits, which method {name} would have to write again: "
            "give it the original bf16 checkpoint, or use `edge-moe plan` and `edge-moe build`"
        )
    values = method.parse(settings)
    num_experts, expert_width = _shape(checkpoint, method, num_experts, expert_width)
    info, windows = calibration_text(
        checkpoint,
        tasks,
        limits.window_tokens,
        limits.max_windows,
        (0, 1),
        (DROP,),
        PLAIN_QUANTISER,
    )
    wanted = method.sample_tokens if limits.sample_tokens is None else limits.sample_tokens
    sampled = _spread(windows, wanted) if method.needs_samples else ()
    return Request(
        checkpoint=checkpoint,
        name=name,
        method=method,
        settings=values,
        num_experts=num_experts,
        expert_width=expert_width,
        tasks=tuple(tasks),
        info=info,
        windows=windows,
        sampled=sampled,
        limits=limits,
    )


def _shape(
    checkpoint: Checkpoint, method: Method, num_experts: int | None, width: int | None
) -> tuple[int, int]:
    """(experts, width) of the result."""
    spec = checkpoint.spec
    if method.shrinks == "experts":
        if num_experts is None or width is not None:
            raise InputError(f"method {method.name} lowers the number of experts: give --experts N")
        check_num_experts(spec, num_experts)
        return num_experts, spec.expert_width
    if width is None or num_experts is not None:
        raise InputError(f"method {method.name} narrows experts: give --width N")
    check_width(spec, width)
    return spec.num_experts, width


def _spread(windows: Sequence[Sequence[int]], max_tokens: int) -> tuple[int, ...]:
    """Evenly spread windows of at most `max_tokens` together, but one at least."""
    if max_tokens < 1:
        raise InputError(f"sample_tokens is {max_tokens}: use at least 1")
    count = min(len(windows), max(1, max_tokens // max(map(len, windows))))
    return tuple(index * len(windows) // count for index in range(count))
