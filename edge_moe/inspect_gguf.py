"""What a GGUF file is, from its header alone: the short cousin of `edge_moe.inspect`."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from edge_moe.errors import EdgeMoeError
from edge_moe.gguf_header import GgufHeader, summed_bytes
from edge_moe.gguf_model import GgufModel
from edge_moe.gguf_split import read_parts
from edge_moe.offer import stored_forms
from edge_moe.units import format_bytes


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ByteShare(_Model):
    """Bytes of one component, or of one ggml type."""

    name: str
    num_bytes: int


class GgufInspection(_Model):
    """`edge-moe inspect` of a .gguf file. Counts that the header leaves out are None."""

    model: str
    kind: Literal["gguf"] = "gguf"
    architecture: str
    name: str | None
    num_files: int
    """Of a model split into several files; the bytes here are those of all."""
    num_layers: int | None
    num_experts: int | None
    top_k: int | None
    num_shared_experts: int | None
    hidden_size: int | None
    expert_width: int | None
    max_context_tokens: int | None
    num_tensors: int
    total_parameters: int
    tensor_bytes: int
    file_bytes: int
    bits_per_weight: float
    components: list[ByteShare]
    types: list[ByteShare]
    router: str | None
    """How experts are chosen and weighted; None where `limits` says why nobody knows."""
    expert_forms: dict[str, int]
    """Form that a layer's experts are stored in -> number of layers."""
    limits: list[str]
    """Why it cannot be planned from, in sentences."""


def inspect_gguf(path: Path) -> GgufInspection:
    """Read the header of `path`, and of the other parts where it is the first of several.

    Raises:
        CheckpointError: not GGUF, truncated or damaged, or a part that is missing or another's.
    """
    parts = read_parts(path)
    header = parts[0]
    tensors = [info for part in parts for info in part.tensors]
    tensor_bytes = sum(info.num_bytes for info in tensors)
    parameters = sum(math.prod(info.shape) for info in tensors)
    return GgufInspection(
        model=str(path),
        architecture=header.architecture,
        name=_text(header, "general.name"),
        num_files=len(parts),
        num_layers=header.number("block_count"),
        num_experts=header.number("expert_count"),
        top_k=header.number("expert_used_count"),
        num_shared_experts=header.number("expert_shared_count"),
        hidden_size=header.number("embedding_length"),
        expert_width=header.number("expert_feed_forward_length"),
        max_context_tokens=header.number("context_length"),
        num_tensors=len(tensors),
        total_parameters=parameters,
        tensor_bytes=tensor_bytes,
        file_bytes=sum(part.total_bytes for part in parts),
        bits_per_weight=8 * tensor_bytes / parameters if parameters else 0.0,
        components=_shares(summed_bytes(tensors, lambda info: info.component)),
        types=_shares(summed_bytes(tensors, lambda info: info.type_name)),
        **_as_source(path, parts),
    )


def _as_source(path: Path, parts: tuple[GgufHeader, ...]) -> dict[str, Any]:
    """What planning needs to know of the file, or why it cannot."""
    if parts[0].number("expert_count") is None:
        return {"router": None, "expert_forms": {}, "limits": []}
    try:
        model = GgufModel(path, parts)
    except EdgeMoeError as error:
        return {"router": None, "expert_forms": {}, "limits": [str(error)]}
    forms = Counter(stored_forms(model))
    return {"router": model.spec.router.describe(), "expert_forms": dict(forms), "limits": []}


def _shares(sizes: dict[str, int]) -> list[ByteShare]:
    return [ByteShare(name=name, num_bytes=num_bytes) for name, num_bytes in sizes.items()]


def _text(header: GgufHeader, key: str) -> str | None:
    value = header.metadata.get(key)
    return value if isinstance(value, str) else None


def print_gguf(found: GgufInspection, console: Console) -> None:
    """Facts, then bytes by component and by type."""
    title = f"GGUF {found.architecture} {found.name or ''} {found.model}"
    console.print(" ".join(title.split()), style="bold", markup=False)
    for name, value in _facts(found):
        console.print(f"  {name:<12}{value}", markup=False)
    for sentence in found.limits:
        console.print(f"limit: not a source for plan: {sentence}", style="yellow", markup=False)
    for heading, shares in (("component", found.components), ("type", found.types)):
        table = Table(box=None, pad_edge=False)
        table.add_column(heading)
        table.add_column("bytes", justify="right")
        table.add_column("share", justify="right")
        for share in shares:
            fraction = share.num_bytes / max(found.tensor_bytes, 1)
            table.add_row(share.name, format_bytes(share.num_bytes), f"{fraction:.1%}")
        console.print(table)


def _facts(found: GgufInspection) -> list[tuple[str, str]]:
    facts = [("layers", str(found.num_layers or "?"))]
    if found.num_experts:
        experts = f"{found.num_experts} per layer, top-{found.top_k or '?'}"
        if found.num_shared_experts:
            experts += f", {found.num_shared_experts} shared"
        facts.append(("experts", experts))
        if found.router:
            facts.append(("router", found.router))
            counts = found.expert_forms.items()
            facts.append(("stored as", ", ".join(f"{form} ({n} layers)" for form, n in counts)))
    else:
        facts.append(("experts", "none: not a mixture of experts"))
    size = f"{found.total_parameters:,} parameters, {found.bits_per_weight:.3g} bits each"
    facts.append(("size", f"{format_bytes(found.file_bytes)}, {size}"))
    if found.max_context_tokens:
        facts.append(("context", f"up to {found.max_context_tokens:,} tokens"))
    if found.num_files > 1:
        facts.append(("files", str(found.num_files)))
    return facts
