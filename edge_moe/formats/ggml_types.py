"""Every block type of ggml: its number in files, and its bytes. Most of them no `Form` packs."""

from __future__ import annotations

from dataclasses import dataclass

from edge_moe.errors import FormError


@dataclass(frozen=True)
class GgmlType:
    """One row of `type_traits` in ggml/src/ggml.c."""

    ggml_type: int
    """Number of the type, as written to GGUF files."""
    name: str
    """As ggml spells it: `Q4_K`."""
    block_size: int
    """Weights per block; rows are a multiple of it."""
    block_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return self.block_bytes * 8 / self.block_size

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` weights.

        Raises:
            FormError: `width` is not a multiple of the block.
        """
        if width % self.block_size:
            raise FormError(
                f"ggml type {self.name} packs blocks of {self.block_size} weights; "
                f"a row of {width} is not a multiple"
            )
        return width // self.block_size * self.block_bytes


_ROWS: tuple[tuple[int, str, int, int], ...] = (
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 40),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
    (42, "Q2_0", 64, 18),
)
GGML_TYPES = {row[0]: GgmlType(*row) for row in _ROWS}
"""By number."""
GGML_TYPES_BY_NAME = {kind.name: kind for kind in GGML_TYPES.values()}
