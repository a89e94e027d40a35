"""Compile the Triton kernels for a GPU that need not be there: `triton_compiler.py 80` for sm_80.

Prints JSON: what every compiled kernel takes, as NVIDIA's cuobjdump reads it from the cubin.
Runs in a process of its own, since Triton decides when it is imported whether it compiles.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from edge_moe.runtime.kernels import triton_decode, triton_prefill, triton_sum
from edge_moe.runtime.triton_products import DEVICE_SIZES

MIXED = ("q4_0", "q8_0", "tq2_0")
"""What every architecture is asked for, in one launch."""
ALONE = {
    80: ("q4_k", "q6_k"),
    86: ("q3_k", "q5_k"),
    89: ("q2_k", "tq1_0"),
    90: ("q4_k", "bf16"),
    120: ("q2_0", "f16"),
}
"""By architecture: forms whose kernels are also compiled, so that every form is somewhere."""
ROWS, WIDTH = 768, 2048


class Case(NamedTuple):
    """One kernel as it is launched."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]


def decode_case(forms: tuple[str, ...], is_gated: bool, dtype: str = "bf16") -> Case:
    return Case(
        triton_decode.decode_kernel,
        {"inputs": f"*{dtype}", "table": "*i64", "outputs": f"*{dtype}", "num_pairs": "i32"},
        {
            "NUM_ROWS": ROWS,
            "WIDTH": WIDTH,
            "FORMS": forms,
            "IS_GATED": is_gated,
            "TILE_ROWS": DEVICE_SIZES.decode_rows,
            "STEP_BYTES": DEVICE_SIZES.decode_step_bytes,
        },
        {"num_warps": triton_decode.NUM_WARPS},
    )


def prefill_case(forms: tuple[str, ...], is_gated: bool, dtype: str = "bf16") -> Case:
    return Case(
        triton_prefill.prefill_kernel,
        {
            "inputs": f"*{dtype}",
            "tokens": "*i64",
            "tiles": "*i64",
            "outputs": f"*{dtype}" if is_gated else "*fp32",
            "num_tiles": "i32",
        },
        {
            "NUM_ROWS": ROWS,
            "WIDTH": WIDTH,
            "FORMS": forms,
            "IS_GATED": is_gated,
            "TILE_PAIRS": DEVICE_SIZES.prefill_pairs,
            "TILE_ROWS": DEVICE_SIZES.prefill_rows // (1 + is_gated),
            "STEP_BYTES": DEVICE_SIZES.prefill_step_bytes,
        },
        {"num_warps": triton_prefill.NUM_WARPS, "num_stages": triton_prefill.NUM_STAGES},
    )


def sum_case() -> Case:
    integers = dict.fromkeys(("first", "num_results", "num_columns"), "i32")
    pointers = {"outputs": "*fp32", "results": "*fp32", "places": "*i64", "scales": "*fp32"}
    constants = {"TOP_K": 8, "TILE_COLUMNS": triton_sum.TILE_COLUMNS}
    return Case(triton_sum.add_weighted_kernel, pointers | integers, constants, {})


def cases(architecture: int) -> Iterator[Case]:
    """What is compiled for sm_`architecture`."""
    yield sum_case()
    for is_gated in (False, True):
        yield decode_case(MIXED, is_gated)
        yield prefill_case(MIXED, is_gated)
    for form in ALONE[architecture]:
        yield decode_case((form,), True)
        yield prefill_case((form,), False)
    if architecture == 80:
        yield prefill_case(("q8_0",), True, "fp32")
        yield prefill_case(("q8_0",), True, "fp16")


def compiled(case: Case, architecture: int) -> dict[str, Any]:
    """Compile a case; registers, stack (to which registers spill) and shared memory."""
    names = case.kernel.arg_names
    types = case.types | dict.fromkeys(case.constants, "constexpr")
    aligned = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=case.kernel,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(place,): aligned for place, name in enumerate(names) if "*" in types[name]},
    )
    options = case.options | {"enable_fp_fusion": True}
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    used = resource_usage(binary.asm["cubin"])
    return {
        "kernel": case.kernel.__name__,
        "forms": case.constants.get("FORMS", ()),
        "is_gated": case.constants.get("IS_GATED"),
        "dtype": case.types["outputs"],
        "architecture": re.findall(r"\.target sm_(\d+)", binary.asm["ptx"]),
        "cubin_bytes": len(binary.asm["cubin"]),
        "registers": used["REG"],
        "stack_bytes": used["STACK"],
        "shared_bytes": max(used["SHARED"], binary.metadata.shared),
    }


def resource_usage(cubin: bytes) -> dict[str, int]:
    """`cuobjdump --dump-resource-usage`, which triton brings."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), "--dump-resource-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", shown)}


if __name__ == "__main__":
    asked = int(sys.argv[1])
    print(json.dumps([compiled(case, asked) for case in cases(asked)]))
