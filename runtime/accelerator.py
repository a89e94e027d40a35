"""Which GPU is in use. torch is imported where one may be: llama.cpp runs without it."""

from __future__ import annotations


def accelerator_name(device_type: str) -> str:
    """Name of the GPU in use on a device of this type, `cuda` or another; else empty."""
    if device_type != "cuda":
        return ""
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else ""
