"""The predictor asks the next layer's own router, and reads ahead what it names."""

from __future__ import annotations

import time

import pytest
import torch
from conftest import TinyCheckpoint
from test_expert_cache import MemoryStore
from torch import Tensor

from edge_moe.errors import InputError
from edge_moe.runtime.block_predictors import BlockInput, NextChoice
from edge_moe.runtime.expert_cache import ExpertCache
from edge_moe.runtime.interleaved_trial import FastestOf
from edge_moe.runtime.policy import LeastRecentlyUsed
from edge_moe.runtime.predictor_choice import PREDICTORS
from edge_moe.runtime.predictors import Repeat
from edge_moe.runtime.prefetch import Prefetcher
from edge_moe.runtime.read_ahead import ReadAhead
from edge_moe.runtime.session import Session
from edge_moe.runtime.slots import SlotBuffers


class BiasedRouter:
    """Chooses by score + bias, as transformers' routers do: raw logits would name row 0."""

    def choose(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        rows = (hidden + torch.tensor([-9.0, 0.0, 5.0, 0.0])).topk(1).indices
        return rows, torch.ones(1, 1)

    def ranked(self, hidden: Tensor, width: int) -> list[int]:
        raise AssertionError("nobody asked for more")


def test_the_routers_own_choice_is_read_ahead() -> None:
    store = MemoryStore()
    cache = ExpertCache(store, SlotBuffers({4: 2, 8: 2}, torch.device("cpu")), LeastRecentlyUsed)
    block_input = BlockInput()
    ahead = ReadAhead(2, {"router": NextChoice(block_input, [BiasedRouter(), BiasedRouter()])})
    prefetcher = Prefetcher(ahead, block_input, store, cache)
    ahead.start_token(None)
    prefetcher.predict(0, torch.tensor([[1.0, 0.0, 0.0, 0.0]]), [0])
    deadline = time.monotonic() + 10
    while not cache.is_resident((1, 2)) and time.monotonic() < deadline:
        time.sleep(0.001)
    prefetcher.observe(1, [2])
    prefetcher.close()
    assert cache.is_resident((1, 2)) and not cache.is_resident((1, 0))
    assert cache.statistics.predicted_misses == cache.statistics.predicted_misses_used == 1


@pytest.mark.parametrize("name", sorted({*PREDICTORS} - {"linear"}))
def test_no_guess_changes_a_result(name: str, tiny_checkpoint: TinyCheckpoint) -> None:
    folder, prompt = tiny_checkpoint("qwen3_moe"), list(range(5, 25))
    with Session.open(folder, num_slots=3, prefetch=False) as session:
        expected = session.generate_ids(prompt, 24, stop_at_eos=False)
        assert session.statistics().predicted_misses == 0 and session.prefetch_trial is None
    with Session.open(folder, num_slots=3, prefetch=True, predictors=[name]) as session:
        assert session.generate_ids(prompt, 24, stop_at_eos=False) == expected
        assert session.statistics().predicted_misses > 0 and session.prefetch_trial is None
    with Session.open(folder, num_slots=3, predictors=[name, "router"]) as session:
        found = [session.generate_ids(prompt, 24, stop_at_eos=False) for _ in range(4)]
        assert found == [expected] * 4
        trial = session.prefetch_trial
        assert trial is not None and trial.is_over  # 72 of 92 single tokens
        assert set(trial.gains) == {name, "router"}
        before = session.statistics().predicted_misses
        session.generate_ids(prompt, 24, stop_at_eos=False)
        found_misses = session.statistics().predicted_misses > before
        assert trial.best is not None or not found_misses


def test_two_trials_take_place_one_after_the_other() -> None:
    ahead = ReadAhead(2, {"repeat": Repeat([4, 4])}, FastestOf(["repeat"]))
    asked = []
    for token in range(80 + 80):
        ahead.start_token(None, is_settled=token >= 80)
        asked.append(ahead.is_on)
        ahead.end_token()
    assert all(asked[:80]) and asked[80:96] == [True] * 8 + [False] * 8
    assert ahead.trial is not None and ahead.trial.is_over


def test_unknown_predictors(tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(InputError, match="predictor 'oracle' is unknown; known: router, wide"):
        Session.open(tiny_checkpoint("qwen3_moe"), num_slots=6, predictors=["oracle"])
