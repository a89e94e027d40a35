"""The preallocated cache holds what transformers' own would, in one buffer per layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyCheckpoint, make_tiny_checkpoint
from reference_model import TOKENS, load, logits
from transformers import AutoModelForCausalLM, DynamicCache

from edge_moe.errors import InputError
from edge_moe.runtime.kv_cache import PreallocatedLayer, make_cache
from edge_moe.runtime.session import Session


def test_steps_append_in_place() -> None:
    layer, whole = PreallocatedLayer(5), torch.arange(40.0).view(1, 2, 5, 4)
    for start, end in ((0, 3), (3, 4), (4, 5)):
        keys, values = layer.update(whole[:, :, start:end], -whole[:, :, start:end])
        assert torch.equal(keys, whole[:, :, :end]) and torch.equal(values, -keys)
        assert layer.get_seq_length() == end
    assert keys.untyped_storage().nbytes() == whole.numel() * 4
    with pytest.raises(InputError, match="6 tokens exceed the context of 5"):
        layer.update(whole[:, :, :1], whole[:, :, :1])


def test_logits_are_those_of_transformers_own_cache(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("qwen3_moe")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(3, 43)[None]
    found = []
    for cache in (DynamicCache(config=model.config), make_cache(model.config, 64)):
        with torch.inference_mode():
            model(input_ids=ids[:, :30], past_key_values=cache, use_cache=True)
            found.append(model(input_ids=ids[:, 30:], past_key_values=cache, use_cache=True).logits)
    assert torch.equal(*found)


def test_sliding_layers_stay_transformers_own(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", "mixtral", sliding_window=8)
    with Session.open(folder, context_tokens=64) as session:
        cache = make_cache(session.model.config, 64)
        assert not any(isinstance(layer, PreallocatedLayer) for layer in cache.layers)
        prompt = list(range(3, 30))
        found = session.generate_ids(prompt, 10, stop_at_eos=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    wanted = model.generate(
        torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None
    )
    assert found == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["minimax_m2", "granitemoe", "olmoe"])
def test_families_without_windows_forget_nothing(family: str, tmp_path: Path) -> None:
    """transformers in one pass: its own cache makes sliding layers of the key that they ignore."""
    folder = make_tiny_checkpoint(tmp_path / "model", family, sliding_window=8)
    with Session.open(folder, context_tokens=320) as session:
        found = session.logits(TOKENS)
    np.testing.assert_allclose(found, logits(load(folder)), atol=1e-4)
