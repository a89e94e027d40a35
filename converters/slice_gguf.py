"""Build a plan of a GGUF model: cut experts out of the file, without quantising again.

Blocks of kept experts are copied as they are; rows of the router, of biases and of scales follow.
Only where the plan gives a layer another type than it is stored in are weights dequantised and
packed anew. Memory: one expert's projection in float32 and packed, where types change, and 8 MiB.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from edge_moe import __version__
from edge_moe.converters.copy_range import RangeCopier, write_all
from edge_moe.converters.gguf_metadata import FILE_TYPES
from edge_moe.converters.gguf_rules import forms_by_layer
from edge_moe.converters.growing_file import GrowingFile, growing_file
from edge_moe.converters.model_card import plan_fingerprint
from edge_moe.converters.progress import Advance, byte_progress
from edge_moe.converters.slice_packing import InputSquares, SlicePacker
from edge_moe.errors import InputError, TargetError
from edge_moe.files import require_free_disk
from edge_moe.formats import FORM_NAMES, form_fits, split_form
from edge_moe.formats.quantise import get_quantiser
from edge_moe.gguf_header import GgufTensorInfo
from edge_moe.gguf_model import GgufModel
from edge_moe.gguf_raw import (
    RawTensor,
    header_bytes,
    integer_key_like,
    offsets,
    string_key,
)
from edge_moe.gguf_split import SPLIT_KEYS
from edge_moe.gguf_tensors import EXPERT_MATRIX, is_per_expert, layer_of
from edge_moe.plan import Plan

_OWN_PREFIX = "edge_moe."
_SIZE_LABEL = "general.size_label"
_PARTS = {"gate": (0,), "up": (1,), "gate_up": (0, 1), "down": (2,)}
"""Matrices of an expert that a tensor holds: 0 gate, 1 up, 2 down."""
Forms = Sequence[Sequence[str]]
"""[L][E] form of every expert."""


@dataclass(frozen=True)
class _Cut:
    """One tensor of the output and where it comes from."""

    source: GgufTensorInfo
    tensor: RawTensor
    layer_id: int
    kept: tuple[int, ...] | None
    """Experts whose rows are kept; None for a tensor that stays whole."""

    @property
    def is_copied(self) -> bool:
        return self.tensor.type_name == self.source.type_name


def slice_gguf(
    plan: Plan, model: GgufModel, output: Path, squares: InputSquares | None = None
) -> Path:
    """Write `plan` to the file `output`, which appears when it is complete; returns `output`.

    A killed run is continued by the next one, tensor by tensor.

    Raises:
        TargetError: one GGUF file cannot hold the plan, or it is packed in a way that needs the
            calibration text again.
        InputError: types change, and the plan's quantiser needs `squares`.
        DiskSpaceError: too little free space, before anything is written.
        CheckpointError: a source that was damaged or truncated since it was opened.
    """
    check_slice(plan, model)
    file = _SliceFile(model, plan.forms, [("plan_fingerprint", plan_fingerprint(plan))])
    if file.changes_types:
        _check_quantiser(plan.quantiser, squares)
    packer = SlicePacker(plan.quantiser, squares)
    with (
        growing_file(output, file.header, file.total_bytes) as growing,
        byte_progress(f"slice {output.name}", file.total_bytes) as advance,
    ):
        advance(growing.done_bytes)
        file.write(growing.fd, packer, advance, growing)
    return output


def write_trial_slice(
    model: GgufModel, forms: Forms, path: Path, packer: SlicePacker, advance: Advance
) -> None:
    """Write the file `path` as `slice_gguf` would, of `forms` that keep the target's rules.

    `advance` is told bytes as they are written; what it raises goes through.

    Raises:
        DiskSpaceError: too little free space, before anything is written.
    """
    file = _SliceFile(model, forms, [])
    require_free_disk(path.parent, file.total_bytes, "a plan that is measured")
    with path.open("wb") as handle:
        write_all(handle.fileno(), file.header, 0)
        file.write(handle.fileno(), packer, advance)


def can_pack(quantiser: str) -> bool:
    """Whether a GGUF's experts can be packed so, with nothing else of the text than moments."""
    needs = get_quantiser(quantiser).needs
    return not needs or "squares" in needs


class _SliceFile:
    """What a slice will hold."""

    def __init__(
        self, model: GgufModel, forms: Forms, provenance: Sequence[tuple[str, str]]
    ) -> None:
        self._model = model
        self._cuts = _cuts(forms, model)
        tensors = [cut.tensor for cut in self._cuts]
        alignment = model.header.alignment
        keys = _keys(model, len(Plan.kept(forms[0])), self._cuts, provenance)
        self.header = header_bytes(keys, tensors, alignment)
        *self._starts, data_bytes = offsets(tensors, alignment)
        self.total_bytes = len(self.header) + data_bytes

    @property
    def changes_types(self) -> bool:
        """Whether experts have to be packed anew."""
        return not all(cut.is_copied for cut in self._cuts)

    def write(
        self, target: int, packer: SlicePacker, advance: Advance, growing: GrowingFile | None = None
    ) -> None:
        """Write the tensors behind the header in the open file `target`, those that it lacks."""
        os.ftruncate(target, self.total_bytes)
        with ExitStack() as stack:
            sources = {
                each: stack.enter_context(each.open("rb")).fileno() for each in _paths(self._cuts)
            }
            copier = RangeCopier(target, advance)
            first = growing.num_done if growing else 0
            for index, (cut, start) in enumerate(
                zip(self._cuts[first:], self._starts[first:], strict=True), first + 1
            ):
                at = len(self.header) + start
                end = at + cut.tensor.num_bytes
                if cut.is_copied:
                    _copy(cut, self._model, sources[cut.source.path], copier, at)
                else:
                    _repack(cut, packer, target, at, advance)
                    copier.wrote(end)
                if growing:
                    growing.finished(index, end)


def check_slice(plan: Plan, model: GgufModel) -> None:
    """Refuse a plan that one GGUF file cannot hold.

    Raises:
        TargetError: names the first layer that differs, or the form.
    """
    if model.header.number("expert_count") is None:
        raise TargetError(
            f"target gguf: {model.path} states expert_count as an array: export the file again"
        )
    for layer_id, form in forms_by_layer(plan, model.spec).items():
        _check_form(model, layer_id, form)


def _check_quantiser(quantiser: str, squares: InputSquares | None) -> None:
    if not can_pack(quantiser):
        raise TargetError(
            f"target gguf: the plan gives layers other types, packed by {quantiser!r}, which would "
            "have to run the calibration text through the GGUF again: calibrate with --quantiser "
            "imatrix or nearest, and plan again"
        )
    if get_quantiser(quantiser).needs and squares is None:
        raise InputError(
            f"the plan gives layers other types, packed by {quantiser}, which weighs columns "
            "by the calibration's moments: give their folder with --stats"
        )


def _check_form(model: GgufModel, layer_id: int, form: str) -> None:
    spec, parts, stored = model.spec, split_form(form), model.stored_types(layer_id)
    unpackable = [
        part
        for part, own in zip(parts, stored, strict=True)
        if part != own and part not in FORM_NAMES
    ]
    if unpackable:
        raise TargetError(
            f"target gguf: layer {layer_id} is planned as {form}, but edge-moe cannot pack "
            f"{unpackable[0]}, it only keeps it where a layer is stored in it: plan again"
        )
    if not form_fits(form, *spec.expert_shape):
        raise TargetError(
            f"target gguf: layer {layer_id} is planned as {form}, whose blocks do not divide "
            f"{spec.expert_hidden} and {spec.expert_width}: plan again"
        )
    if model.layers[layer_id].gate_up is not None and parts[0] != parts[1]:
        raise TargetError(
            f"target gguf: layer {layer_id} holds gate and up in one tensor, but is planned as "
            f"{form}: plan again"
        )


def _cuts(forms_of_layers: Forms, model: GgufModel) -> list[_Cut]:
    """Every tensor of the source, in its order."""
    spec = model.spec
    rows = dict(zip(spec.moe_layer_ids, forms_of_layers, strict=True))
    kept = {layer_id: tuple(Plan.kept(row)) for layer_id, row in rows.items()}
    forms = {layer_id: split_form(row[kept[layer_id][0]]) for layer_id, row in rows.items()}
    idle = _first_of_groups(
        len(next(iter(kept.values()))), spec.num_experts, spec.router.num_groups
    )
    cuts = []
    for info in model.tensors.values():
        layer_id = layer_of(info.name) or 0
        if not is_per_expert(info, spec.num_experts):
            whole = RawTensor(info.name, info.shape, info.type_name)
            cuts.append(_Cut(info, whole, layer_id, None))
            continue
        ids = kept.get(layer_id, idle)
        type_name = _planned_type(info, forms.get(layer_id))
        tensor = RawTensor(info.name, (len(ids), *info.shape[1:]), type_name)
        cuts.append(_Cut(info, tensor, layer_id, ids))
    return cuts


def _first_of_groups(count: int, num_experts: int, num_groups: int) -> tuple[int, ...]:
    """Ids for layers that nothing is known of, multi-token prediction: the first of each group."""
    size, each = num_experts // num_groups, count // num_groups
    return tuple(group * size + index for group in range(num_groups) for index in range(each))


def _planned_type(info: GgufTensorInfo, form: tuple[str, str, str] | None) -> str:
    match = EXPERT_MATRIX.fullmatch(info.name)
    if match is None or form is None:
        return info.type_name
    return form[_PARTS[match.group(2)][0]].upper()


def _keys(
    model: GgufModel, num_kept: int, cuts: list[_Cut], provenance: Sequence[tuple[str, str]]
) -> list[bytes]:
    """The source's keys as they are, with the new count, and where the file comes from."""
    header = model.header
    changes = {f"{header.architecture}.expert_count": num_kept}
    file_type = _file_type(cuts)
    if file_type is not None and type(header.metadata.get("general.file_type")) is int:
        changes["general.file_type"] = file_type
    keys = []
    for key in header.metadata:
        if key in SPLIT_KEYS or key.startswith(_OWN_PREFIX):
            continue
        raw = header.raw_key(key)
        if key == _SIZE_LABEL and num_kept < model.spec.num_experts:
            keys += _size_label(header.metadata[key], model.spec.num_experts, num_kept)
            continue
        keys.append(integer_key_like(raw, changes[key]) if key in changes else raw)
    own = [("version", __version__), ("source_fingerprint", model.fingerprint), *provenance]
    return keys + [string_key(f"{_OWN_PREFIX}{name}", value) for name, value in own]


def _size_label(label: object, num_experts: int, num_kept: int) -> list[bytes]:
    """`8x7B` with the new count; nothing where the label does not start with the old one."""
    count, cross, size = str(label).partition("x")
    if not cross or count != str(num_experts):
        return []
    return [string_key(_SIZE_LABEL, f"{num_kept}x{size}")]


def _file_type(cuts: list[_Cut]) -> int | None:
    """llama.cpp's label for the type that most experts' bytes have; None where none changed."""
    if all(cut.is_copied for cut in cuts):
        return None
    sizes: dict[str, int] = {}
    for cut in cuts:
        if EXPERT_MATRIX.fullmatch(cut.source.name):
            name = cut.tensor.type_name.lower()
            sizes[name] = sizes.get(name, 0) + cut.tensor.num_bytes
    return FILE_TYPES.get(max(sizes, key=lambda name: sizes[name]))


def _paths(cuts: list[_Cut]) -> Iterator[Path]:
    return iter(dict.fromkeys(cut.source.path for cut in cuts))


def _copy(cut: _Cut, model: GgufModel, source: int, copier: RangeCopier, start: int) -> None:
    """Kept rows, neighbours in one go."""
    info = cut.source
    if cut.kept is None:
        copier.copy(source, info.offset, info.num_bytes, start, str(info.path))
        return
    stride = info.num_bytes // model.spec.num_experts
    for first, count in _runs(cut.kept):
        copier.copy(source, info.offset + first * stride, count * stride, start, str(info.path))
        start += count * stride


def _runs(kept: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(first, count) of runs of consecutive ids."""
    first = 0
    for index in range(1, len(kept) + 1):
        if index == len(kept) or kept[index] != kept[index - 1] + 1:
            yield kept[first], index - first
            first = index


def _repack(cut: _Cut, packer: SlicePacker, target: int, start: int, advance: Advance) -> None:
    """Kept experts of one tensor in another type, one at a time."""
    assert cut.kept is not None
    for expert_id in cut.kept:
        packed = packer.packed(cut.source, expert_id, cut.tensor.type_name.lower())
        write_all(target, packed.data, start)
        start += packed.nbytes
        advance(packed.nbytes)
