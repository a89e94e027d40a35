"""onnxruntime: whether it is installed once, new enough, and runs on the device asked for."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from edge_moe.errors import InputError, MissingExtraError, install_command
from edge_moe.plan import Device

CPU_PACKAGE, GPU_PACKAGE = "onnxruntime", "onnxruntime-gpu"
LEAST_VERSION = (1, 31)
"""Earlier ones compute gated experts with another activation, silently."""
PROVIDERS: dict[Device, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def import_onnxruntime(purpose: str) -> Any:
    """The package.

    Raises:
        MissingExtraError: it is not installed.
        InputError: both of its builds are, which overwrite each other, or one that is too old.
    """
    installed = {
        name: found for name in (CPU_PACKAGE, GPU_PACKAGE) if (found := _version(name)) is not None
    }
    if len(installed) > 1:
        raise InputError(
            f"{CPU_PACKAGE} {installed[CPU_PACKAGE]} and {GPU_PACKAGE} {installed[GPU_PACKAGE]} "
            "are both installed and overwrite each other's files: pip uninstall -y onnxruntime "
            f"onnxruntime-gpu, then {install_command('onnx')} (CPU) or "
            f"{install_command('onnx-gpu')} (NVIDIA)"
        )
    for name, found in installed.items():
        if _numbers(found) < LEAST_VERSION:
            least = ".".join(map(str, LEAST_VERSION))
            raise InputError(
                f"{name} {found} computes the experts of other models only: install {least} or "
                f"later, pip install -U {name}"
            )
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError(CPU_PACKAGE, "onnx", purpose) from None
    return onnxruntime


def require_provider(session: Any, device: Device, path: object) -> None:
    """Refuse a session that fell back to another device.

    Raises:
        InputError: the provider of `device` is not active.
    """
    active = session.get_providers()
    if PROVIDERS[device] in active:
        return
    raise InputError(
        f"device {device} was asked for, but onnxruntime runs {path} on {', '.join(active)}: "
        f"{install_command('onnx-gpu')} with a driver for its CUDA version, or use --device cpu"
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
