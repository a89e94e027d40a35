"""Write a plan as one GGUF file for llama.cpp.

GGUF holds one expert count for the whole model and one form per expert tensor, so every layer keeps
the same number of experts and the experts of a layer share a form. Weights are packed by
`edge_moe.formats`, not by llama.cpp, and streamed: peak memory is one expert's projection in
float32 and packed, or one 8 MiB chunk of a dense tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from edge_moe.candidates import check_target
from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.gguf_metadata import (
    add_metadata,
    add_vocabulary,
    check_config,
    read_config,
)
from edge_moe.converters.gguf_tokenizer import read_vocabulary
from edge_moe.converters.gguf_writer import (
    GgufTensor,
    add_tensor_info,
    import_gguf,
    write_tensor,
)
from edge_moe.converters.packer import Packer
from edge_moe.converters.progress import byte_progress
from edge_moe.converters.slicing import SlicedTensor, slice_experts, whole_tensor
from edge_moe.errors import TargetError
from edge_moe.files import atomic_path, require_free_disk
from edge_moe.formats import (
    STORED_NAMES,
    expert_packed_bytes,
    form_fits,
    get_form,
    split_form,
)
from edge_moe.plan import Plan
from edge_moe.spec import ModelSpec
from edge_moe.tensor_info import TensorInfo

_HEADER_BYTES = 64 * 2**20  # generous: vocabulary, merges, tensor names, alignment
_FORM_OF_DTYPE = {"BF16": "bf16", "F16": "f16", "F32": "f32"}

# checkpoint name -> llama.cpp's, both without `.weight`
_MODEL_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
_EXPERT_NAMES = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def export_gguf(
    plan: Plan, checkpoint: Checkpoint, output: Path, packer: Packer | None = None
) -> Path:
    """Write `plan` to the file `output`, which appears when it is complete; returns `output`.

    Raises:
        TargetError: llama.cpp cannot express the architecture, the tokenizer or the plan.
        MissingExtraError: the `gguf` package is not installed.
        DiskSpaceError: too little free space, before anything is written.
        CheckpointError: weights that are damaged, NaN or infinite.
    """
    gguf = import_gguf()
    spec = checkpoint.spec
    config = read_config(checkpoint.folder)
    check_gguf(plan, spec)
    check_config(spec, config)
    vocabulary = read_vocabulary(checkpoint.folder, spec.vocab_size)
    tensors = [*_dense_tensors(plan, checkpoint), *_expert_tensors(plan, checkpoint, packer)]
    total_bytes = sum(tensor.num_bytes for tensor in tensors)
    require_free_disk(output.parent, total_bytes + _HEADER_BYTES, f"GGUF file {output.name}")
    with (
        atomic_path(output) as temporary,
        byte_progress(f"export {output.name}", total_bytes) as advance,
    ):
        writer = gguf.GGUFWriter(temporary, spec.family.gguf_arch)
        add_metadata(writer, plan, spec, config, checkpoint.folder.name)
        add_vocabulary(writer, vocabulary)
        for tensor in tensors:
            add_tensor_info(writer, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            write_tensor(writer, tensor)
            advance(tensor.num_bytes)
        writer.close()
    return output


def check_gguf(plan: Plan, spec: ModelSpec) -> None:
    """Refuse a plan that one GGUF file cannot hold.

    Raises:
        TargetError: names the architecture or the first layer that differs.
    """
    check_target(spec, "gguf")
    counts = [len(plan.kept(row)) for row in plan.forms]
    for layer_id, row, count in zip(plan.moe_layer_ids, plan.forms, counts, strict=True):
        if count != counts[0]:
            raise TargetError(
                f"target gguf: layer {layer_id} keeps {count} experts and layer "
                f"{plan.moe_layer_ids[0]} keeps {counts[0]}, but GGUF holds one count for all: "
                "plan again with --target gguf"
            )
        forms = sorted({row[expert_id] for expert_id in plan.kept(row)})
        if len(forms) > 1:
            raise TargetError(
                f"target gguf: layer {layer_id} mixes the forms {', '.join(forms)}, but GGUF "
                "stores a layer's experts in one form: plan again with --target gguf"
            )
        if not set(split_form(forms[0])) <= set(STORED_NAMES):
            raise TargetError(
                f"target gguf: layer {layer_id} is planned as {forms[0]}, which ggml does not "
                "know: plan again with --target gguf"
            )
        if not form_fits(forms[0], *spec.expert_shape):
            raise TargetError(
                f"target gguf: layer {layer_id} is planned as {forms[0]}, whose blocks of "
                f"{get_form(forms[0]).block_size} do not divide {spec.hidden_size} and "
                f"{spec.expert_width}: plan again"
            )


def _dense_tensors(plan: Plan, checkpoint: Checkpoint) -> Iterator[GgufTensor]:
    """Matrices in the checkpoint's dtype, vectors and routers in float32.

    A plan with f32 experts gets float32 matrices too: llama.cpp rounds activations to the dtype of
    the matrix they meet, so that such a file computes in float32 throughout.
    """
    spec = checkpoint.spec
    kept = {
        name: plan.kept(row)
        for layer_id, row in zip(plan.moe_layer_ids, plan.forms, strict=True)
        for name in spec.router_tensor_names(layer_id)
    }
    is_exact = any("f32" in row for row in plan.forms)
    for info in checkpoint.dense_tensors:
        if info.name == "lm_head.weight" and spec.tie_word_embeddings:
            continue
        if info.name in kept:
            yield _dense_tensor(
                info, slice_experts(info, kept[info.name], spec.num_experts, "f32"), "f32"
            )
            continue
        form = "f32" if is_exact or len(info.shape) < 2 else _FORM_OF_DTYPE[info.dtype]
        is_same = form == _FORM_OF_DTYPE[info.dtype]
        yield _dense_tensor(info, whole_tensor(info, form=None if is_same else form), form)


def _dense_tensor(info: TensorInfo, source: SlicedTensor, form: str) -> GgufTensor:
    return GgufTensor(gguf_name(info.name), source.entry.shape, form, source.chunks)


def gguf_name(name: str) -> str:
    """llama.cpp's name of a dense tensor.

    Raises:
        TargetError: llama.cpp has no such tensor.
    """
    stem = name.removesuffix(".weight")
    match = _LAYER.fullmatch(stem)
    found = _LAYER_NAMES.get(match.group(2)) if match else _MODEL_NAMES.get(stem)
    if found is None or stem == name:
        raise TargetError(f"target gguf has no place for tensor {name!r}: use --target native")
    return f"blk.{match.group(1)}.{found}.weight" if match else f"{found}.weight"


def _expert_tensors(
    plan: Plan, checkpoint: Checkpoint, packer: Packer | None
) -> Iterator[GgufTensor]:
    """Three stacks per layer: gate and up [kept, I, H], down [kept, H, I]."""
    spec = checkpoint.spec
    up, down = (spec.expert_width, spec.hidden_size), (spec.hidden_size, spec.expert_width)
    for layer_id, row in zip(plan.moe_layer_ids, plan.forms, strict=True):
        kept = plan.kept(row)
        form = row[kept[0]]
        for projection, (name, shape) in enumerate(zip(_EXPERT_NAMES, (up, up, down), strict=True)):
            yield GgufTensor(
                f"blk.{layer_id}.{name}.weight",
                (len(kept), *shape),
                form,
                partial(_pack_projection, checkpoint, packer, layer_id, kept, projection, form),
            )


def _pack_projection(
    checkpoint: Checkpoint,
    packer: Packer | None,
    layer_id: int,
    expert_ids: list[int],
    projection: int,
    form: str,
) -> Iterator[bytes]:
    """Packed bytes of one projection, expert by expert; 0 gate, 1 up, 2 down.

    A packer packs whole experts, so each is packed once per projection.
    """
    spec = checkpoint.spec
    sizes = expert_packed_bytes(form, *spec.expert_shape)
    part = slice(sum(sizes[:projection]), sum(sizes[: projection + 1]))
    for expert_id in expert_ids:
        if packer is not None:
            yield packer.pack(layer_id, expert_id, form)[part].tobytes()
            continue
        weights = checkpoint.projection(layer_id, expert_id, projection)
        yield get_form(form).pack(weights).tobytes()
