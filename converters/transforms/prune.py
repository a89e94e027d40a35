"""Keep the N best experts of every layer by any saliency criterion; their weights stay as they are.

Router rows and selection biases of dropped experts go with them, so the router chooses among the
rest and renormalises where the model does so: exactly a router that gives the others -inf.
"""

from __future__ import annotations

from edge_moe.converters.transforms.base import LayerResult, LayerTask, Setting, register
from edge_moe.converters.transforms.selection import kept_by_score
from edge_moe.saliency import CRITERIA


@register(
    "prune",
    "keep the N experts of largest saliency per layer",
    "edge_moe.saliency names the source of each criterion",
    settings={"criterion": Setting("reap", "saliency criterion", words=tuple(CRITERIA))},
)
def prune(task: LayerTask) -> LayerResult:
    """The kept experts, in their old order."""
    kept = kept_by_score(task, task.score(str(task.settings["criterion"])))
    return LayerResult(task.weights.select(kept), [[expert_id] for expert_id in kept])
