"""Whether llama.cpp can open a file: asked in a process of its own, which may abort.

    python -m edge_moe.runtime.llama_probe FILE CONTEXT_TOKENS BATCH_TOKENS [KEY=NUMBER ...]

Metadata that contradict each other fail assertions in llama.cpp, and those end the process.
Nothing is allocated: weights are not read and the graph is only measured.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_moe.errors import InputError

_LOAD_MODE_NONE = 0
_OVERRIDE_INT = 0
_SECONDS = 120


def require_loadable(
    path: Path, context_tokens: int, batch_tokens: int, overrides: Mapping[str, int]
) -> None:
    """Refuse a file that llama.cpp cannot open, with its own words.

    `overrides` are metadata keys and the whole numbers to take instead of the file's.

    Raises:
        InputError: llama.cpp refuses it, aborts, or takes longer than two minutes.
    """
    pairs = [f"{key}={number}" for key, number in overrides.items()]
    command = [sys.executable, "-m", __name__, path, context_tokens, batch_tokens, *pairs]
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    try:
        process = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{path}: llama.cpp has not opened it in {_SECONDS} seconds: download it again"
        ) from None
    if process.returncode != 0:
        raise InputError(
            f"{path}: llama.cpp cannot load it ({_reason(process.stderr)}): download or export it "
            "again"
        )


def override_array(llama: Any, overrides: Mapping[str, int]) -> Any:
    """`overrides` as llama_model_params wants them; `llama` is the module llama_cpp.llama_cpp."""
    array = (llama.llama_model_kv_override * (len(overrides) + 1))()  # the last one stays empty
    for entry, (key, number) in zip(array, overrides.items(), strict=False):
        entry.tag = _OVERRIDE_INT
        entry.key = key.encode()
        entry.value.val_i64 = number
    return array


def _reason(stderr: str) -> str:
    """The line that says most: a failed assertion, or else the last error."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    for word in ("GGML_ASSERT", "error", ""):
        for line in lines:
            if word in line:
                return line[line.index(word) :]
    return "no reason given"


def _main(path: str, context_tokens: str, batch_tokens: str, *pairs: str) -> int:
    from llama_cpp import llama_cpp as llama

    llama.llama_backend_init()
    model_parameters = llama.llama_model_default_params()
    model_parameters.n_gpu_layers = 0
    model_parameters.load_mode = _LOAD_MODE_NONE
    model_parameters.no_alloc = True
    overrides = dict(pair.rsplit("=", 1) for pair in pairs)
    array = override_array(llama, {key: int(number) for key, number in overrides.items()})
    model_parameters.kv_overrides = array
    model = llama.llama_model_load_from_file(os.fsencode(path), model_parameters)
    if not model:
        return 1
    context_parameters = llama.llama_context_default_params()
    context_parameters.n_ctx = int(context_tokens)
    context_parameters.n_batch = context_parameters.n_ubatch = int(batch_tokens)
    return 0 if llama.llama_init_from_model(model, context_parameters) else 1


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
