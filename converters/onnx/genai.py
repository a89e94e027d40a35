"""genai_config.json: what onnxruntime-genai wants to know of a decoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.onnx.states import State, past_name, present_name
from edge_moe.errors import CheckpointError
from edge_moe.json_files import read_json

GENAI_CONFIG_NAME = "genai_config.json"
_TYPE, _CONVOLUTION_TYPE = "decoder", "lfm2"
"""The generic type, for names of MoE architectures are refused; and the one whose layers may keep
the window of a convolution and nothing else."""


def genai_config(
    checkpoint: Checkpoint,
    states: Sequence[State],
    config: dict[str, Any],
    model_name: str,
    context_tokens: int,
) -> str:
    """The text of genai_config.json for the graph `model_name`; `config` is config.json.

    `context_length` is what the model was made for. onnxruntime-genai's cache is as long as
    `max_length`, so that is the plan's `context_tokens`, which its bill counts. Where layers have
    heads of several shapes, onnxruntime-genai reads them from the graph.
    """
    spec = checkpoint.spec
    tokens = _special_tokens(config, checkpoint.folder)
    kinds = list(dict.fromkeys(state.kind for state in states))
    eos = tokens["eos_token_id"]
    first_eos = eos[0] if isinstance(eos, list) and eos else eos
    pad = tokens["pad_token_id"] if tokens["pad_token_id"] is not None else first_eos
    model = {
        "bos_token_id": tokens["bos_token_id"] if tokens["bos_token_id"] is not None else first_eos,
        "context_length": spec.max_position_embeddings,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": model_name,
            "head_size": spec.query_width // spec.num_attention_heads,
            "hidden_size": spec.hidden_size,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                **{f"past_{kind}_names": past_name(kind) for kind in kinds},
            },
            "outputs": {
                "logits": "logits",
                **{f"present_{kind}_names": present_name(kind) for kind in kinds},
            },
            "num_attention_heads": spec.num_attention_heads,
            "num_hidden_layers": spec.num_layers,
            "num_key_value_heads": spec.num_kv_heads,
            **_convolutions(states, spec.num_layers),
        },
        "eos_token_id": eos,
        "pad_token_id": pad,
        "type": _CONVOLUTION_TYPE if _has_convolutions_only(states) else _TYPE,
        "vocab_size": spec.vocab_size,
    }
    model = {key: value for key, value in model.items() if value is not None}
    search = {
        "do_sample": False,
        "max_length": min(context_tokens, spec.max_position_embeddings),
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


def _has_convolutions_only(states: Sequence[State]) -> bool:
    """Besides keys and values."""
    kinds = {state.kind for state in states}
    return "conv" in kinds and "recurrent" not in kinds


def _convolutions(states: Sequence[State], num_layers: int) -> dict[str, Any]:
    """What the type for convolutions wants to know more."""
    if not _has_convolutions_only(states):
        return {}
    windows = {state.layer: state.shape[-1] for state in states if state.kind == "conv"}
    types = ["conv" if layer in windows else "full_attention" for layer in range(num_layers)]
    return {"layer_types": types, "conv_cache_size": max(windows.values())}


def _special_tokens(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Ids from generation_config.json, else from config.json."""
    path = folder / "generation_config.json"
    generation = {}
    if path.is_file():
        missing = f"{path} was removed: download it again"
        generation = read_json(path, CheckpointError, missing=missing, damaged="download it again")
    if not isinstance(generation, dict):
        raise CheckpointError(f"{path} holds no JSON object: download it again")
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = {name: generation.get(name, config.get(name)) for name in names}
    tokens = {name: config.get(name) if value is None else value for name, value in found.items()}
    for name, value in tokens.items():
        ids = value if isinstance(value, list) else [value]
        if value is not None and not all(type(each) is int for each in ids):
            raise CheckpointError(
                f"{folder}: {name} is {value!r}, no token id: download generation_config.json and "
                "config.json again"
            )
    return tokens
