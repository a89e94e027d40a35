"""Device code of the runtime: unpacking expert weights."""

from edge_moe.runtime.kernels.unpack import unpack

__all__ = ["unpack"]
