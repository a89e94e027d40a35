"""One run of one engine of `cuda_paging.py`, in a process of its own; prints JSON.

    python benchmarks/cuda_paging_worker.py ENGINE MODEL IDS VRAM_BYTES RAM_BYTES PROMPT_TOKENS

ENGINE: edge-moe, fetch and cpu (its --misses), llama.cpp, accelerate. Tokens are given, not
sampled: every engine computes the same.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import ctypes
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from paging_worker import Step, stepper

CONTEXT_TOKENS = 1024
ENGINES = ("edge-moe", "fetch", "cpu", "llama.cpp", "accelerate")
MARGIN_BYTES = 600_000_000
"""What llama.cpp's compute buffers and a CUDA context take of a cap, beside weights and cache."""

Facts = Callable[[], dict[str, Any]]


def native(engine: str, model: Path, vram_bytes: int, ram_bytes: int) -> tuple[Step, Facts]:
    """edge-moe's own engine, under the cap by its budget and by torch's."""
    import torch

    from edge_moe.runtime.session import Session

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, vram_bytes / total))
    session = Session.open(
        model,
        budget_bytes=vram_bytes,
        context_tokens=CONTEXT_TOKENS,
        device="cuda",
        ram_bytes=ram_bytes,
        misses="auto" if engine == "edge-moe" else "fetch" if engine == "fetch" else "cpu",
    )
    loop = session.new_loop()

    def facts() -> dict[str, Any]:
        cpu_misses = session._residency.pager.misses
        prices = cpu_misses.chooser.prices if cpu_misses is not None else None
        return {
            "paging": dataclasses.asdict(session.statistics()),
            "misses": session.misses,
            "kernels": session.kernels,
            "prices": None if prices is None else dataclasses.asdict(prices),
            "slot_bytes": session._residency.slots.num_bytes,
            "planned_bytes": sum(term.num_bytes for term in session.memory()),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
        }

    return lambda ids, start: loop.step(ids)[-1], facts


def llama_cpp(path: Path, vram_bytes: int) -> tuple[Step, Facts]:
    """llama.cpp with all layers on the GPU, but for the experts of as many as do not fit."""
    from llama_cpp import llama_cpp as llama

    from edge_moe.formats import ggml_library
    from edge_moe.gguf_model import GgufModel
    from edge_moe.measurement import usable_cores

    cpu_layers = cpu_moe_layers(GgufModel(path), vram_bytes)
    ggml = ggml_library.library()
    ggml.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p

    class Override(ctypes.Structure):
        _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))

    patterns = [f"^blk\\.{id_}\\.ffn_.*_exps".encode() for id_ in cpu_layers]
    cpu = ggml.ggml_backend_cpu_buffer_type()
    overrides = (Override * (len(patterns) + 1))(*(Override(each, cpu) for each in patterns))
    llama.llama_backend_init()
    options = llama.llama_model_default_params()
    options.n_gpu_layers = 1000
    options.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    model = llama.llama_model_load_from_file(os.fsencode(path), options)
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = CONTEXT_TOKENS, 512, 512
    settings.n_threads = settings.n_threads_batch = usable_cores()
    context = llama.llama_init_from_model(model, settings)
    if not context:
        raise SystemExit(f"llama.cpp cannot run {path} with {len(cpu_layers)} layers on the CPU")
    return stepper(llama, model, context), lambda: {"cpu_moe_layers": len(cpu_layers)}


def cpu_moe_layers(model: Any, vram_bytes: int) -> list[int]:
    """The first layers, as --n-cpu-moe counts them, whose experts do not fit under the cap."""
    from edge_moe.runtime.gguf_allotment import session_terms

    terms = {
        term.name: term.num_bytes for term in session_terms(model, CONTEXT_TOKENS, has_budget=False)
    }
    left = vram_bytes - MARGIN_BYTES - terms["dense weights"] - terms["KV cache"]
    left -= terms["workspace"]
    layers = sorted(model.layers)
    while layers:
        num_bytes = sum(info.num_bytes for info in model.layers[layers[-1]].stacks)
        if num_bytes > left:
            break
        left -= num_bytes
        layers.pop()
    return layers


def accelerate(model: Path, vram_bytes: int, ram_bytes: int) -> tuple[Step, Facts]:
    """transformers with accelerate's offload of whole modules, in the checkpoint's dtype."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, vram_bytes / total))
    network = AutoModelForCausalLM.from_pretrained(
        model,
        dtype="auto",
        device_map="auto",
        max_memory={0: vram_bytes - MARGIN_BYTES, "cpu": ram_bytes},
    ).eval()
    cache = DynamicCache(config=network.config)

    def step(ids: list[int], start: int) -> Any:
        with torch.inference_mode():
            inputs = torch.tensor([ids], device="cuda")
            output = network(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return output.logits[0, -1].float().cpu().numpy()

    def facts() -> dict[str, Any]:
        places = [str(place) for place in network.hf_device_map.values()]
        return {
            "modules_by_device": {place: places.count(place) for place in sorted(set(places))},
            "reserved_bytes": torch.cuda.max_memory_reserved(),
        }

    return step, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model", type=Path)
    parser.add_argument("ids", type=Path)
    for name in ("vram_bytes", "ram_bytes", "prompt_tokens"):
        parser.add_argument(name, type=int)
    asked = parser.parse_args()
    ids = np.load(asked.ids).tolist()
    import torch

    free_before = torch.cuda.mem_get_info()[0]
    start = time.perf_counter()
    if asked.engine == "llama.cpp":
        step, facts = llama_cpp(asked.model, asked.vram_bytes)
    elif asked.engine == "accelerate":
        step, facts = accelerate(asked.model, asked.vram_bytes, asked.ram_bytes)
    else:
        step, facts = native(asked.engine, asked.model, asked.vram_bytes, asked.ram_bytes)
    loaded = time.perf_counter()
    prompt, rest = ids[: asked.prompt_tokens], ids[asked.prompt_tokens :]
    step(prompt, 0)
    prefilled, seconds, chosen = time.perf_counter(), [], []
    for index, token in enumerate(rest):
        before = time.perf_counter()
        chosen.append(int(np.argmax(step([token], len(prompt) + index))))
        seconds.append(time.perf_counter() - before)
    half = len(seconds) // 2
    found = {
        "load_seconds": loaded - start,
        "prefill_tokens_per_second": len(prompt) / (prefilled - loaded),
        "decode_tokens_per_second": len(seconds) / sum(seconds),
        "warm_tokens_per_second": (len(seconds) - half) / sum(seconds[half:]),
        "vram_bytes": free_before - torch.cuda.mem_get_info()[0],
        "chosen": chosen,
        "facts": facts(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
