"""Runs under transformers 4.57, which edge-moe itself does not support: imports nothing of it.

Reads one JSON list a line and answers with one JSON object a line:
    ["make", FAMILY, CONFIG.json, FOLDER]
    ["logits", FOLDER, TOKENS.json, ANSWER.npz]
`problem` in an answer is the reason why nothing was written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM


def make(family: str, config_path: str, folder: str) -> dict[str, Any]:
    """A random bfloat16 checkpoint of `family`, with the config.json that this version writes."""
    if family not in CONFIG_MAPPING:
        return {"problem": f"transformers {transformers.__version__} does not know {family}"}
    values: dict[str, Any] = json.loads(Path(config_path).read_text())
    config = AutoConfig.for_model(family, **values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.7, 1.3)
            else:
                parameter.normal_(0.0, 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    return {}


def logits(folder: str, tokens_path: str, answer: str) -> dict[str, Any]:
    """Logits [T, V] in float32, and the names that do not belong together."""
    tokens = json.loads(Path(tokens_path).read_text())
    pair: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, info = pair
    with torch.no_grad():
        found = model.eval()(torch.tensor([tokens])).logits[0].numpy()
    np.savez(answer, logits=found)
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return {key: sorted(str(name) for name in info[key]) for key in keys}


def _answer(verb: str, *arguments: str) -> dict[str, Any]:
    try:
        result = {"make": make, "logits": logits}[verb](*arguments)
    except Exception as error:  # whatever that version raises is its answer
        result = {"problem": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return {"version": transformers.__version__, **result}


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for line in sys.stdin:
        print(json.dumps(_answer(*json.loads(line))), flush=True)
