"""The probe behind `edge_moe.overhead`: a minimal model through the whole runtime.

python -m edge_moe.runtime.overhead make FOLDER MODEL_TYPE    write the minimal checkpoint
python -m edge_moe.runtime.overhead measure FOLDER DEVICE     run it, print its peak as JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_PROMPT = "edge-moe " * 16

_COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_EXTRA: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "head_dim": 16},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 64},
    "olmoe": {"num_experts": 4},
    "mixtral": {"num_local_experts": 4},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
    },
}


def make(folder: Path, model_type: str) -> None:
    """Write a random two-layer checkpoint of `model_type` with a byte tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    config = AutoConfig.for_model(model_type, **_COMMON, **_EXTRA[model_type])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    vocab = {"<|endoftext|>": 0}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[symbol] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)


def measure(folder: Path, device: str) -> int:
    """Peak bytes of a process that generated with the minimal model, less the model's own."""
    import rich.console  # noqa: F401  what the command line has loaded as well
    import typer  # noqa: F401

    from edge_moe.runtime.memory import peak_memory_bytes
    from edge_moe.runtime.session import Session

    with Session.open(folder, device=device, context_tokens=256) as session:
        session.generate_ids(session.prompt_ids(_PROMPT), 8, stop_at_eos=False)
        own = sum(term.num_bytes for term in session.memory() if term.name != "runtime")
        return peak_memory_bytes(device) - own


def main(arguments: list[str]) -> None:
    """Dispatch on the first argument."""
    verb, folder, what = arguments
    if verb == "make":
        make(Path(folder), what)
        return
    print(json.dumps({"overhead_bytes": measure(Path(folder), what)}))


if __name__ == "__main__":
    main(sys.argv[1:])
