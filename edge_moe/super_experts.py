"""Super experts: a handful of experts whose huge outputs form the attention sinks.

Rule of "Unveiling Super Experts in Mixture-of-Experts Large Language Models" (arXiv 2507.23279):
with a the largest |element| of an expert's un-gated output over calibration tokens, an expert is
one when a exceeds the 99.5th percentile of all experts, a exceeds a tenth of the largest a, and the
layer is among the first 75 % of MoE layers. Dropping three of 6144 halved a model's accuracy.

The released code differs in three ways, so this can miss what it finds, and the other way round:

- its 75 % is of all decoder layers. Behind leading dense layers the limit here lies later;
- it ranks shared experts with the routed ones. Here they are not looked at: no plan drops or packs
  them, but their outputs could raise both thresholds;
- it takes the percentile and the largest a over the experts of those early layers alone, here they
  are those of all layers: huge outputs in the last quarter raise the thresholds.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

PERCENTILE = 99.5
SHARE_OF_LARGEST = 0.1
SHARE_OF_LAYERS = 0.75
MINIMUM_BITS = 4
"""A super expert is neither dropped nor stored below this."""


def find_super_experts(max_output: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """[L, E] largest |output| -> [L, E] which experts to protect."""
    num_layers = max_output.shape[0]
    early = np.arange(num_layers) < max(1, round(SHARE_OF_LAYERS * num_layers))
    large = max_output > np.percentile(max_output, PERCENTILE)
    near_largest = max_output > SHARE_OF_LARGEST * max_output.max()
    found: npt.NDArray[np.bool_] = large & near_largest & early[:, None]
    return found
