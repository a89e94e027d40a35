"""M-SMoE (arXiv 2310.01334): merge rarely used experts into the dominant one they route like.

Dominant are the N experts with most tokens. Every other one joins the dominant expert whose router
logits are most similar (cosine over tokens of the logit columns); its hidden units are matched to
the dominant's; the group's mean is weighted by tokens.

Differences to the paper, which none of the loadable formats can hold:
- It ranks frequencies over all layers together, so layers end with different numbers of experts.
  transformers, vLLM and GGUF need one number for all layers: here every layer keeps N.
- Its router keeps all E rows and members of a group alias one expert, so their gates add up. A
  checkpoint has one row per stored expert: here the group keeps the dominant's row (default), or
  the weighted mean of the rows. Two members chosen together therefore count once, and the next
  expert takes the free place. Log-sum-exp of the rows would need a bias that the routers lack.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from edge_moe.converters.transforms.base import (
    SAMPLE_TOKENS,
    FloatArray,
    LayerResult,
    LayerTask,
    register,
)
from edge_moe.converters.transforms.merging import (
    ROUTER_SETTING,
    merge_bytes,
    merge_groups,
    weight_cost,
)
from edge_moe.converters.transforms.selection import join_most_similar, kept_by_score

REFUSED = {
    "mc-smoe": (
        "method mc-smoe stores every merged matrix as a low-rank product plus a sparse rest "
        "(rank 32, 10 % of the rest), which safetensors of this architecture, vLLM and GGUF cannot "
        "hold, and writing it out dense would save nothing: use --method m-smoe and give the "
        "result fewer bits with `edge-moe plan`"
    )
}
"""Methods that are known but have no loadable output, and why."""


@register(
    "m-smoe",
    "merge experts into the N most used, by router similarity, hidden units aligned",
    "arXiv 2310.01334",
    settings={"router": ROUTER_SETTING},
    sample_tokens=SAMPLE_TOKENS,
    scratch_bytes=lambda spec, num_tokens: merge_bytes(spec) + 16 * num_tokens * spec.num_experts,
)
def m_smoe(task: LayerTask) -> LayerResult:
    """One expert per dominant one, in their old order."""
    frequency = task.score("frequency")
    kept = kept_by_score(task, frequency)
    members = join_most_similar(task, kept, column_cosines(task.sampled().logits))
    cost = weight_cost(task.weights)
    return merge_groups(task.weights, members, frequency, cost, str(task.settings["router"]))


def column_cosines(logits: Tensor) -> FloatArray:
    """[T, E] -> [E, E] cosines of the columns."""
    columns = logits.double().numpy()
    norms = np.linalg.norm(columns, axis=0)
    cosines: FloatArray = columns.T @ columns / np.maximum(np.outer(norms, norms), 1e-300)
    return cosines
