"""Runs that are stopped at a rename: between two of them nothing on disk changes its name."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def stopping_at_rename(limit: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The rename with number `limit` raises KeyboardInterrupt instead."""
    replace_file, renames = os.replace, itertools.count()

    def stopping(*paths: Any) -> None:
        if next(renames) == limit:
            raise KeyboardInterrupt
        replace_file(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        yield
