"""Router weights after an expert is dropped, worked out by hand."""

from __future__ import annotations

import numpy as np
import torch

from edge_moe.converters.rerouting import fill_slots, weight_changes
from edge_moe.router_spec import RouterSpec

SOFTMAX = RouterSpec("softmax", False, False, 1, 1, 1.0)
RENORMALISED = RouterSpec("softmax", True, False, 1, 1, 1.0)
SIGMOID = RouterSpec("sigmoid", False, True, 1, 1, 2.0)


def test_weights_after_a_drop_by_hand() -> None:
    chosen = torch.tensor([[4, 2]]), torch.tensor([[0.75, 0.25]])  # scores 0.6, 0.2, then 0.1
    wider = torch.tensor([[2, 7, 4]]), torch.tensor([[2 / 9, 1 / 9, 6 / 9]])  # in any order
    slots = fill_slots(chosen, wider)
    assert slots.expert_ids.tolist() == [[4, 2, 7]]
    changes = weight_changes(slots, RENORMALISED)[0]
    expected = [[-0.75, 2 / 3 - 0.25, 1 / 3], [6 / 7 - 0.75, -0.25, 1 / 7]]
    np.testing.assert_allclose(changes, expected, atol=1e-7)

    chosen = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]])
    wider = torch.tensor([[0, 1, 2]]), torch.tensor([[0.5, 0.25, 0.125]])
    slots = fill_slots(chosen, wider)
    expected = [[-0.5, 0.25, 0.25], [0.5 / 3, -0.25, 0.5 / 3]]
    np.testing.assert_allclose(weight_changes(slots, SOFTMAX)[0], expected, atol=1e-12)
    expected = [[-0.5, 0, 0.125], [0, -0.25, 0.125]]
    np.testing.assert_allclose(weight_changes(slots, SIGMOID)[0], expected, atol=1e-12)


def test_tokens_whose_wider_choice_is_another_group_lose_the_expert_only() -> None:
    chosen = torch.tensor([[0, 1]]), torch.tensor([[0.75, 0.25]])
    slots = fill_slots(chosen, (torch.tensor([[4, 5, 6]]), torch.tensor([[0.5, 0.3, 0.2]])))
    assert slots.expert_ids.tolist() == [[0, 1, -1]]
    expected = [[-0.75, 0.75, 0], [0.25, -0.25, 0]]
    np.testing.assert_allclose(weight_changes(slots, RENORMALISED)[0], expected, atol=1e-12)
    alone = fill_slots(chosen, None)
    assert alone.expert_ids.tolist() == slots.expert_ids.tolist()


def test_a_saturated_softmax_stays_finite() -> None:
    chosen = torch.tensor([[0], [0]]), torch.tensor([[1.0], [1.0]])
    wider = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[1.0, 1e-20], [1.0, 0.0]])
    for router in (SOFTMAX, RENORMALISED):
        changes = weight_changes(fill_slots(chosen, wider), router)
        np.testing.assert_allclose(changes[:, 0], [[-1, 1], [-1, 0]], atol=1e-6)
