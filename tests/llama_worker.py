"""Runs llama.cpp in a process of its own: a file it does not like aborts the whole process.

usage: python llama_worker.py MODEL.gguf REQUEST.json ANSWER.npz
REQUEST holds "ids" (token ids to evaluate), "texts" (to tokenise) and "lora" (path of an adapter,
or null); ANSWER gets "logits" and "tokens" (JSON).
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class LlamaAnswer:
    logits: npt.NDArray[np.float32]
    """[T, V]."""
    tokens: list[list[int]]
    """Ids of every text, with the special tokens that the file asks for."""
    metadata: dict[str, str]


def ask_llama(
    model: Path,
    work: Path,
    ids: list[int],
    texts: list[str] | None = None,
    lora: Path | None = None,
) -> LlamaAnswer:
    """Load `model` in a new process; fails the test with llama.cpp's own words."""
    request, answer = work / "request.json", work / "answer.npz"
    adapter = str(lora) if lora else None
    request.write_text(json.dumps({"ids": ids, "texts": texts or [], "lora": adapter}))
    command = [sys.executable, __file__, str(model), str(request), str(answer)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr[-2000:]
    with np.load(answer) as found:
        return LlamaAnswer(
            found["logits"],
            json.loads(str(found["tokens"])),
            json.loads(str(found["metadata"])),
        )


def _main(model: str, request_path: str, answer_path: str) -> None:
    from llama_cpp import Llama

    request: dict[str, Any] = json.loads(Path(request_path).read_text())
    llama = Llama(
        model,
        n_ctx=128,
        n_batch=128,
        n_threads=1,
        logits_all=True,
        flash_attn=False,
        type_k=0,  # float32
        type_v=0,
        lora_path=request["lora"],
        verbose=True,
    )
    llama.eval(request["ids"])
    np.savez(
        answer_path,
        logits=np.array(llama.scores[: len(request["ids"])], dtype=np.float32),
        tokens=json.dumps([llama.tokenize(t.encode(), special=True) for t in request["texts"]]),
        metadata=json.dumps(llama.metadata),
    )


if __name__ == "__main__":
    _main(*sys.argv[1:])
