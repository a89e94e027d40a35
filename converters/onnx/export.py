"""Write a plan as a folder for onnxruntime, continuing where a killed build stopped.

    model.onnx                      the graph: 5 to 10 kB a layer, and 2 to 3 kB for every expert
                                    that is a branch: 10 MB for 30 layers of 128
    model_head.onnx                 logits of every position of its hidden states, for scoring
    model-dense.data                everything but routed experts, in float32
    experts-00001.data, ...         one file per MoE layer
    model_standard.onnx             on request: the same bytes through standard operations
    checksums.json                  of all these files
    genai_config.json, plan.json, config.json, tokenizer files, README.md

Peak memory: `packing.packing_peak_bytes`, one expert per core in float32 and packed, or a 2 MiB
chunk of a dense tensor in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edge_moe.candidates import check_target
from edge_moe.checkpoint import Checkpoint
from edge_moe.config_reader import CONFIG_NAME, read_config, text_config
from edge_moe.converters.model_card import model_card, size_rows
from edge_moe.converters.onnx.data_files import DenseFile, ExpertFile
from edge_moe.converters.onnx.decoder import Decoder
from edge_moe.converters.onnx.genai import GENAI_CONFIG_NAME, genai_config
from edge_moe.converters.onnx.graph import import_onnx, serialised
from edge_moe.converters.onnx.routing import Routing, fewest_open_experts
from edge_moe.converters.packer import Packer, PlainPacker
from edge_moe.converters.progress import byte_progress
from edge_moe.converters.sidecar import CARD_NAME, copy_sidecar, sidecar_bytes
from edge_moe.converters.staging import BuildFolder
from edge_moe.errors import TargetError
from edge_moe.files import atomic_path, require_free_disk, write_text
from edge_moe.formats import EXACT, form_fits, get_form
from edge_moe.formats.integers import integer_form
from edge_moe.onnx_branches import row_problem
from edge_moe.onnx_folder import (
    HEAD_NAME,
    MODEL_NAME,
    STANDARD_NAME,
    OnnxOptions,
    write_checksums,
)
from edge_moe.package import PLAN_NAME
from edge_moe.plan import Plan
from edge_moe.runtime.model_config import load_config
from edge_moe.spec import ModelSpec

DENSE_NAME = "model-dense.data"
DEFAULT_OPTIONS = OnnxOptions()
_SMALL_FILES_BYTES = 2**20  # plan, model card, genai_config.json


def export_onnx(
    plan: Plan,
    checkpoint: Checkpoint,
    work: BuildFolder,
    packer: Packer | None = None,
    options: OnnxOptions = DEFAULT_OPTIONS,
) -> None:
    """Write the folder into `work`.

    Raises:
        TargetError: the graph cannot express the architecture or the plan, or exceeds protobuf's
            limit; nothing is written then.
        MissingExtraError: the package `onnx` is not installed.
        DiskSpaceError: too little space, before anything is written.
        CheckpointError: weights that are damaged, NaN or infinite.
        SpecError: transformers refuses config.json.
    """
    import_onnx()
    spec, name = checkpoint.spec, work.output.name
    check_onnx(plan, spec)
    rows = dict(zip(plan.moe_layer_ids, plan.forms, strict=True))
    experts = _expert_files(rows, spec)
    dense = DenseFile(DENSE_NAME)
    decoder = _decoder(rows, checkpoint, dense, experts, options.is_exact)
    graphs = {MODEL_NAME: decoder.graph(is_standard=False), HEAD_NAME: decoder.head_graph()}
    if options.with_standard:
        graphs[STANDARD_NAME] = decoder.graph(is_standard=True)
    protobufs = {key: serialised(graph.model(), key) for key, graph in graphs.items()}
    total_bytes = dense.num_bytes + sum(file.num_bytes for file in experts.values())
    small_bytes = sidecar_bytes(checkpoint.folder) + _SMALL_FILES_BYTES
    needed_bytes = total_bytes + small_bytes + sum(map(len, protobufs.values()))
    require_free_disk(work.output.parent, needed_bytes - work.written_bytes(), f"output {name}")
    copy_sidecar(checkpoint.folder, work.path)
    packer = packer or PlainPacker(checkpoint)
    with byte_progress(f"build {name}", total_bytes) as advance:
        dense.write(work, advance)
        for file in experts.values():
            file.write(checkpoint, packer, work, advance)
    for graph_name, data in protobufs.items():
        with atomic_path(work.path / graph_name) as temporary:
            temporary.write_bytes(data)
    write_checksums(work.path, [dense.name, *(file.name for file in experts.values()), *protobufs])
    plain = read_config(checkpoint.folder / CONFIG_NAME)
    plain |= text_config(plain)
    text = genai_config(checkpoint, decoder.states, plain, MODEL_NAME, plan.context_tokens)
    write_text(work.path / GENAI_CONFIG_NAME, text)
    sizes = size_rows(checkpoint, dense.num_bytes, total_bytes - dense.num_bytes)
    write_text(work.path / CARD_NAME, model_card(plan, checkpoint, name, "onnx", sizes))
    plan.save(work.path / PLAN_NAME)


def check_onnx_source(checkpoint: Checkpoint) -> None:
    """Refuse a model that no plan makes an ONNX decoder of: its graph is built, and no file.

    Raises:
        TargetError: names what the graph cannot express.
        SpecError: transformers refuses config.json.
    """
    spec = checkpoint.spec
    check_target(spec, "onnx")
    rows = {layer_id: [EXACT] * spec.num_experts for layer_id in spec.moe_layer_ids}
    experts, dense = _expert_files(rows, spec), DenseFile(DENSE_NAME)
    _decoder(rows, checkpoint, dense, experts, is_exact=True).graph(is_standard=False)


def _decoder(
    rows: Mapping[int, Sequence[str]],
    checkpoint: Checkpoint,
    dense: DenseFile,
    experts: dict[int, ExpertFile],
    is_exact: bool,
) -> Decoder:
    kept = {layer_id: Plan.kept(row) for layer_id, row in rows.items()}
    config = load_config(checkpoint.folder)
    return Decoder(kept, checkpoint, config, dense, experts, is_exact)


def check_onnx(plan: Plan, spec: ModelSpec) -> None:
    """Refuse a plan whose forms onnxruntime does not compute with.

    Raises:
        TargetError: names the first layer and form.
    """
    check_target(spec, "onnx")
    for layer_id, row in zip(plan.moe_layer_ids, plan.forms, strict=True):
        _check_groups(layer_id, plan.kept(row), spec)
        for expert_id in plan.kept(row):
            form = row[expert_id]
            if form != EXACT and integer_form(form) is None:
                raise TargetError(
                    f"target onnx: layer {layer_id} is planned with {form}, which onnxruntime has "
                    "no kernel for: plan again with --target onnx"
                )
            if not form_fits(form, *spec.expert_shape):
                raise TargetError(
                    f"target onnx: layer {layer_id} is planned as {form}, whose blocks of "
                    f"{get_form(form).block_size} do not divide {spec.expert_hidden} and "
                    f"{spec.expert_width}: plan again"
                )
            problem = row_problem(spec, form)
            if problem is not None:
                raise TargetError(
                    f"target onnx: layer {layer_id} is planned as {form}, but {problem}: plan "
                    "again, or use --target native"
                )


def _check_groups(layer_id: int, kept: list[int], spec: ModelSpec) -> None:
    """transformers' routers fall back on experts of closed groups, in no order that is stated."""
    routing = Routing(spec.router, spec.top_k, spec.num_experts, tuple(kept))
    fewest = fewest_open_experts(routing)
    if fewest < spec.top_k:
        raise TargetError(
            f"target onnx: layer {layer_id} keeps so few experts in some of the router's "
            f"{spec.router.num_groups} groups that {spec.router.top_groups} groups may hold "
            f"{fewest}, fewer than top_k={spec.top_k}: keep more experts there, or plan again"
        )


def _expert_files(forms: Mapping[int, Sequence[str]], spec: ModelSpec) -> dict[int, ExpertFile]:
    """By layer id, one stack for each form that the layer uses, narrowest first."""
    files: dict[int, ExpertFile] = {}
    for index, (layer_id, row) in enumerate(forms.items(), start=1):
        file = ExpertFile(f"experts-{index:05d}.data", layer_id=layer_id)
        rows = {expert_id: number for number, expert_id in enumerate(Plan.kept(row))}
        widths = spec.expert_hidden, spec.expert_width
        for form in sorted({row[expert_id] for expert_id in rows}):
            pairs = [pair for pair in rows.items() if row[pair[0]] == form]
            file.add(form, pairs, *widths)
        files[layer_id] = file
    return files
