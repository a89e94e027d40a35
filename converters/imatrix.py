"""Statistics -> an importance matrix in llama.cpp's own GGUF format, for its `llama-quantize`.

As tools/imatrix/imatrix.cpp of llama.cpp writes it: for every matrix W of the routed experts the
tensors `W.in_sum2` [E, columns], sums of squares of what each column is multiplied with over the
tokens routed to the expert, and `W.counts` [E, 1], those tokens. Calibration sums the same numbers
(`edge_moe.moments`), so nothing is measured again. Matrices outside the experts have no entry:
llama.cpp quantises them without, and refuses the types that must have one (IQ1, IQ2).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edge_moe.converters.gguf_writer import (
    GgufTensor,
    add_tensor_info,
    import_gguf,
    write_tensor,
)
from edge_moe.errors import StatsError
from edge_moe.files import atomic_path, require_file_output, require_free_disk
from edge_moe.moments import LayerMoments, moments_path
from edge_moe.stats import ExpertStats, StatsInfo

_MATRICES = (
    ("ffn_gate_exps", "input_squares"),
    ("ffn_up_exps", "input_squares"),
    ("ffn_down_exps", "inner_squares"),
)
"""Matrix -> the field of `LayerMoments` with the squares of its input."""
_HEADER_BYTES = 2**20


def write_imatrix(stats_folder: Path, output: Path) -> Path:
    """Write the file `output`, which appears when it is complete; returns `output`.

    Memory: the moments of one layer.

    Raises:
        StatsError: the statistics or their second moments are missing or damaged.
        InputError: `output` is a folder, or in none.
        DiskSpaceError: too little free space.
        MissingExtraError: the `gguf` package is not installed.
    """
    require_file_output(output, ".gguf")
    stats = ExpertStats.load(stats_folder)
    info = stats.info
    first = _moments(stats_folder, info.moe_layer_ids[0])
    widths: dict[str, int] = {name: getattr(first, name).shape[1] for _, name in _MATRICES}
    tensors = [
        tensor
        for row, layer_id in enumerate(info.moe_layer_ids)
        for tensor in _layer_tensors(stats_folder, layer_id, stats.routed_tokens[row], widths)
    ]
    total_bytes = sum(tensor.num_bytes for tensor in tensors)
    require_free_disk(output.parent, total_bytes + _HEADER_BYTES, f"importance matrix {output}")
    with atomic_path(output) as temporary:
        writer = _writer(temporary, info)
        for tensor in tensors:
            add_tensor_info(writer, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            write_tensor(writer, tensor)
        writer.close()
    return output


def _writer(path: Path, info: StatsInfo) -> Any:
    gguf = import_gguf()
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].pop("general.architecture", None)  # an importance matrix has none
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(info.tasks))
    writer.add_uint32("imatrix.chunk_count", len(info.windows))
    writer.add_uint32("imatrix.chunk_size", info.window_tokens)
    return writer


def _layer_tensors(
    folder: Path, layer_id: int, routed_tokens: Any, widths: dict[str, int]
) -> Iterator[GgufTensor]:
    num_experts = len(routed_tokens)
    counts = routed_tokens.astype("<f4").tobytes()
    for matrix, moments in _MATRICES:
        name = f"blk.{layer_id}.{matrix}.weight"
        shape = num_experts, widths[moments]
        read = partial(_sums, folder, layer_id, moments, shape)
        yield GgufTensor(f"{name}.in_sum2", shape, "f32", read)
        yield GgufTensor(f"{name}.counts", (num_experts, 1), "f32", partial(_once, counts))


def _once(raw: bytes) -> Iterator[bytes]:
    yield raw


def _sums(folder: Path, layer_id: int, name: str, shape: tuple[int, int]) -> Iterator[bytes]:
    sums = getattr(_moments(folder, layer_id), name)
    if sums.shape != shape:
        raise StatsError(
            f"{moments_path(folder, layer_id)} has shape {sums.shape}, other layers and the "
            f"statistics have {shape}: calibrate again"
        )
    yield np.ascontiguousarray(sums.values(), dtype="<f4").tobytes()


def _moments(folder: Path, layer_id: int) -> LayerMoments:
    return LayerMoments.load(moments_path(folder, layer_id))
