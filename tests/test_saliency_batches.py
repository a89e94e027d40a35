"""Sums and criteria do not depend on how text is batched, padded, ordered or cut into shards.

The other side is transformers' own model on padded batches, and sums formed from what its
hooks show with one-hot algebra over all experts. Letters: N real tokens, E experts, k top_k.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILY_NAMES, TinyCheckpoint
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.calibrate import calibrate
from edge_moe.saliency import CRITERIA, saliency
from edge_moe.spec import ModelSpec
from edge_moe.stats import EXPERT_SUMS, ExpertStats
from edge_moe.tasks import task_windows

WINDOW_TOKENS = 20
PADDING = 7
"""A token that the router knows as any other."""
TEXTS = {
    "tale": "It was the best of times, it was the worst of times, it was the age of wisdom.",
    "code": "def f(x):\n    return x + 1\n\ndef g(y):\n    return f(y) * 2\n",
    "list": "one two three four five six seven eight nine ten eleven twelve thirteen",
}
"""Each ends in a shorter window of its own length."""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tasks")
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_text(text)
    return [str(folder / f"{name}.txt") for name in TEXTS]


def run(
    model: Path, tasks: Sequence[str], output: Path, shard: tuple[int, int] = (0, 1)
) -> ExpertStats:
    return calibrate(
        *(model, tasks, output),
        window_tokens=WINDOW_TOKENS,
        shard=shard,
        forms=(),
        quantiser="nearest",
    )


@dataclass(frozen=True)
class _LayerTokens:
    """What one MoE layer did with every real token, float64."""

    logits: Tensor
    """[N, E] raw"""
    gates: Tensor
    """[N, E] the weights multiplied with, 0 where an expert was not chosen."""
    is_chosen: Tensor
    """[N, E]"""
    outputs: Tensor
    """[N, E, H] of every expert, chosen or not, before its weight."""
    before: Tensor
    """[N, H] residual stream that the MoE output is added to."""
    moe: Tensor
    """[N, H] output of the block, shared experts included."""
    after: Tensor
    """[N, H] residual stream behind the layer."""


class PaddedModel:
    """transformers' model, run on batches of windows padded to the longest, on either side."""

    def __init__(self, folder: Path) -> None:
        self.spec: ModelSpec = Checkpoint(folder).spec
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager"
        )

    def layers(self, batches: Sequence[Sequence[list[int]]], side: str) -> list[_LayerTokens]:
        """Every MoE layer over all batches."""
        parts = [self._layers(batch, side) for batch in batches]
        return [
            _LayerTokens(
                *(
                    torch.cat([getattr(part[row], name) for part in parts])
                    for name in _LayerTokens.__dataclass_fields__
                )
            )
            for row in range(self.spec.num_moe_layers)
        ]

    def _layers(self, windows: Sequence[list[int]], side: str) -> list[_LayerTokens]:
        real = [torch.ones(len(window), dtype=torch.bool) for window in windows]
        mask = pad_sequence(real, batch_first=True, padding_value=False, padding_side=side)
        ids = pad_sequence(
            [torch.tensor(window) for window in windows],
            batch_first=True,
            padding_value=PADDING,
            padding_side=side,
        )
        seen: dict[tuple[int, str], Tensor] = {}
        hooks = [hook for layer in self.spec.moe_layer_ids for hook in self._watch(layer, seen)]
        with torch.no_grad():
            self.model(ids, attention_mask=mask.long(), use_cache=False)
        for hook in hooks:
            hook.remove()
        return [self._tokens(layer, seen, mask) for layer in self.spec.moe_layer_ids]

    def _watch(self, layer_id: int, seen: dict[tuple[int, str], Tensor]) -> list[Any]:
        layer, block = self.model.model.layers[layer_id], self._block(layer_id)

        def keep(name: str, module: nn.Module, pick: Any) -> Any:
            def hook(_: nn.Module, inputs: Any, output: Any) -> None:
                seen[layer_id, name] = pick(inputs, output)

            return module.register_forward_hook(hook)

        return [
            keep("inputs", block, lambda inputs, _: inputs[0]),
            keep("moe", block, lambda _, output: output),
            keep("ids", block.experts, lambda inputs, _: inputs[1]),
            keep("weights", block.experts, lambda inputs, _: inputs[2]),
            keep("before", layer.post_attention_layernorm, lambda inputs, _: inputs[0]),
            keep("after", layer, lambda _, output: output),
        ]

    def _tokens(
        self, layer_id: int, seen: dict[tuple[int, str], Tensor], mask: Tensor
    ) -> _LayerTokens:
        real = mask.flatten()

        def tokens(name: str) -> Tensor:
            """[N, ...] without padding."""
            values = seen[layer_id, name]
            return values.reshape(len(real), -1)[real]

        ids, inputs = tokens("ids"), tokens("inputs")
        chosen = nn.functional.one_hot(ids, self.spec.num_experts).double()  # [N, k, E]
        return _LayerTokens(
            logits=inputs.double() @ self._block(layer_id).gate.weight.detach().double().T,
            gates=(chosen * tokens("weights").double()[:, :, None]).sum(dim=1),
            is_chosen=chosen.sum(dim=1),
            outputs=self._every_output(layer_id, inputs),
            before=tokens("before").double(),
            moe=tokens("moe").double(),
            after=tokens("after").double(),
        )

    def _block(self, layer_id: int) -> Any:
        return self.model.get_submodule(self.spec.moe_module(layer_id))

    def _every_output(self, layer_id: int, inputs: Tensor) -> Tensor:
        """[N, H] -> [N, E, H]"""
        experts = self._block(layer_id).experts
        with torch.no_grad():
            both = torch.einsum("nh,eih->nei", inputs, experts.gate_up_proj)
            gate, up = both.chunk(2, dim=-1)
            inner = nn.functional.silu(gate) * up
            outputs: Tensor = torch.einsum("nei,ehi->neh", inner, experts.down_proj)
        return outputs.double()


def expert_sums(seen: _LayerTokens, spec: ModelSpec) -> dict[str, Tensor]:
    """[E] each, keyed by `EXPERT_SUMS`: every sum a product with the matrix of choices."""
    norms = seen.outputs.square().sum(dim=2).sqrt()
    is_sigmoid = spec.router.score_function == "sigmoid"
    scores = 1 / (1 + (-seen.logits).exp()) if is_sigmoid else seen.logits.softmax(dim=1)
    after = seen.before + seen.moe
    lengths = seen.before.square().sum(1).sqrt() * after.square().sum(1).sqrt()
    shifts = 1 - (seen.before * after).sum(1) / lengths
    heaviest = (seen.gates == seen.gates.max(dim=1, keepdim=True).values).double()
    loudest = (seen.logits == seen.logits.max(dim=1, keepdim=True).values).double()
    per_token = {
        "gate": seen.gates,
        "output_norm": norms * seen.is_chosen,
        "output_square": norms**2 * seen.is_chosen,
        "gated_norm": seen.gates * norms,
        "gated_output_square": seen.gates * norms**2,
        "gated_square": (seen.gates * norms) ** 2,
        "shifted_norm": shifts[:, None] * seen.gates * norms,
        "router_score": scores * seen.is_chosen,
        "top_score": scores * heaviest,
        "top_logit": seen.logits * loudest,
    }
    return {name: values.sum(dim=0) for name, values in per_token.items()}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_padded_batches_give_the_sums_of_single_windows(
    family: str, tiny_checkpoint: TinyCheckpoint, tasks: list[str], tmp_path: Path
) -> None:
    folder = tiny_checkpoint(family)
    stats = run(folder, tasks, tmp_path / "stats")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = task_windows(tasks, "calibration", tokenizer, WINDOW_TOKENS)
    lengths = list(map(len, windows))
    assert len(windows) >= 6 and len(set(lengths)) >= 4
    padded = PaddedModel(folder)
    pairs = [windows[i : i + 2] for i in range(0, len(windows), 2)]
    for batches, side in (([windows], "right"), (pairs, "right"), ([windows], "left")):
        for row, seen in enumerate(padded.layers(batches, side)):
            assert len(seen.logits) == stats.info.num_tokens == sum(lengths)
            assert_layer(stats, row, seen, padded.spec)


def assert_layer(stats: ExpertStats, row: int, seen: _LayerTokens, spec: ModelSpec) -> None:
    expected = expert_sums(seen, spec)
    assert expected.keys() == set(EXPERT_SUMS)
    np.testing.assert_array_equal(stats.routed_tokens[row], seen.is_chosen.sum(dim=0))
    for name, values in expected.items():
        rtol = 1e-3 if name == "shifted_norm" else 2e-5  # 1 - cos is small: float32 loses digits
        found = stats.expert_sums[name].values()[row]
        np.testing.assert_allclose(found, values, rtol=rtol, atol=1e-9, err_msg=name)
    largest = (seen.outputs.abs().amax(dim=2) * seen.is_chosen).amax(dim=0)
    np.testing.assert_allclose(stats.max_output[row], largest, rtol=2e-5)
    for name, values in {"moe_square": seen.moe, "residual_square": seen.after}.items():
        found = stats.layer_sums[name].values()[row]
        np.testing.assert_allclose(found, values.square().sum(), rtol=2e-5, err_msg=name)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_order_and_grouping_of_windows_change_no_bit(
    family: str, tiny_checkpoint: TinyCheckpoint, tasks: list[str], tmp_path: Path
) -> None:
    """Other orders of the same windows, in one run or in shards joined in any order."""
    folder = tiny_checkpoint(family)
    whole = run(folder, tasks, tmp_path / "whole")
    backwards = run(folder, tasks[::-1], tmp_path / "backwards")
    assert whole.info.data_fingerprint != backwards.info.data_fingerprint
    runs = [backwards]
    for order, count in ((tasks, 3), (tasks[::-1], 2)):
        name = f"{count}-shards"
        shards = [run(folder, order, tmp_path / f"{name}-{i}", (i, count)) for i in range(count)]
        for first, *others in itertools.permutations(shards):
            for other in others:
                first = first.merge(other)
            runs.append(first)
    for found in runs:
        assert_same_numbers(found, whole)


def assert_same_numbers(found: ExpertStats, expected: ExpertStats) -> None:
    assert found.info.num_tokens == expected.info.num_tokens
    others = expected.to_arrays()
    for name, array in found.to_arrays().items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)
    for name in CRITERIA:
        np.testing.assert_array_equal(saliency(found, name), saliency(expected, name))
