"""An ONNX decoder run by hand, and the transformers model with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from masked_routing import mask_routers
from reference_model import store_expert
from transformers import AutoModelForCausalLM

from edge_moe.checkpoint import Checkpoint
from edge_moe.formats import DROP
from edge_moe.onnx_folder import HEAD_NAME
from edge_moe.plan import Plan

FloatArray = npt.NDArray[np.float32]
RECURRENT = ("lfm2_moe", "qwen3_next", "qwen3_5_moe_text", "nemotron_h")
"""Families with layers that keep a fixed state."""
SPECIAL = ("granitemoe", "ernie4_5_moe", "gpt_oss", "phimoe", "gemma4_text")
"""Families whose decoder has parts of its own."""
_EMPTY = {"batch": 1, "past_tokens": 0}
PROMPT = np.random.default_rng(0).integers(1, 250, (1, 17))


def exact_error(family: str) -> float:
    """How far apart two computations in float32 may be, as a share of the largest logit.

    A gated delta net, which divides by the lengths of short vectors, is 3e-6 from float64 in
    transformers too. Gemma's scores are not divided by the root of the width: with heads of 512 it
    is 1e-5 from float64 there.
    """
    return 5e-5 if family in ("qwen3_next", "qwen3_5_moe_text", "gemma4_text") else 1e-5


def decode(
    path: Path, num_steps: int = 6, prompt: npt.NDArray[np.int64] = PROMPT
) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """Prefill of `prompt`, then greedy tokens over the cache: (all tokens, logits [T, V])."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session, head = (
        onnxruntime.InferenceSession(str(each), options, providers=["CPUExecutionProvider"])
        for each in (path, path.with_name(HEAD_NAME))
    )
    names = [output.name for output in session.get_outputs()]
    past = {
        value.name: np.zeros([_EMPTY.get(size, size) for size in value.shape], np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    tokens = new = prompt
    parts = []
    for _ in range(num_steps):
        feeds = {"input_ids": new, "attention_mask": np.ones_like(tokens), **past}
        found = dict(zip(names, session.run(None, feeds), strict=True))
        logits = found["logits"]
        if "hidden_states" in found:
            (logits,) = head.run(None, {"hidden_states": found["hidden_states"]})
            assert np.array_equal(logits[:, -1:].argmax(-1), found["logits"].argmax(-1))
        parts.append(logits[0])
        new = found["logits"][:, -1:].argmax(-1)
        tokens = np.concatenate([tokens, new], axis=1)
        past = {name: found[f"present.{name.partition('.')[2]}"] for name in past}
    return tokens, np.concatenate(parts)


def planned_model(plan: Plan, folder: Path) -> Any:
    """transformers' model with every expert as its form stores it, dropped ones masked out."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    checkpoint = Checkpoint(folder)
    spec = checkpoint.spec
    for layer_id, row in zip(plan.moe_layer_ids, plan.forms, strict=True):
        experts = model.get_submodule(spec.moe_module(layer_id)).experts
        for expert_id in plan.kept(row):
            store_expert(experts, checkpoint, layer_id, expert_id, row[expert_id])
    if any(DROP in row for row in plan.forms):
        mask_routers(model, plan, spec)
    return model


def reference_logits(model: Any, tokens: npt.NDArray[np.int64]) -> FloatArray:
    """[T, V] of every token but the last, in one pass without a cache."""
    with torch.no_grad():
        logits: FloatArray = model(torch.from_numpy(tokens[:, :-1])).logits[0].numpy()
    return logits


def relative_error(found: FloatArray, expected: FloatArray) -> float:
    """Largest difference as a share of the largest logit."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
