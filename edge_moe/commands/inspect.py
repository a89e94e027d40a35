"""`edge-moe inspect`: what a model is, from headers only."""

from __future__ import annotations

from pathlib import Path

from edge_moe.commands.options import Json, Model, Revision, stdout
from edge_moe.gguf_split import is_gguf_name


def inspect_command(model: Model, revision: Revision = None, json: Json = False) -> None:
    """Show architecture, bytes by component, forms and target limits, from headers only."""
    if is_gguf_name(Path(model)):
        _inspect_gguf(model, json)
        return
    from edge_moe.inspect import inspect_model
    from edge_moe.inspect_table import print_inspection

    found = inspect_model(model, revision)
    if json:
        print(found.model_dump_json(indent=1))
        return
    print_inspection(found, stdout())


def _inspect_gguf(model: str, is_json: bool) -> None:
    from edge_moe.hub import local_path
    from edge_moe.inspect_gguf import inspect_gguf, print_gguf

    found = inspect_gguf(local_path(model))
    if is_json:
        print(found.model_dump_json(indent=1))
        return
    print_gguf(found, stdout())
