"""The probe behind `edge_moe.overhead`: a minimal model through the whole runtime.

python -m edge_moe.runtime.overhead make FOLDER MODEL_TYPE    write the minimal checkpoint
python -m edge_moe.runtime.overhead measure FOLDER DEVICE     run it, print its peak as JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from edge_moe.minimal_model import minimal_config

_PROMPT = "edge-moe " * 16


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
