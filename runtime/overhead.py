"""The probe behind `edge_moe.overhead`: a minimal model through the whole runtime.

python -m edge_moe.runtime.overhead make FOLDER MODEL_TYPE    write the minimal checkpoint
python -m edge_moe.runtime.overhead measure FOLDER DEVICE     run it, print its peak as JSON

MODEL_TYPE and DEVICE `gguf`: a minimal GGUF file, and llama.cpp.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random
from string import ascii_letters
from typing import TYPE_CHECKING

from edge_moe.budget import ALLOCATOR_BYTES
from edge_moe.gguf_header import DEFAULT_ALIGNMENT
from edge_moe.gguf_raw import RawTensor, header_bytes, number_key, offsets, string_key
from edge_moe.minimal_model import minimal_config

if TYPE_CHECKING:
    from edge_moe.runtime.text_session import TextSession

_PROMPT = "edge-moe " * 16
_SESSIONS, _ANSWERS = 3, 20
_WIDTH = 64
_EXPERTS = 4
_LAYER = {
    "attn_norm": (_WIDTH,),
    "attn_q": (_WIDTH, _WIDTH),
    "attn_k": (_WIDTH, _WIDTH),
    "attn_v": (_WIDTH, _WIDTH),
    "attn_output": (_WIDTH, _WIDTH),
    "attn_q_norm": (_WIDTH,),
    "attn_k_norm": (_WIDTH,),
    "ffn_norm": (_WIDTH,),
    "ffn_gate_inp": (_EXPERTS, _WIDTH),
    "ffn_gate_exps": (_EXPERTS, _WIDTH, _WIDTH),
    "ffn_up_exps": (_EXPERTS, _WIDTH, _WIDTH),
    "ffn_down_exps": (_EXPERTS, _WIDTH, _WIDTH),
}
"""Of one head."""
_NUMBERS: dict[str, int | float] = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": _WIDTH,
    "feed_forward_length": _WIDTH,
    "expert_feed_forward_length": _WIDTH,
    "attention.head_count": 1,
    "attention.head_count_kv": 1,
    "attention.key_length": _WIDTH,
    "attention.value_length": _WIDTH,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "expert_count": _EXPERTS,
    "expert_used_count": 2,
    "vocab_size": _WIDTH,
}


def make(folder: Path, model_type: str) -> None:
    """Write a random checkpoint of `model_type` with a byte tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    config = AutoConfig.for_model(model_type, **minimal_config(model_type, num_experts=4))
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


def make_gguf(folder: Path) -> None:
    """Write `model.gguf`: Qwen3-MoE of two layers, without a vocabulary, all weights zero."""
    tensors = [RawTensor("token_embd.weight", (_WIDTH, _WIDTH), "F32")]
    for layer in range(2):
        tensors += [
            RawTensor(f"blk.{layer}.{name}.weight", shape, "F32") for name, shape in _LAYER.items()
        ]
    tensors.append(RawTensor("output_norm.weight", (_WIDTH,), "F32"))
    keys = [string_key("general.architecture", "qwen3moe")]
    keys.append(string_key("tokenizer.ggml.model", "no_vocab"))
    keys += [number_key(f"qwen3moe.{name}", value) for name, value in _NUMBERS.items()]
    header = header_bytes(keys, tensors, DEFAULT_ALIGNMENT)
    *_, data_bytes = offsets(tensors, DEFAULT_ALIGNMENT)
    with (folder / "model.gguf").open("wb") as handle:
        handle.write(header)
        handle.truncate(len(header) + data_bytes)


def measure_gguf(folder: Path) -> int:
    """As `measure`, of a process with llama.cpp."""
    import rich.progress  # noqa: F401  what the command line has loaded as well
    import typer.rich_utils  # noqa: F401

    import edge_moe.runtime.evaluate  # noqa: F401
    from edge_moe.measurement import Provenance
    from edge_moe.runtime.gguf_session import GgufSession
    from edge_moe.runtime.memory import peak_memory_bytes

    with GgufSession.open(folder / "model.gguf", context_tokens=64, num_slots=2) as session:
        session.generate_ids([1] * 16, 8, stop_at_eos=False)
        Provenance.here().model_dump_json(indent=1)
        own = sum(term.num_bytes for term in session.memory() if term.name != "runtime")
        return peak_memory_bytes() - own


def measure(folder: Path, device: str) -> int:
    """Peak bytes of a process that was asked often, by the minimal model, less the model's own.

    Later sessions and other texts touch more of the libraries, and leave holes: 3 to 5 MB beyond
    the first answer, after which nothing more was seen to come.
    """
    import rich.console  # noqa: F401  what the command line has loaded as well
    import typer  # noqa: F401

    from edge_moe.runtime.memory import peak_memory_bytes
    from edge_moe.runtime.session import Session

    for _ in range(_SESSIONS):
        with Session.open(folder, device=device, context_tokens=256) as session:
            session.generate_ids(session.prompt_ids(_PROMPT), 8, stop_at_eos=False)
            for seed in range(_ANSWERS):
                _answer(session, seed)
            own = sum(term.num_bytes for term in session.memory() if term.name != "runtime")
    # of a minimal model's activations the allocator keeps next to nothing
    return peak_memory_bytes(device) - (own - ALLOCATOR_BYTES)


def _answer(session: TextSession, seed: int) -> None:
    """Every other one drawn at random; texts of 1 to 210 tokens, answers of 1 to 12."""
    text = "".join(Random(seed).choices(ascii_letters + "    \n", k=11 * seed + 1))
    heat = 0.8 * (seed % 2)
    answer = session.generate(
        text, max_new_tokens=1 + seed % 12, temperature=heat, top_p=0.95, seed=seed
    )
    for _ in answer:
        pass


def main(arguments: list[str]) -> None:
    """Dispatch on the first argument."""
    verb, folder, what = arguments
    if verb == "make":
        make_gguf(Path(folder)) if what == "gguf" else make(Path(folder), what)
        return
    found = measure_gguf(Path(folder)) if what == "gguf" else measure(Path(folder), what)
    print(json.dumps({"overhead_bytes": found}))


if __name__ == "__main__":
    main(sys.argv[1:])
