"""The programs that users have: each gives the answer of transformers with the experts masked out.

The demo model is pruned to 12 of 16 experts, asked in the words of its chat template.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from client_worker import ask_client
from hand_plan import hand_plan, uniform_forms
from reference_model import load, masked

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import GGUF_NAME, build
from edge_moe.formats import DROP
from edge_moe.plan import Target
from edge_moe.runtime.tokenizer import load_tokenizer

NUM_KEPT = 12
MAX_TOKENS = 12
MESSAGES = [{"role": "user", "content": "What is 12 + 7?"}]


@dataclass(frozen=True)
class Pruned:
    """The demo model pruned, and what it must answer."""

    checkpoint: Checkpoint
    answer: str
    work: Path

    def built(self, target: Target, form: str) -> Path:
        """The output folder for `target`; built once."""
        output = self.work / target
        if not output.exists():
            forms = uniform_forms(self.checkpoint, NUM_KEPT, form)
            build(hand_plan(self.checkpoint, forms, target), output)
        return output


@pytest.fixture(scope="module")
def pruned(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    checkpoint = Checkpoint(demo_model)
    rows = uniform_forms(checkpoint, NUM_KEPT)
    dropped = {
        layer_id: [expert_id for expert_id, form in enumerate(row) if form == DROP]
        for layer_id, row in zip(checkpoint.spec.moe_layer_ids, rows, strict=True)
    }
    model, tokenizer = load(demo_model), load_tokenizer(demo_model)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    prompt = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with masked(model, checkpoint.spec, dropped):
        tokens = model.generate(prompt, max_new_tokens=MAX_TOKENS, do_sample=False)
    answer = tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)
    assert answer.strip()
    return Pruned(checkpoint, answer, tmp_path_factory.mktemp("pruned"))


@pytest.mark.parametrize("client", ["llama_cpp", "xllamacpp"])
def test_clients_of_gguf_files_chat(client: str, pruned: Pruned, tmp_path: Path) -> None:
    """Greedy, in float32: the same text, so template, tokenizer, weights and routers are right."""
    for package in ("gguf", client):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    request = {"messages": MESSAGES, "max_tokens": MAX_TOKENS, "temperature": 0.0}
    model = pruned.built("gguf", "f32") / GGUF_NAME
    reply = ask_client(client, model, request, tmp_path)
    assert reply["object"] == "chat.completion"
    assert reply["choices"][0]["message"]["role"] == "assistant"
    assert reply["choices"][0]["message"]["content"].strip() == pruned.answer.strip()


def test_a_pipeline_of_transformers_chats(pruned: Pruned) -> None:
    from transformers import pipeline

    folder = pruned.built("hf", "bf16")
    generator: Any = pipeline("text-generation", model=str(folder), dtype=torch.float32)
    options = {"max_new_tokens": MAX_TOKENS, "do_sample": False, "return_full_text": False}
    (reply,) = generator(MESSAGES, **options)
    assert reply["generated_text"] == pruned.answer
