"""`edge-moe inspect`: what a model is, from headers only."""

from __future__ import annotations

from edge_moe.commands.options import Json, Model, Revision, stdout


def inspect_command(model: Model, revision: Revision = None, json: Json = False) -> None:
    """Show architecture, bytes by component, forms and target limits, from headers only."""
    from edge_moe.inspect import inspect_model
    from edge_moe.inspect_table import print_inspection

    found = inspect_model(model, revision)
    if json:
        print(found.model_dump_json(indent=1))
        return
    print_inspection(found, stdout())
