"""How fast a token can be at best: bytes over bandwidths, term by term.

With A_d dense bytes, KV cached bytes and A_e routed bytes per token, h the share of A_e found in
the device's memory, B_g its bandwidth, B_x that of what brings the rest, t_s per MoE layer:

    serial   T  = (A_d + KV + h A_e) / B_g + (1 - h) A_e / B_x + L t_s
    overlap  T >= max((A_d + KV + h A_e) / B_g, (1 - h) A_e / B_x) + L t_s

(1 - h) A_e is what the replay paged in. The rest comes over the host link where there is one, as
then RAM is taken to hold every expert, else from storage. Terms of a data sheet bound what a
machine does; nothing here was measured.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from edge_moe.errors import InputError
from edge_moe.profile import DeviceProfile
from edge_moe.runtime.simulate import Simulation


class Limit(BaseModel):
    """The terms of T, in seconds per token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dense_seconds: float
    kv_seconds: float
    resident_seconds: float
    """Reading the experts that were there, h A_e / B_g."""
    page_in_seconds: float
    sync_seconds: float

    @property
    def compute_seconds(self) -> float:
        """What the device's own memory takes."""
        return self.dense_seconds + self.kv_seconds + self.resident_seconds

    @property
    def serial_tokens_per_second(self) -> float:
        """Where page-in waits for compute and compute for page-in."""
        return 1 / (self.compute_seconds + self.page_in_seconds + self.sync_seconds)

    @property
    def overlapped_tokens_per_second(self) -> float:
        """Where both go on at once."""
        return 1 / (max(self.compute_seconds, self.page_in_seconds) + self.sync_seconds)


def page_in_rate(device: DeviceProfile) -> int:
    """Bytes per second at which a missed expert arrives.

    Raises:
        InputError: the profile does not say.
    """
    rate = device.host_link_bytes_per_second or device.storage_bytes_per_second
    if rate is None:
        raise InputError(
            f"the profile of {device.label} has neither a host link nor storage: it cannot page"
        )
    return rate


def limit(
    result: Simulation,
    device: DeviceProfile,
    *,
    dense_bytes: int,
    kv_bytes: int,
    num_layers: int,
    sync_seconds: float = 0.0,
) -> Limit:
    """The terms for a replay of single tokens on `device`; `sync_seconds` are per MoE layer.

    Raises:
        InputError: the profile does not say how fast experts arrive.
    """
    tokens = max(result.num_tokens, 1)
    paged = result.page_in_bytes_per_token
    computed = (result.routed_bytes - result.skipped_bytes) / tokens
    rate = device.memory_bytes_per_second
    return Limit(
        dense_seconds=dense_bytes / rate,
        kv_seconds=kv_bytes / rate,
        resident_seconds=max(0.0, computed - paged) / rate,
        page_in_seconds=paged / page_in_rate(device),
        sync_seconds=num_layers * sync_seconds,
    )
