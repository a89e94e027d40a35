"""Write a plan as one GGUF file for llama.cpp.

GGUF holds one expert count for the whole model and one form per expert tensor, so every layer keeps
the same number of experts and the experts of a layer share a form. Weights are packed by
`edge_moe.formats`, not by llama.cpp, and streamed: peak memory is an expert per core while it is
packed (`packing_peak_bytes`), one 8 MiB chunk of a tensor, or a dense tensor in float32 where
llama.cpp wants it rearranged. What goes where is in `gguf_families`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO

from edge_moe.candidates import check_target
from edge_moe.checkpoint import Checkpoint
from edge_moe.config_reader import read_config, text_config
from edge_moe.converters.gguf_dense import dense_tensors
from edge_moe.converters.gguf_families import GGUF_FAMILIES
from edge_moe.converters.gguf_family import GgufSource, Rule
from edge_moe.converters.gguf_metadata import add_metadata, add_vocabulary, check_source
from edge_moe.converters.gguf_provenance import add_provenance
from edge_moe.converters.gguf_rules import forms_by_layer
from edge_moe.converters.gguf_tokenizer import read_vocabulary
from edge_moe.converters.gguf_writer import (
    GgufTensor,
    add_tensor_info,
    import_gguf,
    write_tensor_at,
)
from edge_moe.converters.growing_file import growing_file
from edge_moe.converters.packer import Packer, PlainPacker
from edge_moe.converters.packing import expert_records, is_stored_as
from edge_moe.converters.progress import byte_progress
from edge_moe.converters.slicing import FORM_OF_DTYPE, slice_experts, whole_tensor
from edge_moe.converters.source_bytes import read_all
from edge_moe.errors import TargetError
from edge_moe.formats import (
    STORED_NAMES,
    expert_bytes,
    expert_packed_bytes,
    form_fits,
    split_form,
)
from edge_moe.gguf_raw import offsets
from edge_moe.plan import Plan
from edge_moe.spec import ModelSpec

_EXPERT_NAMES = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


def export_gguf(
    plan: Plan, checkpoint: Checkpoint, output: Path, packer: Packer | None = None
) -> Path:
    """Write `plan` to the file `output`, which appears when it is complete; returns `output`.

    A killed run is continued by the next one, tensor by tensor.

    Raises:
        TargetError: llama.cpp cannot express the architecture, the tokenizer or the plan.
        MissingExtraError: the `gguf` package is not installed.
        DiskSpaceError: too little free space, before anything is written.
        CheckpointError: weights that are damaged, NaN or infinite.
    """
    gguf = import_gguf()
    spec = checkpoint.spec
    check_gguf(plan, spec)
    source = gguf_source(checkpoint, len(plan.kept(plan.forms[0])))
    check_source(source)
    tensors = [
        *_dense_tensors(plan, checkpoint, source),
        *_extra_tensors(source),
        *_expert_tensors(plan, checkpoint, packer or PlainPacker(checkpoint), output.parent),
    ]
    header = _header(plan, checkpoint, source, tensors, output)
    *starts, data_bytes = offsets(tensors, gguf.GGUF_DEFAULT_ALIGNMENT)
    total_bytes = len(header) + data_bytes
    with (
        growing_file(output, header, total_bytes, _largest_layer_bytes(plan, spec)) as growing,
        byte_progress(f"export {output.name}", total_bytes) as advance,
    ):
        advance(growing.done_bytes)
        first = growing.num_done
        for index, (tensor, start) in enumerate(
            zip(tensors[first:], starts[first:], strict=True), first + 1
        ):
            at = len(header) + start
            write_tensor_at(growing.fd, tensor, at)
            growing.finished(index, at + tensor.num_bytes)
            advance(tensor.num_bytes)
    return output


def _header(
    plan: Plan,
    checkpoint: Checkpoint,
    source: GgufSource,
    tensors: Sequence[GgufTensor],
    output: Path,
) -> bytes:
    """Everything in front of the weights, padded to where they start."""
    gguf = import_gguf()
    vocabulary = read_vocabulary(checkpoint.folder, checkpoint.spec.vocab_size)
    with TemporaryDirectory(prefix=".edge-moe-header-", dir=output.parent) as folder:
        path = Path(folder) / output.name
        writer = gguf.GGUFWriter(path, checkpoint.spec.family.gguf_arch)
        add_provenance(writer, plan, checkpoint.folder)
        add_metadata(writer, plan, source)
        add_vocabulary(writer, vocabulary)
        for tensor in tensors:
            add_tensor_info(writer, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    return header + bytes(-len(header) % gguf.GGUF_DEFAULT_ALIGNMENT)


def check_gguf(plan: Plan, spec: ModelSpec) -> None:
    """Refuse a plan that one GGUF file cannot hold.

    Raises:
        TargetError: names the architecture or the first layer that differs.
    """
    check_target(spec, "gguf")
    for layer_id, form in forms_by_layer(plan, spec).items():
        if not set(split_form(form)) <= set(STORED_NAMES):
            raise TargetError(
                f"target gguf: layer {layer_id} is planned as {form}, which ggml does not know: "
                "plan again with --target gguf"
            )
        if not form_fits(form, *spec.expert_shape):
            raise TargetError(
                f"target gguf: layer {layer_id} is planned as {form}, whose blocks do not divide "
                f"{spec.expert_hidden} and {spec.expert_width}: plan again"
            )


def check_gguf_source(checkpoint: Checkpoint) -> None:
    """Refuse a model that no plan makes a GGUF file of: its configuration and its tokenizer.

    Raises:
        TargetError: names what llama.cpp cannot express.
    """
    check_source(gguf_source(checkpoint, checkpoint.spec.num_experts))
    read_vocabulary(checkpoint.folder, checkpoint.spec.vocab_size)


def gguf_source(checkpoint: Checkpoint, num_kept: int) -> GgufSource:
    """What keys and transformations are computed from, with `num_kept` experts per MoE layer."""
    spec = checkpoint.spec
    config = text_config(read_config(checkpoint.folder / "config.json"))
    return GgufSource(spec, {**spec.family.config_defaults, **config}, num_kept)


def _dense_tensors(plan: Plan, checkpoint: Checkpoint, source: GgufSource) -> Iterator[GgufTensor]:
    """Matrices in the checkpoint's dtype, vectors and routers in float32.

    A plan with f32 experts gets float32 matrices too: llama.cpp rounds activations to the dtype of
    the matrix they meet, so that such a file computes in float32 throughout.
    """
    spec = checkpoint.spec
    family = GGUF_FAMILIES[spec.model_type]
    kept = {
        name: plan.kept(row)
        for layer_id, row in zip(plan.moe_layer_ids, plan.forms, strict=True)
        for name in spec.router_tensor_names(layer_id)
    }
    is_exact = any("f32" in row for row in plan.forms)
    for info in checkpoint.dense_tensors:
        if spec.is_tied_head(info.name):
            continue
        rule = family.rule(spec, info.name)
        if info.name in kept:
            sliced = slice_experts(info, kept[info.name], spec.num_experts, "f32")
            yield from dense_tensors(rule, sliced, source, "f32")
            continue
        form = "f32" if is_exact else FORM_OF_DTYPE[info.dtype]
        yield from dense_tensors(rule, whole_tensor(info), source, form)
        if info.name == spec.embedding_name and spec.tie_word_embeddings and family.needs_output:
            yield from dense_tensors(Rule(("output.weight",)), whole_tensor(info), source, form)


def _extra_tensors(source: GgufSource) -> Iterator[GgufTensor]:
    extra = GGUF_FAMILIES[source.spec.model_type].extra
    for name, values in (extra(source) if extra else {}).items():
        yield GgufTensor(name, values.shape, "f32", partial(iter, [values.tobytes()]))


def _expert_tensors(
    plan: Plan, checkpoint: Checkpoint, packer: Packer, folder: Path
) -> Iterator[GgufTensor]:
    """Stacks per layer: gate, where there is one, and up [kept, I, H], down [kept, H, I]."""
    spec = checkpoint.spec
    *_, up, down = spec.expert_matrix_shapes
    for layer_id, row in zip(plan.moe_layer_ids, plan.forms, strict=True):
        kept = plan.kept(row)
        form = row[kept[0]]
        types = split_form(form)
        source: Callable[[int], Iterator[bytes]]
        if all(is_stored_as(form, checkpoint, layer_id, expert_id) for expert_id in kept):
            source = partial(_stored_projection, checkpoint, layer_id, kept)
        else:
            experts = [(expert_id, form) for expert_id in kept]
            source = _LayerRecords(checkpoint, packer, layer_id, experts, folder).projection
        for projection, (name, shape) in enumerate(zip(_EXPERT_NAMES, (up, up, down), strict=True)):
            if projection == 0 and not spec.has_gate:
                continue
            yield GgufTensor(
                f"blk.{layer_id}.{name}.weight",
                (len(kept), *shape),
                types[projection],
                partial(source, projection),
            )


def _stored_projection(
    checkpoint: Checkpoint, layer_id: int, expert_ids: Sequence[int], projection: int
) -> Iterator[bytes]:
    """The stored bytes of one projection, expert by expert, where they are what is wanted."""
    index = projection if checkpoint.spec.has_gate else projection - 1
    return read_all(checkpoint.expert_ranges(layer_id, each)[index] for each in expert_ids)


def _largest_layer_bytes(plan: Plan, spec: ModelSpec) -> int:
    """Experts of one layer, as many as are spooled at a time."""
    return max(sum(expert_bytes(form, *spec.expert_shape) for form in row) for row in plan.forms)


class _LayerRecords:
    """The packed experts of one layer, each packed once, spooled to a nameless file beside the
    output: GGUF wants all gates, then all ups, then all downs. Disk: one layer."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        packer: Packer,
        layer_id: int,
        experts: Sequence[tuple[int, str]],
        folder: Path,
    ) -> None:
        self._checkpoint = checkpoint
        self._packer = packer
        self._layer_id = layer_id
        self._experts = experts
        self._folder = folder
        self._spool: IO[bytes] | None = None

    def projection(self, index: int) -> Iterator[bytes]:
        """Packed bytes of one projection, expert by expert; 0 gate, 1 up, 2 down."""
        spool = self._spool = self._spool or self._packed()
        sizes = expert_packed_bytes(self._experts[0][1], *self._checkpoint.spec.expert_shape)
        for row in range(len(self._experts)):
            spool.seek(row * sum(sizes) + sum(sizes[:index]))
            yield spool.read(sizes[index])
        if index == len(sizes) - 1:
            spool.close()
            self._spool = None

    def _packed(self) -> IO[bytes]:
        spool = TemporaryFile(dir=self._folder)
        for record in expert_records(self._checkpoint, self._layer_id, self._experts, self._packer):
            spool.writelines(record)
        return spool
