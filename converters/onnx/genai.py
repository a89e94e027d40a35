"""genai_config.json: what onnxruntime-genai wants to know of a decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edge_moe.converters.onnx.operations import Heads
from edge_moe.spec import ModelSpec

GENAI_CONFIG_NAME = "genai_config.json"
_TYPE = "decoder"
"""The generic type: names of MoE architectures are refused."""


def genai_config(
    spec: ModelSpec, heads: Heads, config: dict[str, Any], folder: Path, model_name: str
) -> str:
    """The text of genai_config.json for the graph `model_name`; `config` is config.json."""
    tokens = _special_tokens(config, folder)
    eos = tokens["eos_token_id"]
    first_eos = eos[0] if isinstance(eos, list) and eos else eos
    pad = tokens["pad_token_id"] if tokens["pad_token_id"] is not None else first_eos
    model = {
        "bos_token_id": tokens["bos_token_id"] if tokens["bos_token_id"] is not None else first_eos,
        "context_length": spec.max_position_embeddings,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": model_name,
            "head_size": heads.width,
            "hidden_size": spec.hidden_size,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
            "num_attention_heads": heads.num_query,
            "num_hidden_layers": spec.num_layers,
            "num_key_value_heads": heads.num_kv,
        },
        "eos_token_id": eos,
        "pad_token_id": pad,
        "type": _TYPE,
        "vocab_size": spec.vocab_size,
    }
    model = {key: value for key, value in model.items() if value is not None}
    search = {
        "do_sample": False,
        "max_length": spec.max_position_embeddings,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }
    return json.dumps({"model": model, "search": search}, indent=1) + "\n"


def _special_tokens(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Ids from generation_config.json, else from config.json."""
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = {name: generation.get(name, config.get(name)) for name in names}
    return {name: config.get(name) if value is None else value for name, value in found.items()}
