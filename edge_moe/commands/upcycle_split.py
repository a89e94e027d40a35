"""`edge-moe upcycle --split`: experts are parts of the dense feed-forward layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_moe.commands.options import DeviceName, resumable, stderr
from edge_moe.errors import InputError

if TYPE_CHECKING:
    from edge_moe.converters.upcycle.split_record import SplitRecord


@dataclass(frozen=True)
class SplitOptions:
    """What `upcycle --split` takes; None where nothing was said."""

    experts: int
    top_k: int
    expert_width: int | None
    steps: int | None
    batch: int
    seq: int
    max_windows: int | None
    learning_rate: float | None
    routers_only: bool
    seed: int
    tied: bool
    device: DeviceName | None


def split_command(
    path: Path, data: Sequence[str], output: Path, options: SplitOptions, name: str
) -> None:
    """Split the dense model in `path`, called `name`, and say what came of it.

    Raises:
        InputError: no text to calibrate on, or what `split_dense` refuses.
    """
    if not data:
        raise InputError("--split needs text to see which neurons fire together: give --data")
    from edge_moe.converters.upcycle.split import split_dense
    from edge_moe.converters.upcycle.split_record import SplitSettings
    from edge_moe.converters.upcycle.split_student import DistilSettings
    from edge_moe.converters.window_training import checked_settings
    from edge_moe.runtime.session_setup import find_device

    given = {"steps": options.steps, "learning_rate": options.learning_rate}
    distil = checked_settings(
        DistilSettings,
        batch_windows=options.batch,
        trains="routers" if options.routers_only else "all",
        seed=options.seed,
        **{name: value for name, value in given.items() if value is not None},
    )
    with resumable():
        record = split_dense(
            path,
            data,
            output,
            num_experts=options.experts,
            top_k=options.top_k,
            expert_width=options.expert_width,
            settings=SplitSettings(seed=options.seed),
            distil=distil,
            window_tokens=options.seq,
            max_windows=options.max_windows,
            keep_tied=options.tied,
            name=name,
            device=find_device(options.device),
        )
    _print_record(record, output)


def _print_record(record: SplitRecord, output: Path) -> None:
    console = stderr()
    active = record.shared_width + record.top_k * record.expert_width
    whole = record.shared_width + record.num_experts * record.expert_width
    console.print(
        f"{record.shared_width} neurons always on, {record.num_experts} experts of "
        f"{record.expert_width}: a token uses {active / whole:.0%} of a feed-forward layer; "
        f"routers find {record.recall:.0%} of the experts that matter most "
        f"(chance {record.top_k / record.num_experts:.0%})"
    )
    first, kept = record.row(0), record.row(record.kept_step)
    if first and kept:
        console.print(
            f"divergence from the dense model on windows held out from training: "
            f"{first.heldout_divergence:.4f} -> {kept.heldout_divergence:.4f} nats per token, "
            f"kept step {kept.step}"
        )
    console.print(
        f"next: edge-moe fit-pre-gate {output} --help, edge-moe calibrate {output} --help"
    )
