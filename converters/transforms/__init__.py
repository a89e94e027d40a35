"""Methods that give a layer fewer or narrower experts, by name."""

from edge_moe.converters.transforms import (  # noqa: F401  each registers its method
    dern,
    heapr,
    m_smoe,
    naee,
    prune,
    ream,
    sub_moe,
)
from edge_moe.converters.transforms.base import METHODS, Method
from edge_moe.errors import InputError, TargetError

__all__ = ["METHODS", "Method", "get_method"]


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        TargetError: known, but without an output that can be loaded.
        InputError: unknown.
    """
    if name in m_smoe.REFUSED:
        raise TargetError(m_smoe.REFUSED[name])
    if name not in METHODS:
        raise InputError(f"method {name!r} is unknown; known are {', '.join(METHODS)}")
    return METHODS[name]
