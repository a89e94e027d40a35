"""The commands that lead from a model to an artefact and its measurements, ready to paste.

They work in any one folder: inputs are named by their whole path, and what one command writes the
next one reads. Numbers that a time limit decides (see `SearchRecord.is_complete`) may differ.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from edge_moe.demo import task_names
from edge_moe.formats import DROP
from edge_moe.formats.quantise import get_quantiser
from edge_moe.measurement import Provenance
from edge_moe.plan import CalibrationOptions, Plan, Target
from edge_moe.tasks import is_plain_text, task_label

STATS = "stats"
PLAN = "plan.json"
MODEL = "MODEL"
"""Stands for a checkpoint that has no hub id, where a command is for others."""
DEMO_MODEL_NAME = "edge-moe-demo-model"
RAW_HINT = (
    "--raw continues the text as it is; without it the model's chat template, if any, is filled in"
)


def command_line(verb: str, *arguments: object) -> str:
    """`edge-moe verb arguments`, quoted for a shell."""
    return shlex.join(["edge-moe", verb, *map(str, arguments)])


def prompt_options(plan: Plan) -> list[str]:
    """A prompt for `edge-moe run`; with --raw where the model was shrunken for plain text."""
    tasks = plan.calibration.tasks if plan.calibration else plan.tasks
    return ["--prompt", "...", *(["--raw"] if all(map(is_plain_text, tasks)) else [])]


def build_commands(plan: Plan, output: str | Path, target: Target) -> list[str]:
    """Calibrate, plan and build; `target` is what was really built."""
    return [
        *_calibrate_commands(plan),
        _plan_command(plan),
        command_line("build", PLAN, "-o", output, "--target", target, *stats_options(plan, STATS)),
    ]


def stats_options(plan: Plan, folder: str) -> list[str]:
    """What `edge-moe build` has to be told where it packs a GGUF's experts by their columns."""
    pairs = zip(plan.stored_forms, plan.forms, strict=False)
    is_packed = any(set(row) - {DROP, stored} for stored, row in pairs)
    needed = is_packed and bool(get_quantiser(plan.quantiser).needs)
    return ["--stats", folder] if needed else []


def without_folders(plan: Plan) -> Plan:
    """The same plan for others to read: no path of this machine, only the names of files."""
    changes: dict[str, object] = {"model": public_model(model_name(plan.model))}
    if plan.calibration is not None:
        tasks = tuple(task_label(task) for task in plan.calibration.tasks)
        changes["calibration"] = plan.calibration.model_copy(update={"tasks": tasks})
    if plan.search is not None:
        searched = [task_label(task) for task in plan.search.tasks]
        changes["search"] = plan.search.model_copy(update={"tasks": searched})
    return plan.model_copy(update=changes)


def replay(provenance: Provenance, *, model: str, folder: Path) -> str:
    """A recorded command about `model`, for the artefact where it lies now: `folder`.

    Paths after `--against` and `--task` are made whole, where the command was run.
    """
    words = shlex.split(provenance.command)
    there = Path(provenance.folder)
    for index, word in enumerate(words):
        before = words[index - 1] if index else ""
        option, equals, value = word.partition("=")
        if before in ("--against", "--task"):
            words[index] = _whole(word, there)
        elif equals and option in ("--against", "--task"):
            words[index] = f"{option}={_whole(value, there)}"
        elif not before.startswith("--") and Path(word) == Path(model):
            words[index] = str(folder)
    return shlex.join(words)


def model_name(model: str) -> str:
    """What to call a MODEL: its hub id, the id in a hub cache's path, or the folder's name."""
    path = Path(model)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not path.exists():
        return model
    for part in path.parts:  # .../models--OWNER--NAME/snapshots/REVISION
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    if _is_demo_model(path):
        return DEMO_MODEL_NAME
    return path.name or model


def public_model(name: str) -> str:
    """What a command for others says for the model called `name`: its hub id, or `MODEL`."""
    return name if "/" in name else MODEL


def model_remark(name: str) -> str:
    """The line of a card that says what `MODEL` is; empty where commands name a hub id."""
    return f"\n{MODEL} is the checkpoint, {name}.\n" if public_model(name) == MODEL else ""


def _is_demo_model(path: Path) -> bool:
    """The shipped model, of this installation or of another."""
    return path.parts[-4:] == ("edge_moe", "demo", "assets", "model")


def _calibrate_commands(plan: Plan) -> list[str]:
    tasks = _options("--task", plan.tasks)
    asked = plan.calibration
    if asked is None:
        return [command_line("calibrate", plan.model, *tasks, "-o", STATS)]
    if len(asked.shards) == 1:
        return [_calibrate_command(plan, asked, asked.shards[0], STATS)]
    parts = [f"{STATS}-{index}" for index in range(len(asked.shards))]
    return [
        *(
            _calibrate_command(plan, asked, shard, part)
            for shard, part in zip(asked.shards, parts, strict=True)
        ),
        command_line("stats", "merge", STATS, *parts),
    ]


def _calibrate_command(
    plan: Plan, asked: CalibrationOptions, shard: tuple[int, int], output: str
) -> str:
    limit = () if asked.max_windows is None else ("--max-windows", asked.max_windows)
    part = () if shard == (0, 1) else ("--shard", f"{shard[0]}/{shard[1]}")
    return command_line(
        "calibrate",
        plan.model,
        *_options("--task", asked.tasks),
        "--window-tokens",
        asked.window_tokens,
        *limit,
        *part,
        "--forms",
        ",".join(asked.forms),
        "--quantiser",
        asked.quantiser,
        *(("--gradients",) if plan.gradient_fingerprint else ()),
        "-o",
        output,
    )


def _plan_command(plan: Plan) -> str:
    return command_line(
        "plan",
        plan.model,
        "--stats",
        STATS,
        "--budget",
        f"{plan.budget_bytes}B",
        "--ctx",
        plan.context_tokens,
        "--target",
        plan.target,
        "--device",
        plan.device,
        *_search_options(plan),
        "-o",
        PLAN,
    )


def _search_options(plan: Plan) -> Sequence[object]:
    """The text that plans were measured on is named where it is not the calibration's."""
    if plan.search is None:
        return ("--no-search",)
    known = list(plan.calibration.tasks if plan.calibration else plan.tasks)
    tasks = _options("--task", plan.search.tasks) if plan.search.tasks != known else ()
    limit = plan.search.limit_seconds
    return (*tasks, *(() if limit is None else ("--search-seconds", f"{limit:g}")))


def _options(name: str, values: Iterable[str]) -> list[str]:
    return [word for value in values for word in (name, value)]


def _whole(path: str, folder: Path) -> str:
    is_path = path not in task_names() and (folder / path).exists()
    return str(folder / path) if is_path else path
