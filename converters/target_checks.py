"""What a target cannot hold of a model whatever the plan: known before hours of calibration."""

from __future__ import annotations

from edge_moe.candidates import check_target
from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import MissingExtraError
from edge_moe.plan import Target
from edge_moe.source_model import SourceModel


def check_model(source: SourceModel, target: Target) -> None:
    """Refuse what `build --target` would refuse of the model's configuration or tokenizer.

    Of ONNX it is known only where the package `onnx` is installed.

    Raises:
        TargetError: names what the target cannot express, and the value.
        SpecError: transformers refuses config.json.
    """
    check_target(source.spec, target)
    if not isinstance(source, Checkpoint):
        return
    if target == "gguf":
        from edge_moe.converters.export_gguf import check_gguf_source

        check_gguf_source(source)
    if target == "onnx":
        _check_onnx(source)


def _check_onnx(source: Checkpoint) -> None:
    from edge_moe.converters.onnx.graph import import_onnx

    try:
        import_onnx()
    except MissingExtraError:
        return
    from edge_moe.converters.onnx.export import check_onnx_source

    check_onnx_source(source)
