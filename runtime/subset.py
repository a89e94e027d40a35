"""Running with some of a model's experts: the store's view of them, and routers without the rest.

A router whose rows were sliced away is the router of a package that dropped those experts, so the
two compute the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edge_moe.errors import InputError
from edge_moe.runtime.expert_store import ExpertStore, RecordInfo
from edge_moe.runtime.moe_block import MoeBlock, select_experts
from edge_moe.runtime.policy import Key
from edge_moe.spec import ModelSpec
from edge_moe.task_pattern import TaskPattern, rank_by_group

Rows = Sequence[Sequence[int]]
"""Per MoE layer, router rows of the whole model, ascending."""


class SubsetStore(ExpertStore):
    """Some rows of another store, numbered anew. Closing it leaves the other one open."""

    def __init__(self, store: ExpertStore, rows: Rows) -> None:
        self._store = store
        self._rows = [list(layer) for layer in rows]
        self.kept = [
            [kept[row] for row in layer] for kept, layer in zip(store.kept, self._rows, strict=True)
        ]
        self.tail, self.unpacks = store.tail, store.unpacks

    def record(self, key: Key) -> RecordInfo:
        return self._store.record(self._outer(key))

    def read_bytes(self, key: Key) -> int:
        return self._store.read_bytes(self._outer(key))

    def read_into(self, key: Key, buffer: memoryview) -> None:
        self._store.read_into(self._outer(key), buffer)

    def close(self) -> None:
        pass

    def _outer(self, key: Key) -> Key:
        return key[0], self._rows[key[0]][key[1]]


class RouterRows:
    """The routers of a model, all of whose rows it keeps, and what of them is in use."""

    def __init__(self, blocks: Sequence[MoeBlock]) -> None:
        self._blocks = blocks
        self._num_rows = [len(block.weight) for block in blocks]
        self._full = [block.tensors() for block in blocks]

    def use(self, rows: Rows | None) -> None:
        """Leave only `rows` in each router; None brings all back."""
        for index, (block, full) in enumerate(zip(self._blocks, self._full, strict=True)):
            chosen = range(self._num_rows[index]) if rows is None else rows[index]
            for name, value in full.items():
                block.set_tensor(name, value if rows is None else select_experts(value, chosen))
            block.set_num_experts(len(chosen))


def choose_rows(
    pattern: TaskPattern, store: ExpertStore, spec: ModelSpec, slot_bytes: int | None
) -> list[list[int]]:
    """The rows of `store` to keep for `pattern`.

    Without `slot_bytes` those of the pattern's kept sets. With it, as many as fit: first what a
    token needs at once in every layer, then over all layers the experts with the most router
    weight per byte. PreMoe keeps the same number in every layer instead; with half of the demo
    model's experts that costs more (KL .43 instead of .24 on code, .59 instead of .55 on sql,
    1024 held-out tokens each). Group-limited routers keep equally many experts in every group.

    Raises:
        InputError: the pattern leaves a layer with fewer experts than a token needs.
    """
    table = pattern.weights()
    scores = [table[layer][np.asarray(kept)] for layer, kept in enumerate(store.kept)]
    ranked = [rank_by_group(each, spec.router.num_groups) for each in scores]
    least = _least_units(spec)
    if slot_bytes is None:
        return _kept_rows(pattern, store, least, spec.router.num_groups)
    units = [list(layer[:least]) for layer in ranked]
    left = slot_bytes - sum(
        _unit_bytes(store, layer, unit) for layer, chosen in enumerate(units) for unit in chosen
    )
    rest = [
        (scores[layer][unit].sum() / _unit_bytes(store, layer, unit), layer, unit)
        for layer, order in enumerate(ranked)
        for unit in order[least:]
    ]
    for _, layer, unit in sorted(rest, key=lambda item: -item[0]):  # stable: order within a layer
        num_bytes = _unit_bytes(store, layer, unit)
        if num_bytes <= left:
            units[layer].append(unit)
            left -= num_bytes
    return [sorted(int(row) for unit in layer for row in unit) for layer in units]


def _least_units(spec: ModelSpec) -> int:
    """Rows per group below which a token cannot be routed: group scores add the best two."""
    router = spec.router
    if router.num_groups == 1:
        return spec.top_k
    return max(2, -(-spec.top_k // router.top_groups))


def _kept_rows(
    pattern: TaskPattern, store: ExpertStore, least: int, num_groups: int
) -> list[list[int]]:
    """The pattern's experts of each layer that `store` has, `least` per router group or more."""
    rows = []
    for layer, (kept, wanted) in enumerate(zip(store.kept, pattern.kept, strict=True)):
        found = np.isin(kept, wanted)
        by_group = found.reshape(num_groups, -1).sum(axis=1)
        remedy = "give a --budget, or run the whole model"
        if by_group.min() < least:
            raise InputError(
                f"task {pattern.name!r} keeps {found.sum()} of this package's experts in MoE layer "
                f"{layer}, {least * num_groups} are needed{_per_group(num_groups)}: {remedy}"
            )
        if by_group.min() < by_group.max():
            raise InputError(
                f"task {pattern.name!r} keeps {by_group.tolist()} of this package's experts in the "
                f"router groups of MoE layer {layer}, which must stay equal: {remedy}"
            )
        rows.append([int(row) for row in np.flatnonzero(found)])
    return rows


def _per_group(num_groups: int) -> str:
    return "" if num_groups == 1 else f", equally many in each of the router's {num_groups} groups"


def _unit_bytes(store: ExpertStore, layer: int, unit: Any) -> int:
    return sum(store.record((layer, int(row))).num_bytes for row in unit)
