"""Products with the matrices of experts in slots, by libggml, for every form that it knows.

Letters: H hidden_size, I expert_width, R pairs of a token and an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from edge_moe.budget import PREFILL_CHUNK_TOKENS
from edge_moe.formats import expert_packed_bytes, split_form
from edge_moe.formats.ggml_types import GGML_TYPES_BY_NAME, GgmlType
from edge_moe.runtime.kernels.ggml_products import (
    Backend,
    GatedProducts,
    IntArray,
    MatrixStack,
    Product,
    ggml_cpu,
)
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
    """One per session: the graphs of single tokens are kept, for they recur."""

    def __init__(self, spec: ModelSpec, buffers: SlotBuffers) -> None:
        self._spec = spec
        self._buffers = buffers
        self._backend = Backend(torch.get_num_threads())
        self._stacks: dict[str, list[MatrixStack]] = {}
        self._kept: dict[tuple[str, str, int, bool], Product] = {}

    @property
    def most_rows(self) -> int:
        """R that the bill's workspace has room for: what one unpacked expert would take.

        A pair takes, in float32, its input and the copy that is multiplied, gate and up and what
        becomes of them, its output (3 H + 7 I), and both inputs rounded, to 16 bits at most.
        """
        spec = self._spec
        pair_halves = 7 * spec.expert_hidden + 15 * spec.expert_width
        return max(PREFILL_CHUNK_TOKENS, 2 * (spec.expert_weights * 7 // 6) // pair_halves)

    def gated(self, form: str, inputs: Tensor, slots: IntArray) -> Tensor:
        """[R, H], outputs of experts that multiply silu(gate) with up; see `gate_up`."""
        *first, down = self._matrices(form)

        def make(num_rows: int, is_shared: bool) -> Product:
            return GatedProducts(self._backend, first, down, num_rows, is_shared=is_shared)

        return self._compute(form, "gated", make, inputs, slots)

    def gate_up(self, form: str, inputs: Tensor, slots: IntArray) -> Tensor:
        """[R, 2I], gate_proj's outputs before up_proj's; [R, I] without a gate.

        Args:
            inputs: float32 [R, H], or [1, H] for all pairs.
            slots: [R], of the form's size class.
        """
        *first, _ = self._matrices(form)
        found = [
            self._multiply(form, f"first {place}", stack, inputs, slots)
            for place, stack in enumerate(first)
        ]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def down(self, form: str, inner: Tensor, slots: IntArray) -> Tensor:
        """[R, I] -> [R, H]."""
        return self._multiply(form, "down", self._matrices(form)[-1], inner, slots)

    def close(self) -> None:
        """Free what C allocated; the slots are the caller's."""
        for product in self._kept.values():
            product.close()
        self._kept.clear()
        self._backend.close()

    def _multiply(
        self, form: str, name: str, stack: MatrixStack, inputs: Tensor, slots: IntArray
    ) -> Tensor:
        def make(num_rows: int, is_shared: bool) -> Product:
            return Product(self._backend, stack, num_rows, is_shared=is_shared)

        return self._compute(form, name, make, inputs, slots)

    def _compute(
        self,
        form: str,
        name: str,
        make: Callable[[int, bool], Product],
        inputs: Tensor,
        slots: IntArray,
    ) -> Tensor:
        num_rows, is_shared = len(slots), len(inputs) < len(slots)
        if num_rows > self._spec.top_k:
            product = make(num_rows, is_shared)
            try:
                return product(inputs, slots)
            finally:
                product.close()
        key = (form, name, num_rows, is_shared)
        if key not in self._kept:
            self._kept[key] = make(num_rows, is_shared)
        return self._kept[key](inputs, slots)

    def _matrices(self, form: str) -> list[MatrixStack]:
        """gate_proj and up_proj, as one matrix where their types agree, and down_proj."""
        if form not in self._stacks:
            self._stacks[form] = list(self._find_matrices(form))
        return self._stacks[form]

    def _find_matrices(self, form: str) -> list[MatrixStack]:
        hidden, width, has_gate = self._spec.expert_shape
        sizes = expert_packed_bytes(form, hidden, width, has_gate)
        gate, up, down = (GGML_TYPES_BY_NAME[part.upper()] for part in split_form(form))
        buffer = self._buffers.buffer(sum(sizes))

        def stack(kind: GgmlType, rows: int, columns: int, offset_bytes: int) -> MatrixStack:
            return MatrixStack(buffer, kind, rows, columns, offset_bytes)

        last = stack(down, hidden, width, sizes[0] + sizes[1])
        if gate == up or not has_gate:
            return [stack(up, self._spec.inner_rows, hidden, 0), last]
        return [stack(gate, width, hidden, 0), stack(up, width, hidden, sizes[0]), last]
