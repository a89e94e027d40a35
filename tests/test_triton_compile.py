"""Every Triton kernel compiles, ahead of time and without a GPU, for the GPUs it is made for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need the extra `cuda`")

COMPILER = Path(__file__).with_name("triton_compiler.py")
ROOT = COMPILER.parent.parent
LEAST_SHARED_BYTES = 99 * 1024
"""What a program may take on every one of these GPUs (CUDA's programming guide: 8.6, 8.9, 12.0)."""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 120])
def test_kernels_compile_and_spill_no_register(architecture: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, str(COMPILER), str(architecture)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {each["kernel"] for each in found} == {
        "decode_kernel",
        "prefill_kernel",
        "add_weighted_kernel",
    }
    for each in found:
        assert each["architecture"] == [str(architecture)], each
        assert each["cubin_bytes"] > 0, each
        assert each["registers"] <= 255 and each["stack_bytes"] == 0, each
        assert each["shared_bytes"] <= LEAST_SHARED_BYTES, each


def test_every_form_is_compiled_for_some_architecture() -> None:
    from triton_compiler import ALONE, MIXED

    from edge_moe.runtime.kernels.triton_forms import TRITON_FORMS

    assert {*MIXED, *(form for forms in ALONE.values() for form in forms)} == TRITON_FORMS
