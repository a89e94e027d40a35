"""The embedded demo model: a small mixture of experts, and the six tasks it was trained on.

Everything here only finds shipped files; nothing imports torch. The modules beside this file
rebuild those files from public sources (`corpus`, `tokenizer`, `train`, `build_assets`).
"""

from __future__ import annotations

from pathlib import Path

from edge_moe.errors import InputError

ASSETS_DIR = Path(__file__).resolve().parent / "assets"


def demo_model_dir() -> Path:
    """The shipped checkpoint: config.json, bf16 safetensors and the tokenizer."""
    return ASSETS_DIR / "model"


def task_names() -> tuple[str, ...]:
    """Names of the shipped tasks, sorted."""
    found = (ASSETS_DIR / "tasks").glob("*/task.json")
    return tuple(sorted(path.parent.name for path in found))


def task_dir(name: str) -> Path:
    """Folder of one task: task.json, calibration.jsonl and heldout.jsonl."""
    known = task_names()
    if name not in known:
        raise InputError(f"no demo task is called {name!r}; known tasks: {', '.join(known)}")
    return ASSETS_DIR / "tasks" / name
