"""Whether llama.cpp can put layers on a GPU here."""

from __future__ import annotations

from pathlib import Path

from edge_moe.errors import InputError
from edge_moe.runtime.llama_api import TESTED_VERSION, llama_api


def require_gpu(path: Path, gpu_layers: int) -> None:
    """Refuse layers on a GPU where llama.cpp has none; `path` is the model, for messages.

    Raises:
        InputError: fewer than no layers, or a build without support for GPUs.
        MissingExtraError: llama-cpp-python is not installed.
    """
    if gpu_layers < 0:
        raise InputError(f"--gpu-layers is {gpu_layers}: use 0 or more")
    if gpu_layers and not llama_api(path).llama.llama_supports_gpu_offload():
        raise InputError(
            f"--gpu-layers {gpu_layers}: the llama-cpp-python that is installed was built without "
            'GPU support: build it with CUDA, CMAKE_ARGS="-DGGML_CUDA=on" pip install '
            f"--force-reinstall --no-cache-dir llama-cpp-python=={TESTED_VERSION}, or leave "
            "--gpu-layers out"
        )
