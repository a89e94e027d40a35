"""`benchmarks/triton_kernels.py`: what it times is right, and it says so where it cannot time."""

from __future__ import annotations

import sys

import pytest
import torch
import triton_kernels
from rich.console import Console

pytest.importorskip("triton", reason="the kernels need the extra `cuda`")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["q8_0", triton_kernels.MIXED])
def test_contenders_compute_the_same_on_a_small_layer(
    form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In Triton's interpreter where there is no GPU; the numbers are of no use there."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = triton_kernels.Shape(256, 256, 4, 2)
    row = triton_kernels.measure(form, 5, 1, device, shape=shape, slot_bytes=1)
    assert {name: len(each) for name, each in row.seconds.items()} == {
        triton_kernels.EXACT: 1,
        triton_kernels.TRITON: 1,
        triton_kernels.KERNELS: 1,
    }
    weights = 3 * 256 * 256
    assert row.operations == 2 * 5 * 2 * weights
    assert 2 * weights * 2.0625 / 8 <= row.packed_bytes <= 4 * weights * 8.5 / 8
    assert row.bound_seconds > 0
    triton_kernels.show([row], Console(width=150))
    assert form in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["triton_kernels.py"])
    with pytest.raises(SystemExit, match="finds no CUDA device"):
        triton_kernels.main()
