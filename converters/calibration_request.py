"""What a calibration was asked for, and the settings of the run that comes of it. No torch.

The same for a Hugging Face checkpoint and for a GGUF file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import edge_moe
from edge_moe.errors import InputError
from edge_moe.formats import DROP, get_form, split_form
from edge_moe.formats.quantise import BEST_QUANTISER, get_quantiser
from edge_moe.plan import CalibrationOptions
from edge_moe.spec import ModelSpec
from edge_moe.stats import STATS_VERSION, StatsInfo
from edge_moe.tasks import task_argument, task_label, windows_fingerprint


class CalibrationArguments(TypedDict, total=False):
    """The keyword arguments of `calibrate`, for functions that hand them on."""

    window_tokens: int
    max_windows: int | None
    shard: tuple[int, int]
    forms: Sequence[str] | None
    quantiser: str | None


@dataclass(frozen=True)
class Fingerprints:
    """What must be the same in the shards of one run."""

    model: str
    tokenizer: str


@dataclass(frozen=True)
class CalibrationRequest:
    """The arguments of a calibration."""

    tasks: tuple[str, ...]
    window_tokens: int
    max_windows: int | None
    shard: tuple[int, int]
    forms: tuple[str, ...]
    """As `checked_forms` gives them."""
    quantiser: str | None
    """None is the best that the shard allows."""

    def check(self, spec: ModelSpec) -> None:
        """Refuse what is wrong whatever the text.

        Raises:
            InputError: names the option.
        """
        _check_options(spec, self.window_tokens, self.shard)
        _quantiser(self.quantiser, self.shard, self.forms)

    def run_over(
        self, windows: Sequence[list[int]], spec: ModelSpec, fingerprints: Fingerprints
    ) -> tuple[StatsInfo, list[list[int]]]:
        """The settings of the run over the shard of `windows`, the whole text; its own windows.

        Raises:
            InputError: the shard is empty.
        """
        quantiser = _quantiser(self.quantiser, self.shard, self.forms)
        covered = _shard_windows(len(windows), self.shard)
        texts = [windows[index] for index in covered]
        info = StatsInfo(
            version=STATS_VERSION,
            edge_moe_version=edge_moe.__version__,
            model_type=spec.model_type,
            model_fingerprint=fingerprints.model,
            tokenizer_fingerprint=fingerprints.tokenizer,
            data_fingerprint=windows_fingerprint(windows),
            tasks=tuple(task_label(task) for task in self.tasks),
            window_tokens=self.window_tokens,
            num_windows=len(windows),
            windows=covered,
            num_tokens=sum(map(len, texts)),
            moe_layer_ids=spec.moe_layer_ids,
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            quantiser=quantiser,
            forms=self.forms,
            options=CalibrationOptions(
                tasks=tuple(task_argument(task) for task in self.tasks),
                window_tokens=self.window_tokens,
                max_windows=self.max_windows,
                forms=self.forms,
                shards=(self.shard,),
                quantiser=quantiser,
            ),
        )
        return info, texts


def _check_options(spec: ModelSpec, window_tokens: int, shard: tuple[int, int]) -> None:
    if window_tokens > spec.max_position_embeddings:
        raise InputError(
            f"--window-tokens is {window_tokens}, more than the model's context of "
            f"{spec.max_position_embeddings}: use a smaller window"
        )
    index, count = shard
    if not 0 <= index < count:
        raise InputError(
            f"shard {index}/{count} does not exist: use 0/{count} to {count - 1}/{count}"
        )


def _quantiser(name: str | None, shard: tuple[int, int], forms: Sequence[str]) -> str:
    """The quantiser to measure `forms` with.

    Raises:
        InputError: unknown, one that does not pack all of `forms`, or one that needs the whole text
            with a shard of it.
    """
    if name is None:
        return BEST_QUANTISER if shard[1] == 1 else "nearest"
    quantiser = get_quantiser(name)
    if quantiser.needs and shard[1] > 1:
        raise InputError(
            f"quantiser {name!r} needs the whole text at once, not shard {shard[0]}/{shard[1]}: "
            "leave out --shard, or use --quantiser nearest"
        )
    others = [form for form in forms if not quantiser.packs(form)]
    if others:
        known = quantiser.forms or ()
        raise InputError(
            f"quantiser {name!r} packs {', '.join(known)}, not {', '.join(others)}: measure only "
            f"those, --forms {known[0]}, or use another quantiser"
        )
    return name


def _shard_windows(num_windows: int, shard: tuple[int, int]) -> tuple[int, ...]:
    index, count = shard
    covered = tuple(range(index, num_windows, count))
    if not covered:
        raise InputError(f"shard {index}/{count} is empty: the text has only {num_windows} windows")
    return covered


def checked_forms(spec: ModelSpec, forms: Sequence[str] | None) -> tuple[str, ...]:
    """`drop` first, then the packed forms; each must fit the expert's shapes.

    Raises:
        FormError: an unknown form, or one that does not fit.
        InputError: one that stores gate_proj and up_proj differently.
    """
    if forms is None:
        from edge_moe.candidates import candidate_forms

        forms = candidate_forms(spec, "native")
    packed = tuple(dict.fromkeys(form for form in forms if form != DROP))
    for name in packed:
        gate, up, down = split_form(name)
        if gate != up:
            raise InputError(
                f"form {name!r}: gate and up are measured in one form only: name it twice"
            )
        get_form(up).row_bytes(spec.expert_hidden)
        get_form(down).row_bytes(spec.expert_width)
    return (DROP, *packed)
