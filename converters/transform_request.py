"""A transform's request, checked before any work: model, method, settings, shape and text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

import edge_moe
from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.transforms import Method
from edge_moe.converters.transforms.base import Value
from edge_moe.converters.transforms.heapr import check_width
from edge_moe.converters.transforms.selection import check_num_experts
from edge_moe.errors import InputError
from edge_moe.formats import DROP
from edge_moe.stats import STATS_VERSION, StatsInfo
from edge_moe.tasks import task_label, task_windows, tokenizer_fingerprint, windows_fingerprint


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

    @property
    def data_fingerprint(self) -> str:
        return windows_fingerprint(self.windows)

    @property
    def changes_shape(self) -> bool:
        spec = self.checkpoint.spec
        return (self.num_experts, self.expert_width) != (spec.num_experts, spec.expert_width)

    def fingerprint(self, stats: Path | None) -> str:
        """sha256 over everything that decides the result; a killed run resumes only its equal."""
        described = {
            "edge_moe": edge_moe.__version__,
            "model": self.checkpoint.fingerprint,
            "method": self.method.name,
            "settings": self.settings,
            "shape": [self.num_experts, self.expert_width],
            "text": self.data_fingerprint,
            "windows": [self.limits.window_tokens, list(self.sampled)],
            "stats": str(stats.absolute()) if stats else None,
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def sample_info(self) -> StatsInfo:
        """The pass over the sampled windows, in the words of a calibration."""
        spec, folder = self.checkpoint.spec, self.checkpoint.folder
        return StatsInfo(
            version=STATS_VERSION,
            edge_moe_version=edge_moe.__version__,
            model_type=spec.model_type,
            model_fingerprint=self.checkpoint.fingerprint,
            tokenizer_fingerprint=tokenizer_fingerprint(folder),
            data_fingerprint=self.data_fingerprint,
            tasks=tuple(task_label(task) for task in self.tasks),
            window_tokens=self.limits.window_tokens,
            num_windows=len(self.windows),
            windows=self.sampled,
            num_tokens=self.sample_tokens,
            moe_layer_ids=spec.moe_layer_ids,
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            forms=(DROP,),
        )


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
    spec = checkpoint.spec
    values = method.parse(settings)
    num_experts, expert_width = _shape(checkpoint, method, num_experts, expert_width)
    if limits.window_tokens > spec.max_position_embeddings:
        raise InputError(
            f"windows of {limits.window_tokens} tokens exceed the model's context of "
            f"{spec.max_position_embeddings}: use a smaller window"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{model} has no usable tokenizer ({reason}): add its files") from None
    windows = task_windows(
        tasks, "calibration", tokenizer, limits.window_tokens, limits.max_windows
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
