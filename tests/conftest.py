"""Shared fixtures: tiny random checkpoints of every supported family, and the demo model."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: spinning threads stall
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before triton loads, which then runs kernels step by step
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tiny_models import make_tiny_checkpoint as make_tiny_checkpoint

FAMILY_NAMES = ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral", "deepseek_v3")
"""Families on which every module is tested; `test_families.py` takes all of them."""

TinyCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """`tiny_checkpoint(family, wide=False)`: folder of a session-cached tiny bf16 checkpoint.

    hidden_size and expert width are 64, or 256 with `wide=True` so that 256-weight blocks fit.
    """

    @cache
    def build(family: str, wide: bool = False) -> Path:
        folder = tmp_path_factory.mktemp(f"{family}-{'wide' if wide else 'tiny'}")
        return make_tiny_checkpoint(folder, family, width=256 if wide else 64)

    return build


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Folder of the embedded demo model."""
    from edge_moe.demo import demo_model_dir

    return demo_model_dir()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler, which a process in the background of a shell starts without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
