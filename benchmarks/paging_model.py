"""A GGUF of some gigabytes that is routed as the demo model is, for `paging.py`.

    python benchmarks/paging_model.py --folder /big/disk [--gigabytes 3.4]

The demo model (4 MoE layers, top 2 of 16 experts) reads held-out text of its tasks, token by
token. What its routers chose at one token is a pattern; every pattern that occurs becomes a token
of the big model, so that the sequence of patterns is a text for it. The big model has 24 layers of
64 experts, top 8: layer m chooses as the demo's layer m mod 4, each of the demo's experts standing
for four, under other numbers in every layer. A token's embedding holds 64 numbers that say which
experts the demo chose; routers look at these alone. All other weights are random, but those that
would write into these 64 numbers are zero. So the big model's routing is the demo's, exactly, with
its counts, reuse distances and transitions, which is checked on the first tokens; its text is
nonsense.

That alone would let a layer's input tell the next layer's choice without fail. In the demo, the
next router asked about this layer's input names 59 % of what it then chooses: so each layer's norm
hides 7 of the 16 numbers that the next layer looks at, and 56 % can be told.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_moe.demo import task_names
from edge_moe.files import require_free_disk, write_text
from edge_moe.gguf_raw import RawTensor, header_bytes, number_key, offsets, string_key
from edge_moe.tasks import task_windows

NUM_LAYERS, NUM_EXPERTS, TOP_K = 24, 64, 8
HIDDEN, HEADS, KV_HEADS, HEAD_WIDTH = 1024, 16, 4, 64
COPIES = 4
"""Experts of the big model for one of the demo's."""
ALIGNMENT = 32
TEXT_NAME, FACTS_NAME = "text.npy", "routing.json"
TRACED_TOKENS = 1024
NUM_HIDDEN = 7
"""Of the 16 numbers that the next layer looks at."""
_LAYERS, _EXPERTS = 4, 16
"""Of the demo."""
_SURE, _NOISE = 8.0, 1e-3
_BLOCK = 32
_WINDOW_TOKENS = 256

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Routing:
    """What the demo model chose."""

    rows: Rows
    """[N, 4, 2] experts at every token, ascending."""

    def patterns(self) -> tuple[Rows, Rows]:
        """(distinct patterns [V, 4, 2], which of them every token has [N])."""
        flat = self.rows.reshape(len(self.rows), -1)
        found, index = np.unique(flat, axis=0, return_inverse=True)
        return found.reshape(-1, *self.rows.shape[1:]), index.reshape(-1)


def demo_routing(max_windows: int = 2) -> Routing:
    """The demo model on held-out text of all its tasks, one task after the other."""
    from edge_moe.runtime.session import Session

    rows = []
    with Session.open(Path(str(files("edge_moe.demo") / "assets" / "model"))) as session:
        for task in task_names():
            windows = task_windows(
                [task], "heldout", session.tokenizer, _WINDOW_TOKENS, max_windows
            )
            for window in windows:
                with session.tracing() as recorder:
                    session.logits(window)
                trace = recorder.finish(session.trace_info())
                rows.append(np.sort(trace.rows.astype(np.int64), axis=2))
    return Routing(np.concatenate(rows))


def renumbered(layer: int) -> Rows:
    """[16, 4] the experts of `layer` that stand for each of the demo's."""
    order = np.random.default_rng(1000 + layer).permutation(NUM_EXPERTS)
    return order.reshape(_EXPERTS, COPIES)


def embedding(patterns: Rows) -> npt.NDArray[np.float32]:
    """[V, HIDDEN] what was chosen, in the first 64 columns; the rest random."""
    random = np.random.default_rng(0)
    values = random.normal(0, 1, (len(patterns), HIDDEN)).astype(np.float32)
    values[:, : _LAYERS * _EXPERTS] = 0
    for layer in range(_LAYERS):
        for place in range(patterns.shape[2]):
            columns = layer * _EXPERTS + patterns[:, layer, place]
            values[np.arange(len(patterns)), columns] = _SURE + place
    return values


def router(layer: int) -> npt.NDArray[np.float32]:
    """[64, HIDDEN] every expert looks at the number of the demo's expert that it stands for."""
    matrix = np.zeros((NUM_EXPERTS, HIDDEN), np.float32)
    for demo_expert, own in enumerate(renumbered(layer)):
        column = (layer % _LAYERS) * _EXPERTS + demo_expert
        for copy, expert in enumerate(own):
            matrix[expert, column] = 1 - 0.01 * copy
    return matrix


def block_norm(layer: int) -> npt.NDArray[np.float32]:
    """[HIDDEN] ones, but zero where the next layer's router looks and this one must not see."""
    weights = np.ones(HIDDEN, np.float32)
    hidden = np.random.default_rng(2000 + layer).permutation(_EXPERTS)[:NUM_HIDDEN]
    weights[(layer + 1) % _LAYERS * _EXPERTS + hidden] = 0
    return weights


def make(folder: Path, num_bytes: int) -> Path:
    """Write `paging.gguf` of about `num_bytes`, and beside it the text and how it is routed."""
    routing = demo_routing()
    patterns, text = routing.patterns()
    one = NUM_LAYERS * NUM_EXPERTS * 3 * HIDDEN * 18 // _BLOCK
    width = max(_BLOCK, round(num_bytes / one / _BLOCK) * _BLOCK)
    tensors = _tensors(len(patterns), width)
    keys = _keys(len(patterns), width)
    header = header_bytes(keys, tensors, ALIGNMENT)
    *_, data_bytes = offsets(tensors, ALIGNMENT)
    require_free_disk(folder, len(header) + data_bytes, "the benchmark model")
    path = folder / "paging.gguf"
    with path.open("wb") as handle:
        handle.write(header)
        for index, tensor in enumerate(tensors):
            start = handle.tell()
            for block in _content(tensor, patterns, index):
                handle.write(block)
            if handle.tell() - start != tensor.num_bytes:
                raise RuntimeError(f"{tensor.name}: {handle.tell() - start} bytes")
            handle.write(bytes(-handle.tell() % ALIGNMENT))
    np.save(folder / TEXT_NAME, text)
    traced = traced_rows(path, text[:TRACED_TOKENS])
    if not (traced == expected_rows(routing)[:TRACED_TOKENS]).all():
        raise RuntimeError(f"{path}: it is not routed as the demo model is")
    facts = {
        "num_tokens": len(text),
        "demo": statistics(routing.rows, _EXPERTS),
        "demo, the first tokens": statistics(routing.rows[:TRACED_TOKENS], _EXPERTS),
        "model, the first tokens": statistics(traced, NUM_EXPERTS),
    }
    write_text(folder / FACTS_NAME, json.dumps(facts, indent=1) + "\n")
    return path


def traced_rows(path: Path, token_ids: Rows) -> Rows:
    """[N, 24, 8] experts that llama.cpp chooses for a text, ascending; the whole model in RAM."""
    from edge_moe.runtime.gguf_session import GgufSession

    with GgufSession.open(path, context_tokens=len(token_ids), can_trace=True) as session:
        with session.tracing() as recorder:
            session.logits(token_ids.tolist())
        return np.sort(recorder.finish(session.trace_info()).rows.astype(np.int64), axis=2)


def _keys(vocab_size: int, width: int) -> list[bytes]:
    numbers: dict[str, int | float] = {
        "block_count": NUM_LAYERS,
        "context_length": 4096,
        "embedding_length": HIDDEN,
        "feed_forward_length": width,
        "expert_feed_forward_length": width,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_WIDTH,
        "attention.value_length": HEAD_WIDTH,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6,
        "expert_count": NUM_EXPERTS,
        "expert_used_count": TOP_K,
        "vocab_size": vocab_size,
    }
    names = [string_key("general.architecture", "qwen3moe"), string_key("general.name", "paging")]
    names.append(string_key("tokenizer.ggml.model", "no_vocab"))
    return [*names, *(number_key(f"qwen3moe.{name}", value) for name, value in numbers.items())]


def _tensors(vocab_size: int, width: int) -> list[RawTensor]:
    found = [
        RawTensor("token_embd.weight", (vocab_size, HIDDEN), "F32"),
        RawTensor("output.weight", (vocab_size, HIDDEN), "Q4_0"),
        RawTensor("output_norm.weight", (HIDDEN,), "F32"),
    ]
    queries, keys = HEADS * HEAD_WIDTH, KV_HEADS * HEAD_WIDTH
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "attn_norm": ((HIDDEN,), "F32"),
        "ffn_norm": ((HIDDEN,), "F32"),
        "attn_q_norm": ((HEAD_WIDTH,), "F32"),
        "attn_k_norm": ((HEAD_WIDTH,), "F32"),
        "attn_q": ((queries, HIDDEN), "Q4_0"),
        "attn_k": ((keys, HIDDEN), "Q4_0"),
        "attn_v": ((keys, HIDDEN), "Q4_0"),
        "attn_output": ((HIDDEN, queries), "Q4_0"),
        "ffn_gate_inp": ((NUM_EXPERTS, HIDDEN), "F32"),
        "ffn_gate_exps": ((NUM_EXPERTS, width, HIDDEN), "Q4_0"),
        "ffn_up_exps": ((NUM_EXPERTS, width, HIDDEN), "Q4_0"),
        "ffn_down_exps": ((NUM_EXPERTS, HIDDEN, width), "Q4_0"),
    }
    for layer in range(NUM_LAYERS):
        found += [
            RawTensor(f"blk.{layer}.{name}.weight", shape, kind)
            for name, (shape, kind) in shapes.items()
        ]
    return found


def _content(tensor: RawTensor, patterns: Rows, seed: int) -> Iterator[bytes]:
    if tensor.name == "token_embd.weight":
        yield embedding(patterns).tobytes()
    elif tensor.name.endswith("ffn_gate_inp.weight"):
        yield router(int(tensor.name.split(".")[1])).tobytes()
    elif tensor.name.endswith("ffn_norm.weight"):
        yield block_norm(int(tensor.name.split(".")[1])).tobytes()
    elif tensor.type_name == "F32":
        yield np.ones(tensor.shape, np.float32).tobytes()
    else:
        writes = tensor.name.endswith(("attn_output.weight", "ffn_down_exps.weight"))
        blocks_per_row = tensor.shape[-1] // _BLOCK
        for blocks in _random_q4_0(tensor.num_bytes // 18, _NOISE if writes else 0.02, seed):
            if writes:  # matrices [HIDDEN, ...], one after the other
                rows = blocks.first + np.arange(len(blocks.content))
                rows = rows // blocks_per_row % HIDDEN
                blocks.content[rows < _LAYERS * _EXPERTS, :2] = 0
            yield blocks.content.tobytes()


@dataclass(frozen=True)
class _Blocks:
    first: int
    content: npt.NDArray[np.uint8]
    """[B, 18] two bytes of scale, and 32 codes."""


def _random_q4_0(num_blocks: int, scale: float, seed: int) -> Iterator[_Blocks]:
    """Blocks of 32 random codes with one scale."""
    random, first = np.random.default_rng(seed), 0
    while first < num_blocks:
        count = min(num_blocks - first, 2**18)
        blocks = random.integers(0, 256, (count, 18), dtype=np.uint8)
        blocks[:, :2] = np.full(count, scale, np.float16).view(np.uint8).reshape(count, 2)
        yield _Blocks(first, blocks)
        first += count


def expected_rows(routing: Routing) -> Rows:
    """[N, 24, 8] what the big model is to choose, ascending."""
    layers = [
        renumbered(layer)[routing.rows[:, layer % _LAYERS]].reshape(-1, TOP_K)
        for layer in range(NUM_LAYERS)
    ]
    return np.sort(np.stack(layers, axis=1), axis=2)


def statistics(rows: Rows, num_experts: int) -> dict[str, float]:
    """Of choices [N, L, k]: how uneven, and how much a token repeats of the one before."""
    counts = np.stack(
        [
            np.bincount(rows[:, layer].ravel(), minlength=num_experts)
            for layer in range(rows.shape[1])
        ]
    )
    shares = np.sort(counts, axis=1)[:, ::-1] / counts.sum(axis=1, keepdims=True)
    entropy = -(shares * np.log(np.maximum(shares, 1e-12))).sum(axis=1)
    again = [
        len(np.intersect1d(rows[token, layer], rows[token - 1, layer])) / rows.shape[2]
        for token in range(1, len(rows))
        for layer in range(rows.shape[1])
    ]
    quarter = num_experts // 4
    return {
        "entropy_share": float(entropy.mean() / np.log(num_experts)),
        "share_of_busiest_quarter": float(shares[:, :quarter].sum(axis=1).mean()),
        "repeated_from_last_token": float(np.mean(again)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=3.4)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = make(arguments.folder, int(arguments.gigabytes * 1e9))
    print(json.dumps({"path": str(path), "bytes": path.stat().st_size}))


if __name__ == "__main__":
    main()
