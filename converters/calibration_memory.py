"""What calibration needs in memory, before it starts. No torch.

Calibration holds one decoder layer, never the model. H hidden_size, I expert_width, E experts,
k top_k, T tokens in all windows, W tokens in one window.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from edge_moe.available_memory import available_memory_bytes
from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import BudgetError
from edge_moe.formats.quantise import get_quantiser
from edge_moe.plan import Device, MemoryTerm, formula_terms
from edge_moe.tensor_info import TensorInfo
from edge_moe.units import format_bytes

PACK_CHUNK_WEIGHTS = 2**17
"""Weights that are packed and unpacked at a time."""
_PACK_BYTES_PER_WEIGHT = 64  # the forms take 6 to 25
READ_BYTES_PER_WEIGHT = 11  # stored 2 + widened 4 + shifted 4 + finite mask 1
FEWER_WINDOWS = (
    "calibrate on fewer windows (--max-windows), in several shards (--shard), or on a machine with "
    "more memory"
)
_ALLOWANCE_BYTES = 96_000_000  # libraries paged in by the first forward pass, allocator slack


def calibration_terms(
    checkpoint: Checkpoint, num_tokens: int, window_tokens: int, quantiser: str = "nearest"
) -> list[MemoryTerm]:
    """Upper bounds of what calibration adds to a process that has imported torch, by term.

    layer        4 bytes x (E 3HI + the largest layer's dense weights) + 32 E (H + I) of moments
    activations  T x (4H MoE inputs + 4H outputs of an expert that gets every token
                 + 16 (k + 1) routing + 4E router scores)
    window       W x (4 ((k + 11) H + 6I + 6 x widest dense row + S) + 32 k (k + 1)), S what a
                 recurrent layer holds per token, + 8 x heads x W**2 attention scores
    scratch      the largest tensor while it is read, one expert unpacked, one chunk being packed
    hessians     where `quantiser` needs them: 4 (H^2 + I^2) of one expert, and 24 max(H, I)^2 while
                 one is factored and the scales are solved
    allowance    libraries and allocator slack
    """
    spec = checkpoint.spec
    hidden, width, top_k = spec.hidden_size, spec.expert_width, spec.top_k
    dense = [_layer_dense_tensors(checkpoint, layer_id) for layer_id in range(spec.num_layers)]
    dense_weights = max(sum(map(_num_weights, tensors)) for tensors in dense)
    tensors = [info for layer in dense for info in layer]
    largest_weights = max([2 * hidden * width, *map(_num_weights, tensors)])
    widest = max(max(info.shape, default=1) for info in tensors)
    row_bytes = 4 * ((top_k + 11) * hidden + 6 * width + 6 * widest) + 32 * top_k * (top_k + 1)
    row_bytes += 4 * spec.state_workspace
    terms = {
        "layer": 4 * (spec.num_experts * spec.expert_weights + dense_weights)
        + 32 * spec.num_experts * (hidden + width),
        "activations": num_tokens * (8 * hidden + 16 * (top_k + 1) + 4 * spec.num_experts),
        "window": window_tokens * row_bytes + 8 * spec.num_attention_heads * window_tokens**2,
        "scratch": READ_BYTES_PER_WEIGHT * largest_weights
        + 4 * spec.expert_weights
        + _PACK_BYTES_PER_WEIGHT * PACK_CHUNK_WEIGHTS,
        "allowance": _ALLOWANCE_BYTES,
    }
    if get_quantiser(quantiser).needs:
        terms["hessians"] = 4 * (hidden**2 + width**2) + 24 * max(hidden, width) ** 2
    return formula_terms(terms)


def packing_terms(
    checkpoint: Checkpoint, num_tokens: int, window_tokens: int, quantiser: str
) -> list[MemoryTerm]:
    """What packing takes when the calibration text is run again, which stays in memory as a whole.

    hidden states  4 T H of the text on its way through the layers, and 4 H W of one window more
    """
    hidden = checkpoint.spec.hidden_size
    states = hidden_file_bytes(hidden, num_tokens + window_tokens)
    text = MemoryTerm(name="hidden states", num_bytes=states, source="formula")
    return [*calibration_terms(checkpoint, num_tokens, window_tokens, quantiser), text]


def calibration_peak_bytes(
    checkpoint: Checkpoint, num_tokens: int, window_tokens: int, quantiser: str = "nearest"
) -> int:
    """Sum of `calibration_terms`: the most that calibration adds to its process."""
    terms = calibration_terms(checkpoint, num_tokens, window_tokens, quantiser)
    return sum(term.num_bytes for term in terms)


def hidden_file_bytes(hidden_size: int, num_tokens: int) -> int:
    """Disk bytes of the hidden states of all windows, float32."""
    return 4 * hidden_size * num_tokens


def state_and_require_memory(
    subject: str,
    terms: Sequence[MemoryTerm],
    remedy: str = FEWER_WINDOWS,
    device: Device = "cpu",
) -> None:
    """Say on stderr what `subject` takes at most, and refuse when `device` does not have that.

    `remedy` is what the refusal says to do.

    Raises:
        BudgetError: with the bytes needed and the bytes available.
    """
    state_memory(subject, terms, device=device)
    require_free_memory(sum(term.num_bytes for term in terms), remedy, device)


def state_memory(
    subject: str, terms: Sequence[MemoryTerm], phase: str = "", device: Device = "cpu"
) -> None:
    """Say on stderr what `subject` takes at most of `device`'s memory, in that phase of it."""
    peak_bytes = sum(term.num_bytes for term in terms)
    parts = ", ".join(f"{term.name} {format_bytes(term.num_bytes)}" for term in terms)
    whose = "GPU memory" if device == "cuda" else "memory"
    Console(stderr=True, highlight=False).print(
        f"{subject}; {whose} at most {format_bytes(peak_bytes)} beside the libraries "
        f"({f'{phase}: ' if phase else ''}{parts})",
        soft_wrap=True,
    )


def require_free_memory(
    needed_bytes: int, remedy: str = FEWER_WINDOWS, device: Device = "cpu"
) -> None:
    """Refuse what cannot fit, where the system tells how much of `device`'s is available.

    Raises:
        BudgetError: with the bytes needed and the bytes available.
    """
    on_gpu = device == "cuda"
    available_bytes = _free_gpu_bytes() if on_gpu else available_memory_bytes()
    if available_bytes is not None and needed_bytes > available_bytes:
        raise BudgetError(
            f"this needs {format_bytes(needed_bytes)} of {'GPU ' if on_gpu else ''}memory, but "
            f"only {format_bytes(available_bytes)} is available: {remedy}"
            f"{', or --device cpu' if on_gpu else ''}",
            minimum_bytes=needed_bytes,
        )


def _free_gpu_bytes() -> int:
    import torch

    free_bytes: int = torch.cuda.mem_get_info()[0]
    return free_bytes


def _layer_dense_tensors(checkpoint: Checkpoint, layer_id: int) -> list[TensorInfo]:
    prefix = checkpoint.spec.layer_prefix(layer_id)
    return [info for info in checkpoint.dense_tensors if info.name.startswith(prefix)]


def _num_weights(info: TensorInfo) -> int:
    count = 1
    for size in info.shape:
        count *= size
    return count
