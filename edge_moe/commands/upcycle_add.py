"""`edge-moe upcycle` without `--split`: routed experts beside the dense feed-forward layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_moe.commands.opening import runnable_path
from edge_moe.commands.options import DeviceName, resumable, stderr
from edge_moe.units import format_bytes

if TYPE_CHECKING:
    from edge_moe.converters.upcycle.record import UpcycleRecord
    from edge_moe.converters.upcycle.student import UpcycleSettings


@dataclass(frozen=True)
class AddOptions:
    """What `upcycle` takes where experts are added."""

    experts: int
    top_k: int
    ternary: bool
    group: int
    steps: int
    batch: int
    seq: int
    max_windows: int | None
    learning_rate: float
    kl_weight: float
    lm_weight: float
    balance_weight: float
    has_int8_activations: bool
    trains_shared: bool
    is_checkpointing: bool
    seed: int
    tied: bool
    device: DeviceName | None


def add_command(
    dense: str, revision: str | None, data: Sequence[str], output: Path, options: AddOptions
) -> None:
    """Add experts to the model that DENSE names, and say what came of it.

    Raises:
        InputError: a setting out of range, or what `upcycle` refuses.
    """
    from edge_moe.converters.upcycle.upcycle import upcycle
    from edge_moe.runtime.session_setup import find_device

    settings = _settings(options)
    with resumable():
        record = upcycle(
            runnable_path(dense, revision),
            data,
            output,
            num_experts=options.experts,
            top_k=options.top_k,
            settings=settings,
            window_tokens=options.seq,
            max_windows=options.max_windows,
            keep_tied=options.tied,
            name=dense,
            device=find_device(options.device),
        )
    _print_record(record, data, output)


def _settings(options: AddOptions) -> UpcycleSettings:
    """How experts are trained.

    Raises:
        InputError: names the first option that is out of range.
    """
    from edge_moe.converters.upcycle.student import UpcycleSettings
    from edge_moe.converters.window_training import checked_settings

    return checked_settings(
        UpcycleSettings,
        steps=options.steps,
        batch_windows=options.batch,
        learning_rate=options.learning_rate,
        kl_weight=options.kl_weight,
        lm_weight=options.lm_weight,
        balance_weight=options.balance_weight,
        is_ternary=options.ternary,
        group=options.group,
        has_int8_activations=options.has_int8_activations,
        trains_shared=options.trains_shared,
        is_checkpointing=options.is_checkpointing,
        seed=options.seed,
    )


def _print_record(record: UpcycleRecord, data: Sequence[str], output: Path) -> None:
    from edge_moe.candidates import TARGET_RULES
    from edge_moe.reproduce import command_line

    console = stderr()
    first, kept = record.row(0), record.row(record.kept_step)
    if first and kept:
        console.print(
            f"next-token loss on windows held out from training: {first.heldout_lm_loss:.4f} "
            f"(dense) -> {kept.heldout_lm_loss:.4f} nats per token, kept step {kept.step}"
        )
    if first and not record.kept_step:
        console.print("nothing was gained: the experts add nothing to the dense model")
    for form, num_bytes in record.packed_bytes.items():
        console.print(
            f"routed experts: {format_bytes(record.routed_bytes)} here, "
            f"{format_bytes(num_bytes)} packed as {form} without loss"
        )
    tasks = [word for each in data or ["TASK"] for word in ("--task", each)]
    native = TARGET_RULES["native"].packed_forms
    held = [form for form in record.packed_bytes if form in native] or [*record.packed_bytes]
    exact = [word for form in held[:1] for word in ("--forms", form)]
    console.print(f"next: {command_line('calibrate', output, *tasks, *exact, '-o', 'stats')}")
    if held and held[0] not in native:
        console.print(f"      and plan with --target onnx: only that holds {held[0]}")
