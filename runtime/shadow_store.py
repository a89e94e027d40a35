"""Where shadows are read from, and what is left to page once they are in memory."""

from __future__ import annotations

from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import InputError
from edge_moe.package import ExpertRecord, Package
from edge_moe.plan import MemoryTerm
from edge_moe.runtime.allotment import record_sizes
from edge_moe.runtime.expert_store import ExpertStore, PackageStore, RecordInfo
from edge_moe.runtime.policy import Key

TERM_NAME = "shadows"
"""The line of the memory bill."""


class ShadowStore(PackageStore):
    """Every expert's shadow, by the keys of its body; the body itself where it is its own."""

    def __init__(self, package: Package) -> None:
        super().__init__(package)
        self._shadows = [
            {record.expert_id: record for record in layer.shadows}
            for layer in package.manifest.layers
        ]

    def _record(self, key: Key) -> ExpertRecord:
        body = super()._record(key)
        return self._shadows[key[0]].get(body.expert_id, body)


class BodyStore(ExpertStore):
    """The experts of another store, of which those that are their own shadows are never paged."""

    def __init__(self, store: ExpertStore, shadows: ExpertStore) -> None:
        self._store = store
        self.kept = store.kept
        self.own_shadows = [
            frozenset(
                row
                for row in range(len(kept))
                if store.record((layer, row)) == shadows.record((layer, row))
            )
            for layer, kept in enumerate(store.kept)
        ]
        """Per layer, rows that stay in memory as they are."""

    def record(self, key: Key) -> RecordInfo:
        return self._store.record(key)

    def read_into(self, key: Key, buffer: memoryview) -> None:
        self._store.read_into(key, buffer)

    def keys(self) -> list[Key]:
        """What is paged."""
        return [key for key in super().keys() if key[1] not in self.own_shadows[key[0]]]

    def paged_sizes(self) -> list[list[int]]:
        """[L][...] packed bytes of what is paged."""
        sizes: list[list[int]] = [[] for _ in self.kept]
        for key in self.keys():
            sizes[key[0]].append(self._store.record(key).num_bytes)
        return sizes

    def close(self) -> None:
        pass


def open_shadows(source: Package | Checkpoint) -> ShadowStore:
    """The shadows of `source`.

    Raises:
        InputError: it has none, with what to do.
    """
    if not isinstance(source, Package):
        raise InputError(
            f"{source.folder} is a checkpoint, which has no shadows to compute misses from: build "
            "a package with `edge-moe build --shadow tq2_0`, or use --stall exact"
        )
    if not any(layer.shadows for layer in source.manifest.layers):
        raise InputError(
            f"{source.folder} holds no shadows to compute misses from: build it again with "
            "`edge-moe build --shadow tq2_0`, or use --stall exact"
        )
    return ShadowStore(source)


def shadow_term(shadows: ExpertStore) -> MemoryTerm:
    """What all of them take in memory."""
    return MemoryTerm(
        name=TERM_NAME,
        num_bytes=sum(map(sum, record_sizes(shadows))),
        source="headers",
        note="a ternary copy of every expert, for misses",
    )
