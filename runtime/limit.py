"""How fast a token can be at best: bytes over bandwidths, term by term.

With A_d dense bytes, KV cached bytes and A_e routed bytes per token, h the share of A_e found in
the device's memory and g that of the rest found in RAM, B_g, B_x, B_s the bandwidths of the
device's memory, the host link and storage, t_s per MoE layer:

    serial   T  = (A_d + KV + h A_e) / B_g + (1 - h) A_e / B_x + (1 - h) (1 - g) A_e / B_s + L t_s
    overlap  T >= max of the three + L t_s

The replay counted (1 - h) A_e and (1 - h) (1 - g) A_e. What a GPU lacks crosses the link, also if
it comes from storage. A CPU has no link; a GPU without a size of RAM is taken to find every expert
there. Data sheets bound what a machine does; of the machine at hand the bandwidths, and the
time of a token that finds every expert, can be measured (`runtime.this_machine`).
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
    link_seconds: float
    storage_seconds: float
    sync_seconds: float
    measured_compute_seconds: float | None = None
    """Of a token with every expert in memory, where that was measured on the machine at hand."""

    @property
    def compute_seconds(self) -> float:
        """What the device's own memory takes, or computing was measured to take."""
        if self.measured_compute_seconds is not None:
            return self.measured_compute_seconds
        return self.dense_seconds + self.kv_seconds + self.resident_seconds

    @property
    def page_in_seconds(self) -> float:
        """Until what was missing is there."""
        return self.link_seconds + self.storage_seconds

    @property
    def serial_tokens_per_second(self) -> float:
        """Where page-in waits for compute and compute for page-in."""
        return 1 / (self.compute_seconds + self.page_in_seconds + self.sync_seconds)

    @property
    def overlapped_tokens_per_second(self) -> float:
        """Where both go on at once."""
        longest = max(self.compute_seconds, self.link_seconds, self.storage_seconds)
        return 1 / (longest + self.sync_seconds)


def limit(
    result: Simulation,
    device: DeviceProfile,
    *,
    dense_bytes: int,
    kv_bytes: int,
    num_layers: int,
    sync_seconds: float = 0.0,
    storage_rate: int | None = None,
    has_host: bool = False,
    compute_seconds: float | None = None,
) -> Limit:
    """The terms for a replay on `device`; `sync_seconds` are per MoE layer.

    `storage_rate` (bytes per second) replaces the profile's; `has_host`: the replay had a tier in
    RAM, so that what it lacks comes from storage; `compute_seconds` were measured per token, and
    replace what the bandwidth of memory allows.

    Raises:
        InputError: nobody says how fast storage is.
    """
    tokens = max(result.num_tokens, 1)
    paged = result.page_in_bytes_per_token
    computed = (result.routed_bytes - result.skipped_bytes) / tokens
    memory, link = device.memory_bytes_per_second, device.host_link_bytes_per_second
    stored = result.storage_bytes / tokens if has_host or link is None else 0.0
    storage = storage_rate or device.storage_bytes_per_second
    if stored and storage is None:
        raise InputError(
            f"nobody says how fast the disk beside {device.label} is: add --storage-rate, such as "
            "3GB per second"
        )
    return Limit(
        dense_seconds=dense_bytes / memory,
        kv_seconds=kv_bytes / memory,
        resident_seconds=max(0.0, computed - paged) / memory,
        link_seconds=paged / link if link else 0.0,
        storage_seconds=stored / storage if storage else 0.0,
        sync_seconds=num_layers * sync_seconds,
        measured_compute_seconds=compute_seconds,
    )
