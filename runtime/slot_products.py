"""Products with the matrices of experts in slots, by libggml, for every form that it knows.

Letters: H hidden_size, I expert_width, R pairs of a token and an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import torch

from edge_moe.budget import PREFILL_CHUNK_TOKENS
from edge_moe.formats import expert_packed_bytes, split_form
from edge_moe.formats.ggml_types import GGML_TYPES_BY_NAME
from edge_moe.runtime.delta_tail import DeltaTail, tail_of
from edge_moe.runtime.expert_matrices import expert_matrices
from edge_moe.runtime.kernels.ggml_products import (
    Backend,
    GatedProducts,
    MatrixStack,
    Product,
    ggml_cpu,
)
from edge_moe.runtime.products import Chosen, Pairs
from edge_moe.runtime.rearranged_store import is_rearranged
from edge_moe.runtime.slots import SlotBuffers
from edge_moe.spec import ModelSpec

Tensor = torch.Tensor


@cache
def can_compute(form: str) -> bool:
    """Whether libggml has products for all of an expert's types; it must be installed.

    Raises:
        MissingExtraError, InputError: see `ggml_cpu`.
    """
    kinds = [GGML_TYPES_BY_NAME.get(part.upper()) for part in split_form(form)]
    return all(kind is not None and ggml_cpu().can_multiply(kind) for kind in kinds)


class SlotProducts:
    """`Products` by libggml; one per session: the graphs of single tokens are kept, they recur."""

    def __init__(
        self,
        spec: ModelSpec,
        buffers: SlotBuffers,
        forms: frozenset[str],
        tail: DeltaTail | None = None,
        *,
        is_rearranged: bool = False,
    ) -> None:
        """`forms` are the ones to compute, of those that `can_compute`.

        Slots of quantised experts end in a `tail`, where there is one. With `is_rearranged` they
        were filled from a `RearrangedStore` of the same `forms`.
        """
        self._is_rearranged = is_rearranged
        self._tail = tail
        self._spec = spec
        self._forms = forms
        self._buffers = buffers
        self._backend = Backend(torch.get_num_threads())
        self._stacks: dict[str, list[MatrixStack]] = {}
        self._kept: dict[tuple[str, str, int, bool], Product] = {}

    @property
    def most_rows(self) -> int:
        """R that the bill's workspace has room for, see `most_pairs`."""
        return most_pairs(self._spec)

    def batch(self, form: str) -> str | None:
        """One form at a time."""
        return form if form in self._forms else None

    def gated(self, chosen: Chosen, inputs: Tensor) -> Tensor:
        """[R, H], outputs of experts that multiply silu(gate) with up; see `gate_up`."""
        *first, down = self._matrices(chosen.forms[0])

        def make(num_rows: int, is_shared: bool) -> Product:
            return GatedProducts(self._backend, first, down, num_rows, is_shared=is_shared)

        return self._compute("gated", make, chosen, _of_pairs(chosen, inputs))

    def gate_up(self, chosen: Chosen, inputs: Tensor) -> Tensor:
        """[R, 2I], gate_proj's outputs before up_proj's; [R, I] without a gate."""
        *first, _ = self._matrices(chosen.forms[0])
        inputs = _of_pairs(chosen, inputs)
        found = [
            self._multiply(f"first {place}", stack, chosen, inputs)
            for place, stack in enumerate(first)
        ]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def down(self, chosen: Chosen, inner: Tensor) -> Tensor:
        """[R, I] -> [R, H]."""
        return self._multiply("down", self._matrices(chosen.forms[0])[-1], chosen, inner)

    def add(self, output: Tensor, results: Tensor, pairs: Pairs, first: int) -> None:
        """On a CPU torch adds in the order of the pairs."""
        places = slice(first, first + len(results))
        output.index_add_(0, pairs.tokens[places], results.mul_(pairs.weights[places, None]))

    def close(self) -> None:
        """Free what C allocated; the slots are the caller's."""
        for product in self._kept.values():
            product.close()
        self._kept.clear()
        self._backend.close()

    def _multiply(self, name: str, stack: MatrixStack, chosen: Chosen, inputs: Tensor) -> Tensor:
        def make(num_rows: int, is_shared: bool) -> Product:
            return Product(self._backend, stack, num_rows, is_shared=is_shared)

        return self._compute(name, make, chosen, inputs)

    def _compute(
        self, name: str, make: Callable[[int, bool], Product], chosen: Chosen, inputs: Tensor
    ) -> Tensor:
        slots = chosen.per_pair(np.array(chosen.slots))
        num_rows, is_shared = len(slots), len(inputs) < len(slots)
        if num_rows > self._spec.top_k:
            product = make(num_rows, is_shared)
            try:
                return product(inputs, slots)
            finally:
                product.close()
        key = (chosen.forms[0], name, num_rows, is_shared)
        if key not in self._kept:
            self._kept[key] = make(num_rows, is_shared)
        return self._kept[key](inputs, slots)

    def _matrices(self, form: str) -> list[MatrixStack]:
        """gate_proj and up_proj, as one matrix where their types agree, and down_proj."""
        if form not in self._stacks:
            self._stacks[form] = list(self._find_matrices(form))
        return self._stacks[form]

    def _find_matrices(self, form: str) -> Iterator[MatrixStack]:
        tail = tail_of(self._tail, form)
        record_bytes = sum(expert_packed_bytes(form, *self._spec.expert_shape))
        buffer = self._buffers.buffer(record_bytes + (0 if tail is None else tail.num_bytes))
        for one in expert_matrices(form, self._spec):
            is_moved = self._is_rearranged and is_rearranged(one)
            yield MatrixStack(buffer, one.kind, one.rows, one.width, one.offset_bytes, is_moved)


def most_pairs(spec: ModelSpec) -> int:
    """R that the bill's workspace has room for: what one unpacked expert would take.

    A pair takes, in float32, its input and the copy that is multiplied, gate and up and what
    becomes of them, its output (3 H + 7 I), and both inputs rounded, to 16 bits at most.
    """
    pair_halves = 7 * spec.expert_hidden + 15 * spec.expert_width
    return max(PREFILL_CHUNK_TOKENS, 2 * (spec.expert_weights * 7 // 6) // pair_halves)


def _of_pairs(chosen: Chosen, inputs: Tensor) -> Tensor:
    """Inputs [R, H], or [1, H] for all."""
    return inputs if chosen.tokens is None else inputs[chosen.tokens]
