"""What the simulator asks of a model: sizes of its experts, what a budget leaves for them, reads.

No torch and no llama.cpp: headers only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import InputError
from edge_moe.gguf_model import GgufModel
from edge_moe.open_model import is_gguf_file
from edge_moe.package import Package
from edge_moe.plan import Device, MemoryTerm
from edge_moe.runtime import gguf_allotment
from edge_moe.runtime.allotment import (
    allot,
    context_length,
    dense_parameters,
    open_source,
    open_store,
    paging_terms,
    session_terms,
    source_fingerprint,
)
from edge_moe.runtime.kernel_choice import automatic_label
from edge_moe.runtime.policy import token_cycle_bytes
from edge_moe.runtime.predictors import LINEAR_GUESSES, ROUTER_GUESSES
from edge_moe.runtime.replay import Room
from edge_moe.runtime.simulate import require_same_model, require_spec, traced_sizes
from edge_moe.runtime.this_machine import Step
from edge_moe.runtime.trace import Trace
from edge_moe.spec import ModelSpec

if TYPE_CHECKING:
    from edge_moe.runtime.text_session import TextSession

Sizes = list[list[int]]


class TracedModel(ABC):
    """A model that a trace was recorded with, as an engine would hold it."""

    spec: ModelSpec

    @abstractmethod
    def sizes(self, trace: Trace) -> Sizes:
        """[L][rows] bytes in memory of the experts that the trace's rows stand for.

        Raises:
            InputError: a trace of another model, or of experts that this one does not have.
        """

    @abstractmethod
    def terms(self, context_tokens: int, *, has_budget: bool) -> list[MemoryTerm]:
        """The bill with every expert resident."""

    @abstractmethod
    def room(
        self, sizes: Sizes, terms: list[MemoryTerm], budget_bytes: int | None, slots: int | None
    ) -> Room:
        """What a budget, or a number of slots, leaves for experts; all of them without either.

        Raises:
            BudgetError: too little.
            InputError: fewer slots than top_k.
        """

    @property
    @abstractmethod
    def pieces_per_expert(self) -> int:
        """Reads that bring an expert from the disk."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Of the model, as its traces name it."""

    @property
    def computed_as(self) -> str:
        """What the time of a token belongs to: the bytes, and what computes them."""
        return self.fingerprint

    @property
    @abstractmethod
    def never_guessed(self) -> dict[str, str]:
        """Guesses that no trace of this model holds, by their names there, and why."""

    @contextmanager
    def stepping(self, context_tokens: int) -> Iterator[Step]:
        """The model with every expert in memory, token by token.

        Raises:
            EdgeMoeError: it cannot be opened.
        """
        with self._open(context_tokens) as session:
            loop = session.new_loop()
            yield lambda token_id: loop.step([token_id])

    @abstractmethod
    def _open(self, context_tokens: int) -> TextSession:
        """A session that pages nothing."""

    @property
    @abstractmethod
    def dense_parameters(self) -> int:
        """Number of weights outside routed experts."""

    @abstractmethod
    def dense_read_bytes(self, terms: list[MemoryTerm]) -> int:
        """Bytes outside routed experts that a token reads: all but a separate embedding table."""

    def context_length(self, asked: int | None) -> int:
        """Tokens of context: what was asked for, or the default within the model's limit."""
        return context_length(self.spec, asked)

    def cycle_bytes(self, sizes: Sizes) -> int:
        """One token cycle; see `token_cycle_bytes`."""
        return token_cycle_bytes((max(layer) for layer in sizes), self.spec.top_k)


class _Native(TracedModel):
    """A checkpoint or package in edge-moe's own runtime."""

    def __init__(self, path: Path, device: Device) -> None:
        self._path = path
        self._source: Package | Checkpoint = open_source(path)
        self._store = open_store(self._source)
        self._device = device
        self.spec = self._source.spec

    pieces_per_expert = 1

    @property
    def fingerprint(self) -> str:
        return source_fingerprint(self._source)

    @property
    def computed_as(self) -> str:
        """Packages of one checkpoint share its fingerprint, but not their forms."""
        source, store = self._source, self._store
        own = source.own_fingerprint if isinstance(source, Package) else source.fingerprint
        label = automatic_label(store.all_forms())
        return f"{own}, kernels {label}"

    @property
    def never_guessed(self) -> dict[str, str]:
        if not self.spec.latent_width:
            return {}
        reason = f"experts of {self.spec.model_type} have an input of their own, unlike routers"
        return dict.fromkeys((ROUTER_GUESSES, LINEAR_GUESSES), reason)

    def _open(self, context_tokens: int) -> TextSession:
        from edge_moe.runtime.session import Session

        return Session.open(self._path, context_tokens=context_tokens, device="cpu")

    def sizes(self, trace: Trace) -> Sizes:
        require_same_model(trace, self.fingerprint)
        require_spec(trace, self.spec)
        return traced_sizes(trace, self._store, self.fingerprint)

    def terms(self, context_tokens: int, *, has_budget: bool) -> list[MemoryTerm]:
        return session_terms(
            self._source, self._store, context_tokens, self._device, has_budget=has_budget
        )

    def room(
        self, sizes: Sizes, terms: list[MemoryTerm], budget_bytes: int | None, slots: int | None
    ) -> Room:
        billed = paging_terms(sizes, terms, self._device, budget_bytes, slots)
        return Room.of_slots(allot(self.spec, sizes, billed, budget_bytes, slots).counts)

    @property
    def dense_parameters(self) -> int:
        return dense_parameters(self._source)

    def dense_read_bytes(self, terms: list[MemoryTerm]) -> int:
        held = term_bytes(terms, "dense weights")
        if self.spec.tie_word_embeddings:
            return held
        table = self.spec.vocab_size * self.spec.hidden_size
        return held - held * table // self.dense_parameters


class _Gguf(TracedModel):
    """A .gguf file in llama.cpp, whose experts we page."""

    def __init__(self, path: Path) -> None:
        self._model = GgufModel(path)
        self.spec = self._model.spec

    @property
    def pieces_per_expert(self) -> int:
        return max(len(layer.stacks) for layer in self._model.layers.values())

    @property
    def fingerprint(self) -> str:
        return self._model.fingerprint

    @property
    def never_guessed(self) -> dict[str, str]:
        reason = "llama.cpp runs this file, and maps guess in edge-moe's own runtime only"
        return {LINEAR_GUESSES: f"{reason}; for one, build with --target native and trace that"}

    def _open(self, context_tokens: int) -> TextSession:
        from edge_moe.runtime.gguf_session import GgufSession

        return GgufSession.open(self._model.path, context_tokens=context_tokens, can_trace=True)

    def sizes(self, trace: Trace) -> Sizes:
        require_same_model(trace, self._model.fingerprint)
        require_spec(trace, self.spec)
        every = tuple(range(self.spec.num_experts))
        if any(kept != every for kept in trace.info.kept):
            raise InputError(
                f"the trace names other experts than the {len(every)} of this file: record it again"
            )
        return gguf_allotment.expert_sizes(self._model)

    def terms(self, context_tokens: int, *, has_budget: bool) -> list[MemoryTerm]:
        return gguf_allotment.session_terms(self._model, context_tokens, has_budget=has_budget)

    def room(
        self, sizes: Sizes, terms: list[MemoryTerm], budget_bytes: int | None, slots: int | None
    ) -> Room:
        billed = gguf_allotment.paging_terms(self._model, terms, budget_bytes, slots)
        limit = gguf_allotment.expert_limit_bytes(self._model, billed, budget_bytes, slots)
        most_tokens = gguf_allotment.batch_tokens(self._model, limit)
        return Room.of_bytes(limit, sizes, most_tokens)

    @property
    def dense_parameters(self) -> int:
        idle = self.spec.num_moe_layers * self.spec.num_experts * self.spec.expert_weights
        return self._model.total_parameters - idle

    def dense_read_bytes(self, terms: list[MemoryTerm]) -> int:
        tensors = {info.name: info.num_bytes for info in self._model.dense_tensors}
        is_tied = "output.weight" not in tensors
        return sum(tensors.values()) - (0 if is_tied else tensors["token_embd.weight"])


def open_traced(path: Path, device: Device) -> TracedModel:
    """The model at `path`, as it would run on `device`.

    Raises:
        InputError: neither a folder nor a .gguf file.
        PackageError, CheckpointError, SpecError: a damaged one.
    """
    if is_gguf_file(path):
        return _Gguf(path)
    return _Native(path, device)


def term_bytes(terms: list[MemoryTerm], name: str) -> int:
    """Bytes of the term called `name`."""
    found = [term.num_bytes for term in terms if term.name == name]
    if not found:
        raise InputError(f"the bill has no term {name!r}")
    return sum(found)
