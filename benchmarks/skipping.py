"""What does skipping light experts save while decoding, and what does it cost in KL divergence?

    python benchmarks/skipping.py [--task code] [--windows 8] [--steps 160]

Per rule: mean KL divergence from the same model without skipping on held-out text (as prompts of
256 tokens, where ODP protects tokens), and what decoding held-out text token by token computes and
pages: a trace recorded under the rule, replayed with slots for half and for a quarter of the
experts. `none` is the bound: nothing saved, nothing lost. Medians are calibrated on the task's
calibration text. Writes benchmarks/results/skipping-<task>.json.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from edge_moe.converters.calibrate_skipping import calibrate_skipping
from edge_moe.demo import demo_model_dir, task_names
from edge_moe.files import write_text
from edge_moe.measurement import Provenance
from edge_moe.metrics import Estimate, compare
from edge_moe.runtime.allotment import (
    Slots,
    allot,
    dense_parameters,
    open_source,
    open_store,
    record_sizes,
)
from edge_moe.runtime.evaluate import progress, score_windows
from edge_moe.runtime.heldout import heldout_windows
from edge_moe.runtime.policies import DEFAULT_POLICY
from edge_moe.runtime.replay import Room
from edge_moe.runtime.session import Session
from edge_moe.runtime.simulate import simulate
from edge_moe.runtime.skipping import SkipRule, parse_skip
from edge_moe.runtime.torch_decoder import Decoder
from edge_moe.skip_calibration import SkipCalibration
from edge_moe.units import format_bytes

RESULTS = Path(__file__).resolve().parent / "results"
RULES = ("none", "top-p=0.95", "top-p=0.9", "naee", "odp", "top-p=0.8", "top-p=0.6", "top-p=0.01")
SLOT_SHARES = (0.5, 0.25)
WINDOW_TOKENS = 256


class RuleCost(BaseModel):
    """One rule."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rule: str
    mean_kld: Estimate
    same_top_p: Estimate
    prompt_experts_per_token: float
    """Computed per token of the scored prompts, over all layers."""
    decode_experts_per_token: float
    decode_parameters: float
    """Weights used per decoded token: the dense part and the experts that are computed."""
    decode_expert_bytes: float
    """Packed bytes of the experts computed per decoded token."""
    page_in_bytes: dict[str, float]
    """Per decoded token, by the share of experts that have a slot."""


class SkippingCosts(BaseModel):
    """benchmarks/results/skipping-<task>.json"""

    model_config = ConfigDict(extra="forbid", frozen=True)

    provenance: Provenance
    task: str
    num_windows: int
    decoded_tokens: int
    calibration: SkipCalibration
    rules: list[RuleCost]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", default="code", help=f"one of {', '.join(task_names())}")
    parser.add_argument("--windows", type=int, default=8, help="scored windows of 256 tokens")
    parser.add_argument("--steps", type=int, default=160, help="tokens decoded per rule")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    arguments = parser.parse_args()
    model = demo_model_dir()
    with TemporaryDirectory(prefix="edge-moe-") as work:
        medians = calibrate_skipping(model, [arguments.task], Path(work) / "skip.json")
    with Session.open(model, kernels="exact") as base:
        windows = heldout_windows(arguments.task, base.tokenizer, WINDOW_TOKENS, arguments.windows)
        with progress("rules", len(RULES)) as advance:
            rules = []
            for name in RULES:
                rule = None if name == "none" else parse_skip(name, medians)
                rules.append(measure(base, model, rule, windows, arguments.steps))
                advance()
    found = SkippingCosts(
        provenance=Provenance.published(),
        task=arguments.task,
        num_windows=len(windows),
        decoded_tokens=arguments.steps,
        calibration=medians,
        rules=rules,
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"skipping-{arguments.task}.json"
    write_text(path, found.model_dump_json(indent=1) + "\n")
    show(found, Console(width=140))


def measure(
    base: Session, model: Path, rule: SkipRule | None, windows: list[list[int]], num_steps: int
) -> RuleCost:
    """Score one rule against `base`, then decode under it and replay the trace."""
    source = open_source(model)
    with closing(open_store(source)) as store:
        sizes = record_sizes(store)
    with Session.open(model, skip=rule, kernels="exact") as session:
        scores = compare(score_windows({"it": session}, base, windows)["it"])
        prompts = session.statistics().routed
        prompt_tokens = sum(map(len, windows))
        text = [token for window in windows for token in window][:num_steps]
        with session.tracing() as recorder:
            decoder = Decoder(session.model, session.device, session.context_tokens)
            for token in text:
                decoder.step([token])
        trace = recorder.finish(session.trace_info())
    replays = {
        share: simulate(trace, sizes, Room.of_slots(slots.counts), DEFAULT_POLICY, rule)
        for share in SLOT_SHARES
        for slots in [_slots(model, sizes, share)]
    }
    decoding = next(iter(replays.values())).cost(
        dense_parameters=dense_parameters(source), expert_parameters=source.spec.expert_weights
    )
    return RuleCost(
        rule=rule.name if rule else "none",
        mean_kld=scores.mean_kld,
        same_top_p=scores.same_top_p,
        prompt_experts_per_token=(prompts.routed_experts - prompts.skipped_experts) / prompt_tokens,
        decode_experts_per_token=decoding.active_per_token,
        decode_parameters=decoding.active_parameters,
        decode_expert_bytes=decoding.active_bytes_per_token,
        page_in_bytes={
            f"{share:g}": each.page_in_bytes_per_token for share, each in replays.items()
        },
    )


def _slots(model: Path, sizes: list[list[int]], share: float) -> Slots:
    count = round(share * sum(map(len, sizes)))
    return allot(open_source(model).spec, sizes, [], None, count)


def show(found: SkippingCosts, console: Console) -> None:
    """One row per rule."""
    full = found.rules[0]
    table = Table(
        title=f"{found.task}: {found.num_windows} windows scored, {found.decoded_tokens} tokens "
        "decoded one by one",
        title_justify="left",
    )
    table.add_column("rule")
    headings = ("KL, nats per token", "same top token", "experts in prompts", "experts decoding")
    paged = [f"paged per token, {share:.0%} slots" for share in SLOT_SHARES]
    for heading in (*headings, "active parameters", "expert bytes", *paged):
        table.add_column(heading, justify="right")
    for each in found.rules:
        saved = 1 - each.decode_expert_bytes / full.decode_expert_bytes
        table.add_row(
            each.rule,
            f"{each.mean_kld}",
            f"{100 * each.same_top_p.value:.1f} %",
            f"{each.prompt_experts_per_token:.2f}",
            f"{each.decode_experts_per_token:.2f}",
            f"{each.decode_parameters / 1e6:.2f} M",
            f"{format_bytes(each.decode_expert_bytes)} (-{saved:.0%})",
            *(format_bytes(count) for count in each.page_in_bytes.values()),
        )
    console.print(table)
    machine = found.provenance.machine
    console.print(f"{machine.cpu}, {machine.cores} cores")


if __name__ == "__main__":
    main()
