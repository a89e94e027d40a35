"""Programs that users run GGUF files with, each in a process of its own: both bring a llama.cpp.

usage: python client_worker.py llama_cpp|xllamacpp MODEL.gguf REQUEST.json
REQUEST is the body of an OpenAI-style chat completion; the reply is printed as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

CONTEXT_TOKENS = 128


def ask_client(client: str, model: Path, request: dict[str, Any], work: Path) -> dict[str, Any]:
    """The reply of `client`; fails the test with the program's own words."""
    path = work / "request.json"
    path.write_text(json.dumps(request))
    command = [sys.executable, __file__, client, str(model), str(path)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr[-2000:]
    reply: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return reply


def _llama_cpp(model: str, request: dict[str, Any]) -> Any:
    """llama-cpp-python as installed, with its defaults: it finds the chat template itself."""
    from llama_cpp import Llama

    return Llama(model, n_ctx=CONTEXT_TOKENS, n_threads=1, verbose=False).create_chat_completion(
        **request
    )


def _xllamacpp(model: str, request: dict[str, Any]) -> Any:
    """xllamacpp's server, asked over HTTP."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx = CONTEXT_TOKENS
    params.cpuparams.n_threads = 1
    params.port = 0  # any that is free
    server = xllamacpp.Server(params)
    call = urllib.request.Request(
        f"{server.listening_address}/v1/chat/completions",
        json.dumps(request).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(call, timeout=60) as reply:
        return json.load(reply)


def _main(client: str, model: str, request_path: str) -> None:
    request = json.loads(Path(request_path).read_text())
    reply = {"llama_cpp": _llama_cpp, "xllamacpp": _xllamacpp}[client](model, request)
    print(json.dumps(reply))


if __name__ == "__main__":
    _main(*sys.argv[1:])
