"""A transformers model of which one decoder layer at a time has weights.

The model is built on the meta device. Its own base model is run once per window length with every
layer replaced by a recorder, so masks, positions and rotary embeddings are transformers', not ours.
Memory: one layer in float32, its dense tensors read one by one and its experts one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edge_moe.converters.stacked_experts import empty_stacks, put_expert
from edge_moe.errors import CheckpointError, InputError
from edge_moe.runtime.model import fill_buffers, meta_model
from edge_moe.runtime.moe_block import EXPERT_STACKS, MODULE_STACKS, MoeBlock
from edge_moe.spec import ModelSpec
from edge_moe.tensor_info import FloatArray, TensorInfo, read_range, to_float32

_STACK_NAMES = tuple(f"experts.{name}" for name in MODULE_STACKS)


class LayerSource(Protocol):
    """Where the weights come from: a `Checkpoint`, or a package seen as one."""

    @property
    def folder(self) -> Path: ...

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def tensors(self) -> dict[str, TensorInfo]: ...

    @property
    def dense_tensors(self) -> tuple[TensorInfo, ...]: ...

    def read(self, name: str) -> FloatArray: ...

    def expert(
        self, layer_id: int, expert_id: int
    ) -> tuple[FloatArray, FloatArray, FloatArray]: ...


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps what it is called with and returns its input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.arguments: tuple[Any, ...] = ()
        self.named: dict[str, Any] = {}
        self.hidden: Tensor | None = None
        self.block_type = getattr(layer, "block_type", None)  # models choose a mask by it

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Tensor:
        self.hidden, self.arguments, self.named = hidden_states, arguments, named
        return hidden_states


class LayerRunner:
    """Runs decoder layers of a transformers model one at a time, as its base model would."""

    def __init__(self, base: Any, norm_attribute: str, location: Path) -> None:
        """`base` has `layers`, and under `norm_attribute` what follows them.

        `location` is where damaged weights come from.
        """
        self._base = base
        self._layers: Any = base.layers
        self._norm_attribute = norm_attribute
        self._location = location
        self._recorded: dict[int, list[_Recorder]] = {}

    def run(self, layer_id: int, hidden: Tensor) -> Tensor:
        """[1, W, H] -> [1, W, H] through the loaded layer `layer_id`; one window, no padding.

        Raises:
            CheckpointError: the result holds NaN or infinity.
        """
        call = self._recorders(hidden)[layer_id]
        output: Tensor = self._layers[layer_id](hidden, *call.arguments, **call.named)
        if not torch.isfinite(output).all():
            raise CheckpointError(
                f"{self._location}: layer {layer_id} computes NaN or infinity from finite "
                "input; its weights are damaged: download it again"
            )
        return output

    def _recorders(self, hidden: Tensor) -> list[_Recorder]:
        """What every layer is called with for windows of this length."""
        num_tokens = hidden.shape[1]
        if num_tokens not in self._recorded:
            self._recorded[num_tokens] = self._record(hidden)
            for recorder in self._recorded[num_tokens]:
                recorder.hidden = None
        return self._recorded[num_tokens]

    def _record(self, embedded: Tensor) -> list[_Recorder]:
        """The base model's own way to its layers, which do nothing."""
        recorders = nn.ModuleList(_Recorder(layer) for layer in self._layers)
        norm = getattr(self._base, self._norm_attribute)
        setattr(self._base, self._norm_attribute, nn.Identity())
        self._base.layers = recorders
        try:
            self._base(inputs_embeds=embedded, use_cache=False)
        finally:
            self._base.layers = self._layers
            setattr(self._base, self._norm_attribute, norm)
        return list(recorders)  # type: ignore[arg-type]


class LayerStream(LayerRunner):
    """Decoder layers of `checkpoint`, loaded and run one at a time, in float32 on the CPU."""

    def __init__(self, checkpoint: LayerSource, experts_implementation: str) -> None:
        """Build the model without weights.

        `experts_implementation` is a name registered in transformers' `ALL_EXPERTS_FUNCTIONS`.

        Raises:
            SpecError: transformers cannot build it.
        """
        model = meta_model(checkpoint.folder, torch.float32, experts_implementation)
        norm = checkpoint.spec.module_name(checkpoint.spec.final_norm_name).split(".")[-2]
        super().__init__(model.base_model, norm, checkpoint.folder)
        self._checkpoint = checkpoint
        self._model: nn.Module = model.eval().requires_grad_(False)
        fill_buffers(self._model, torch.device("cpu"))
        self._expert_buffers: tuple[Tensor, Tensor] | None = None

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """Hidden states that enter layer 0, [1, T, H]. Reads only the rows it needs.

        Raises:
            InputError: a token id outside the embedding table.
            CheckpointError: NaN or infinity in a row, or the file ends before it.
        """
        name = self._checkpoint.spec.embedding_name
        info = self._checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self._checkpoint.folder}: {name!r} is missing")
        num_rows, row_bytes = info.shape[0], info.num_bytes // info.shape[0]
        wanted, positions = np.unique(np.asarray(token_ids), return_inverse=True)
        if wanted[0] < 0 or wanted[-1] >= num_rows:
            raise InputError(
                f"token id {wanted[-1]} is outside the model's {num_rows} embedding rows: "
                "the tokenizer does not belong to this model"
            )
        starts = info.offset + wanted * row_bytes
        raw = b"".join(read_range(info.path, int(start), row_bytes) for start in starts)
        rows = to_float32(raw, info.dtype).reshape(len(wanted), -1)
        if not np.isfinite(rows).all():
            raise CheckpointError(
                f"{info.path}: {info.name!r} holds NaN or infinity: download the file again"
            )
        return self._entering(rows, positions)

    @torch.no_grad()
    def _entering(self, rows: FloatArray, positions: npt.NDArray[np.int64]) -> Tensor:
        """[1, T, H] what the model makes of embedding rows [n, H] before its first layer."""
        table = self._base.get_input_embeddings()
        meta, table.weight = table.weight, nn.Parameter(aligned(rows), requires_grad=False)
        try:
            embedded = table(torch.from_numpy(positions.reshape(1, -1)))
        finally:
            table.weight = meta
        entered = self._record(embedded)[0].hidden
        if entered is None:
            raise RuntimeError("the model did not call its first layer")
        return aligned(entered[0].numpy())[None]

    @contextmanager
    def loaded(self, layer_id: int) -> Iterator[nn.Module]:
        """Layer `layer_id` with its weights; they are dropped when the block ends.

        Raises:
            CheckpointError: a tensor is missing, misshapen, or holds NaN or infinity.
        """
        layer: nn.Module = self._layers[layer_id]
        with torch.no_grad():
            self._assign(layer, layer_id)
        try:
            yield layer
        finally:
            layer.to(device="meta")

    def final_norm(self) -> nn.Module:
        """The norm after the last layer, with its weights.

        Raises:
            CheckpointError: its weights are missing or hold NaN or infinity.
        """
        name = self._checkpoint.spec.final_norm_name
        norm: nn.Module = getattr(self._base, self._norm_attribute)
        state = {"weight": nn.Parameter(aligned(self._checkpoint.read(name)), requires_grad=False)}
        bias_name = f"{name.removesuffix('.weight')}.bias"
        if bias_name in self._checkpoint.tensors:
            bias = aligned(self._checkpoint.read(bias_name))
            state["bias"] = nn.Parameter(bias, requires_grad=False)
        norm.load_state_dict(state, assign=True)
        return norm

    def moe_block(self, layer_id: int) -> MoeBlock:
        """The MoE block of layer `layer_id`."""
        return MoeBlock(self._model, self._checkpoint.spec, layer_id)

    def _assign(self, layer: nn.Module, layer_id: int) -> None:
        spec = self._checkpoint.spec
        prefix = f"model.layers.{layer_id}."
        state: dict[str, Tensor] = {}
        for info in self._checkpoint.dense_tensors:
            name = spec.module_name(info.name)
            if name.startswith(prefix):
                state[name[len(prefix) :]] = aligned(self._checkpoint.read(info.name))
        is_moe = layer_id in spec.moe_layer_ids
        if is_moe:
            experts = self.moe_block(layer_id).experts
            for name, stack in zip(EXPERT_STACKS, self._experts(layer_id), strict=True):
                setattr(experts, name, nn.Parameter(stack, requires_grad=False))
        try:
            missing, _ = layer.load_state_dict(state, strict=False, assign=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(
                f"{self._checkpoint.folder}: layer {layer_id} does not fit config.json: {reason}"
            ) from None
        if is_moe:
            missing = [name for name in missing if not name.endswith(_STACK_NAMES)]
        if missing:
            raise CheckpointError(
                f"{self._checkpoint.folder}: layer {layer_id} lacks {len(missing)} tensors, "
                f"first {prefix + missing[0]!r}; a weight file may not have been downloaded"
            )

    def _experts(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """(gate_up_proj [E, 2I, H], down_proj [E, H, I]); the same memory for every layer."""
        spec = self._checkpoint.spec
        if self._expert_buffers is None:
            self._expert_buffers = empty_stacks(spec, spec.num_experts)
        for expert_id in range(spec.num_experts):
            expert = self._checkpoint.expert(layer_id, expert_id)
            put_expert(self._expert_buffers, expert_id, expert)
        return self._expert_buffers


def aligned(values: FloatArray) -> Tensor:
    """A copy in memory of torch's own: the same alignment in every run, so the same last bits."""
    tensor = torch.empty(values.shape)
    tensor.numpy()[...] = values
    return tensor
