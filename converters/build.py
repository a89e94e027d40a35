"""`build`: a plan and its model in, an artefact folder out. Streaming, atomic, resumable."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

from edge_moe import __version__
from edge_moe.budget import resident_expert_bytes
from edge_moe.candidates import check_target
from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.calibration_memory import state_and_require_memory
from edge_moe.converters.export_hf import check_hf, export_hf
from edge_moe.converters.export_native import export_native
from edge_moe.converters.model_card import SizeRow, model_card, plan_fingerprint
from edge_moe.converters.packer import Packer, PlainPacker
from edge_moe.converters.sidecar import CARD_NAME
from edge_moe.converters.staging import BuildFolder, build_folder
from edge_moe.errors import InputError, PlanError, TargetError
from edge_moe.files import require_new_output, write_text
from edge_moe.formats.quantise import get_quantiser
from edge_moe.gguf_model import GgufModel
from edge_moe.onnx_folder import OnnxOptions
from edge_moe.open_model import open_model
from edge_moe.package import PLAN_NAME
from edge_moe.plan import Plan, Target
from edge_moe.rebill import rebill
from edge_moe.shadow import with_shadow
from edge_moe.source_model import SourceModel
from edge_moe.spec import ModelSpec
from edge_moe.units import format_bytes

GGUF_NAME = "model.gguf"


def build(
    plan: Plan,
    output: Path,
    *,
    model: Path | None = None,
    target: Target | None = None,
    stats: Path | None = None,
    onnx: OnnxOptions | None = None,
    shadow: str | None = None,
) -> Path:
    """Build what `plan` says into the new folder `output`, which is returned.

    The source is `model`, or else `plan.model` (a folder, a .gguf file or a hub id); `target`
    overrides the plan's. `stats` are the plan's statistics, whose moments weigh columns where the
    types of a .gguf file change; `onnx` holds options of that target; `shadow` is the form of the
    shadows that a native package gets, instead of what the plan says. A build that was killed
    resumes when the same call is made again, with the same bytes as a result. `output` appears when
    it is complete, never before.

    Raises:
        PlanError: the plan was made from another checkpoint.
        TargetError: the target cannot express the plan, or has no place for shadows.
        FormError: a form that does not fit the model's rows.
        BudgetError: the plan was made for another target, and does not fit its budget in this one.
        InputError: `output` exists already, or options of another target were given.
        DiskSpaceError: too little free space.
        CheckpointError: weights that are missing, damaged, NaN or infinite.
    """
    target = target or plan.target
    if onnx is not None and target != "onnx":
        raise InputError(f"target {target} has no ONNX options: leave them out")
    require_new_output(output)
    source = open_model(model or _resolve(plan.model))
    check_target(source.spec, target)
    if stats is not None and not isinstance(source, GgufModel):
        raise InputError(
            f"--stats is for a .gguf model, whose types change; {source.location} is packed by the "
            "calibration that the plan names: leave it out"
        )
    _check_plan(plan, source)
    plan = _with_shadow(plan, source, target, shadow)
    if target == "hf":
        check_hf(plan, source.spec)
    plan = rebill(plan, source, target)
    with build_folder(output, _build_fingerprint(plan, target, onnx)) as work:
        if isinstance(source, GgufModel):
            _slice(plan, source, work, stats)
        elif target == "native":
            export_native(plan, source, work, _packer(plan, source))
        elif target == "hf":
            export_hf(plan, source, work)
        elif target == "onnx":
            from edge_moe.converters.onnx.export import export_onnx

            export_onnx(plan, source, work, _packer(plan, source), onnx or OnnxOptions())
        else:
            _build_gguf(plan, source, work)
    return output


def _resolve(model: str) -> Path:
    from edge_moe.hub import resolve_model

    return resolve_model(model)


def _check_plan(plan: Plan, source: SourceModel) -> None:
    """Refuse a plan for another model, or one that was edited out of shape."""
    spec = source.spec
    if plan.model_fingerprint != source.fingerprint:
        raise PlanError(
            f"the plan was made from {plan.model} (fingerprint {plan.model_fingerprint[:12]}), "
            f"but {source.location} has the fingerprint {source.fingerprint[:12]}: "
            "give the model it was made from, or plan again"
        )
    if tuple(plan.moe_layer_ids) != spec.moe_layer_ids:
        raise PlanError(
            f"the plan lists the MoE layers {plan.moe_layer_ids}, {source.location} has "
            f"{list(spec.moe_layer_ids)}: plan again"
        )
    if len(plan.forms[0]) != spec.num_experts or plan.top_k != spec.top_k:
        raise PlanError(
            f"the plan is for top-{plan.top_k} of {len(plan.forms[0])} experts, "
            f"{source.location} has top-{spec.top_k} of {spec.num_experts}: plan again"
        )
    _check_bill(plan, spec)


def _with_shadow(plan: Plan, source: SourceModel, target: Target, shadow: str | None) -> Plan:
    """`plan` with the shadows that are asked for here, or else in itself."""
    asked = shadow or plan.shadow
    if not asked:
        return plan
    if target != "native" or isinstance(source, GgufModel):
        remedy = "leave out --shadow" if shadow else "plan again without --shadow"
        raise TargetError(
            f"target {target} has no place for shadows ({asked}), which only a native package of a "
            f"Hugging Face checkpoint holds: {remedy}, or build with --target native"
        )
    return with_shadow(plan, asked, source.spec)


def _check_bill(plan: Plan, spec: ModelSpec) -> None:
    """Refuse a bill that the plan's own forms and budget contradict."""
    counts = Counter(form for row in plan.forms for form in row)
    target = plan.bill_target
    needed = sum(
        count * resident_expert_bytes(spec, form, target) for form, count in counts.items()
    )
    stated = plan.term("experts").num_bytes
    if needed != stated:
        raise PlanError(
            f"the plan's experts take {needed} bytes in their forms, its bill says {stated}: "
            "the plan was edited; plan again"
        )
    if plan.total_bytes > plan.budget_bytes:
        raise PlanError(
            f"the plan takes {format_bytes(plan.total_bytes)}, more than its own budget of "
            f"{format_bytes(plan.budget_bytes)}: plan again"
        )


def _packer(plan: Plan, checkpoint: Checkpoint) -> Packer:
    """What packs the plan's experts; only one that runs the text again needs torch."""
    if not get_quantiser(plan.quantiser).needs:
        return PlainPacker(checkpoint, plan.quantiser)
    from edge_moe.converters.calibrate import text_packer
    from edge_moe.converters.calibrated_packing import CalibratedPacker

    packer = text_packer(checkpoint, plan.calibration, plan.data_fingerprint)
    if isinstance(packer, CalibratedPacker):
        subject = f"packing by {plan.quantiser}, which runs the calibration text again"
        state_and_require_memory(subject, packer.memory_terms())
    return packer


def _build_fingerprint(plan: Plan, target: Target, onnx: OnnxOptions | None) -> str:
    """Equal for builds of one output whose bytes are equal."""
    parts = (__version__, plan_fingerprint(plan), target, *([repr(onnx)] if onnx else []))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _slice(plan: Plan, source: GgufModel, work: BuildFolder, stats: Path | None) -> None:
    from edge_moe.converters.expert_squares import stored_squares
    from edge_moe.converters.slice_gguf import slice_gguf

    squares = None if stats is None else stored_squares(stats, plan, source.spec)
    path = slice_gguf(plan, source, work.path / GGUF_NAME, squares)
    _finish_gguf(plan, source, work, source.file_bytes, path)


def _build_gguf(plan: Plan, checkpoint: Checkpoint, work: BuildFolder) -> None:
    from edge_moe.converters.export_gguf import export_gguf

    packer = _packer(plan, checkpoint)
    path = export_gguf(plan, checkpoint, work.path / GGUF_NAME, packer)
    source_bytes = sum(info.num_bytes for info in checkpoint.tensors.values())
    _finish_gguf(plan, checkpoint, work, source_bytes, path)


def _finish_gguf(
    plan: Plan, source: Checkpoint | GgufModel, work: BuildFolder, source_bytes: int, path: Path
) -> None:
    """The model card and the plan beside the file `path`."""
    sizes = [SizeRow("whole model", source_bytes, path.stat().st_size)]
    write_text(work.path / CARD_NAME, model_card(plan, source, work.output.name, "gguf", sizes))
    plan.save(work.path / PLAN_NAME)
