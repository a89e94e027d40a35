"""What the split costs: perplexity of the dense model and of its experts, on held-out text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from edge_moe import metrics
from edge_moe.converters.upcycle.split_neurons import NeuronSplit
from edge_moe.metrics import Estimate, TokenScores
from edge_moe.runtime.evaluate import progress
from edge_moe.runtime.heldout import heldout_windows
from smollm2.convert import NEURONS_NAME
from smollm2.source import DenseModel

WINDOW_TOKENS = 256


@dataclass(frozen=True)
class Variant:
    """The experts, run in some way."""

    top_k: int
    refitted: bool
    """down_proj as in the checkpoint; otherwise as in the dense model."""

    @property
    def name(self) -> str:
        return f"top-{self.top_k}, {'as written' if self.refitted else 'dense down_proj'}"


@dataclass(frozen=True)
class Row:
    """One model on one task."""

    model: str
    task: str
    num_tokens: int
    perplexity: Estimate
    kld: Estimate | None
    """KL(dense || this), nats per token."""


def measure(
    dense: DenseModel, moe: Path, tasks: Sequence[str], max_windows: int, top_ks: Sequence[int]
) -> list[Row]:
    """Rows for the dense model and, for every top-k, the experts with dense and refitted down_proj.

    Memory: both models in float32 (0.54 GB each), down_proj once more, three windows of logits.
    """
    base = dense_model(dense)
    experts = _SwitchableExperts(dense, moe)
    variants = [Variant(top_k, refitted) for top_k in top_ks for refitted in (False, True)]
    rows = []
    for task in tasks:
        windows = heldout_windows(task, dense.tokenizer, WINDOW_TOKENS, max_windows)
        parts: dict[Variant, list[TokenScores]] = {variant: [] for variant in variants}
        with progress(task, len(windows)) as advance:
            for window in windows:
                base_logits = _logits(base, window)
                for variant, scores in parts.items():
                    experts.switch(variant)
                    logits = _logits(experts.model, window)
                    scores.append(metrics.compare_tokens(logits, base_logits, window))
                advance()
        joined = {variant: TokenScores.join(scores) for variant, scores in parts.items()}
        base_nll = joined[variants[0]].base_nll
        rows.append(Row("dense", task, base_nll.size, metrics.perplexity(base_nll), None))
        rows += [
            Row(
                variant.name,
                task,
                scores.nll.size,
                metrics.perplexity(scores.nll),
                metrics.mean_and_error(scores.kld),
            )
            for variant, scores in joined.items()
        ]
    return rows


def dense_model(dense: DenseModel) -> LlamaForCausalLM:
    """The whole dense model in float32."""
    with torch.device("meta"):
        model: LlamaForCausalLM = LlamaForCausalLM(dense.config)
    embedding = dense.embedding()
    state = {"model.embed_tokens.weight": embedding, "model.norm.weight": dense.final_norm()}
    for layer_id in range(dense.config.num_hidden_layers):
        tensors = dense.layer(layer_id).items()
        state |= {f"model.layers.{layer_id}.{name}": tensor for name, tensor in tensors}
    state["lm_head.weight"] = embedding
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(dense.config)  # its buffers are computed
    model.eval()
    return model


def read_split(moe: Path) -> list[NeuronSplit]:
    """Where every layer's neurons went."""
    layers = json.loads((moe / NEURONS_NAME).read_text(encoding="utf-8"))["layers"]
    return [
        NeuronSplit(torch.tensor(layer["shared"]), torch.tensor(layer["experts"]))
        for layer in layers
    ]


class _SwitchableExperts:
    """The checkpoint in transformers, with two down_proj to choose from."""

    def __init__(self, dense: DenseModel, moe: Path) -> None:
        self.model: nn.Module = AutoModelForCausalLM.from_pretrained(
            moe, dtype=torch.float32, local_files_only=True
        ).eval()
        self._blocks: list[Any] = [layer.mlp for layer in self.model.get_decoder().layers]
        self._refitted = [_down(block) for block in self._blocks]
        self._dense = [
            _split_down(dense.layer(layer_id)["mlp.down_proj.weight"], split)
            for layer_id, split in enumerate(read_split(moe))
        ]

    def switch(self, variant: Variant) -> None:
        downs = self._refitted if variant.refitted else self._dense
        for block, (shared, experts) in zip(self._blocks, downs, strict=True):
            block.gate.top_k = variant.top_k
            block.shared_expert.down_proj.weight.data.copy_(shared)
            block.experts.down_proj.data.copy_(experts)


def _down(block: Any) -> tuple[Tensor, Tensor]:
    shared = block.shared_expert.down_proj.weight.data.clone()
    return shared, block.experts.down_proj.data.clone()


def _split_down(down: Tensor, split: NeuronSplit) -> tuple[Tensor, Tensor]:
    """(shared [H, S], experts [E, H, I]), scaled as in `block_tensors`."""
    return 2 * down[:, split.shared], len(split.experts) * down[:, split.experts].movedim(1, 0)


def _logits(model: nn.Module, window: Sequence[int]) -> Any:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(window)]), use_cache=False).logits[0].numpy()
