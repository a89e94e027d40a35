"""A pre-gate chooses every later layer's experts from what the first is given."""

from __future__ import annotations

import pytest
import torch
from conftest import TinyCheckpoint

from edge_moe.errors import InputError
from edge_moe.families import FAMILIES
from edge_moe.runtime.router_weights import expert_weights, require_weighable
from edge_moe.runtime.session import Session


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_weights_are_the_routers_own(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    with Session.open(tiny_checkpoint(family)) as session, torch.inference_mode():
        router = session.spec.router
        if router.score_function == "sparsemixer":
            with pytest.raises(InputError, match="weighs no experts but those it chooses itself"):
                require_weighable(router, family)
            return
        require_weighable(router, family)
        seen: dict[str, torch.Tensor] = {}
        block = session.blocks[1]
        block.on_logits(lambda logits: seen.__setitem__("logits", logits))
        block.router.register_forward_hook(
            lambda *call: seen.update(weights=call[2][1], rows=call[2][2])
        )
        session.logits(list(range(5, 45)))
        found = expert_weights(router, seen["logits"], seen["rows"], block.expert_scale)
        torch.testing.assert_close(found.to(seen["weights"]), seen["weights"])
