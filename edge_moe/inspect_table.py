"""An inspection as tables for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from edge_moe.inspect import ModelInspection
from edge_moe.units import format_bytes


def print_inspection(found: ModelInspection, console: Console) -> None:
    """Facts, bytes by component, one expert in every form, what targets cannot express."""
    console.print(f"{found.architecture} {found.model}", style="bold", markup=False)
    for name, value in _facts(found):
        console.print(f"  {name:<12}{value}", markup=False)
    console.print(_components_table(found))
    console.print(_forms_table(found))
    for fit in found.targets:
        forms = ", ".join(fit.forms) or "not possible"
        console.print(f"target {fit.target}: {forms}", markup=False)
        for sentence in fit.limits:
            console.print(f"  {sentence}", markup=False)


def _facts(found: ModelInspection) -> list[tuple[str, str]]:
    layers = f"{found.num_layers} ({found.num_moe_layers} with experts)"
    experts = f"{found.num_experts} per layer, top-{found.top_k}"
    if found.num_shared_experts:
        experts += f", {found.num_shared_experts} shared"
    facts = [("layers", layers), ("experts", experts)]
    if found.kept_experts is not None and found.kept_forms is not None:
        forms = ", ".join(f"{count} {form}" for form, count in found.kept_forms.items())
        kept = f"{min(found.kept_experts)} to {max(found.kept_experts)} per layer: {forms}"
        facts.append(("kept", kept))
    facts.append(("router", found.router))
    shapes = f"hidden {found.hidden_size}, expert width {found.expert_width}"
    facts.append(("shapes", f"{shapes}, vocabulary {found.vocab_size:,}, {found.dtype}"))
    if found.total_parameters is not None and found.active_parameters is not None:
        total, active = _count(found.total_parameters), _count(found.active_parameters)
        facts.append(("parameters", f"{total}, {active} active per token"))
    cache = format_bytes(found.kv_bytes_per_1024_tokens)
    facts.append(("context", f"up to {found.max_context_tokens:,} tokens, KV {cache} per 1024"))
    return facts


def _components_table(found: ModelInspection) -> Table:
    table = _table("Bytes by component")
    table.add_column("component")
    table.add_column("tensors", justify="right")
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    for part in found.components:
        share = f"{part.num_bytes / found.total_bytes:.1%}"
        table.add_row(part.name, f"{part.num_tensors:,}", format_bytes(part.num_bytes), share)
    table.add_row("total", "", format_bytes(found.total_bytes), "")
    return table


def _forms_table(found: ModelInspection) -> Table:
    table = _table("One expert in every form that fits its rows")
    table.add_column("form")
    table.add_column("is")
    table.add_column("bits per weight", justify="right")
    table.add_column("expert", justify="right")
    table.add_column("one token reads", justify="right")
    for row in found.forms:
        table.add_row(
            row.form,
            row.label,
            f"{row.bits_per_weight:.4g}",
            format_bytes(row.expert_bytes),
            format_bytes(row.token_cycle_bytes),
        )
    return table


def _count(number: int) -> str:
    """12_345_678 -> `12.3 M`, 30_500_000_000 -> `30.5 B`."""
    for scale, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g} {suffix}"
    return str(number)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
