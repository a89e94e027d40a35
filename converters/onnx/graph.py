"""An ONNX graph under construction: nodes, small constants, and references to external weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_moe.converters.onnx.data_files import StoredTensor
from edge_moe.errors import MissingExtraError, TargetError

MICROSOFT = "com.microsoft"
PROTOBUF_LIMIT_BYTES = 2**31 - 1
"""A protobuf message cannot be longer."""
_CONTRIB_VERSIONS = {"opset": 21, "ir": 10}
_STANDARD_VERSIONS = {"opset": 25, "ir": 13}
"""The first that know 2-bit integers."""


def import_onnx() -> Any:
    """The package `onnx` with its helpers.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import onnx
        import onnx.helper
        import onnx.numpy_helper
    except ImportError:
        raise MissingExtraError("onnx", "onnx", "writing ONNX models") from None
    return onnx


class Graph:
    """Collects nodes; every method returns the names of the values that it makes."""

    def __init__(self, *, is_standard: bool) -> None:
        """`is_standard` keeps to the operations of ONNX itself, without contrib ones."""
        self.is_standard = is_standard
        self._onnx = import_onnx()
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._count = 0
        self._opset = (_STANDARD_VERSIONS if is_standard else _CONTRIB_VERSIONS)["opset"]

    def require_opset(self, version: int) -> None:
        """Ask for operations that older versions of ONNX do not have."""
        self._opset = max(self._opset, version)

    def op(self, kind: str, inputs: Sequence[str], *, name: str = "", **attributes: Any) -> str:
        """A node of one output, called `name` or numbered."""
        return self.ops(kind, inputs, [name or self._fresh(kind)], **attributes)[0]

    def ops(
        self,
        kind: str,
        inputs: Sequence[str],
        outputs: Sequence[str] | int,
        *,
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """A node with the given outputs, or with so many numbered ones; "" leaves one out."""
        if domain and self.is_standard:
            raise ValueError(f"{domain}.{kind} in a graph of standard operations")
        if isinstance(outputs, int):
            outputs = [self._fresh(kind) for _ in range(outputs)]
        node = self._onnx.helper.make_node(
            kind, list(inputs), list(outputs), self._fresh(kind), domain=domain, **attributes
        )
        self._nodes.append(node)
        return list(outputs)

    def constant(self, values: npt.ArrayLike, dtype: npt.DTypeLike = np.int64) -> str:
        """A small constant inside the protobuf; equal ones are shared."""
        array = np.asarray(values, dtype)
        shape = "x".join(map(str, array.shape))
        name = f"const_{array.dtype}_{shape}_{array.tobytes().hex()}"
        if len(name) > 120:
            name = self._fresh("const")
        if name not in self._initializers:
            self._initializers[name] = self._onnx.numpy_helper.from_array(array, name)
        return name

    def fill(self, elem_type: str, shape: Sequence[int], value: int) -> str:
        """A constant of UINT2, UINT4 or UINT8 that is `value` everywhere."""
        name = f"fill_{elem_type}_{'x'.join(map(str, shape))}_{value}"
        if name not in self._initializers:
            kind = getattr(self._onnx.TensorProto, elem_type)
            values = np.full(prod(shape), value, np.uint8)
            self._initializers[name] = self._onnx.helper.make_tensor(name, kind, shape, values)
        return name

    def weight(self, stored: StoredTensor) -> str:
        """A reference to bytes in an external file."""
        if stored.name not in self._initializers:
            proto = self._onnx.TensorProto()
            proto.name = stored.name
            proto.data_type = getattr(proto, stored.elem_type)
            proto.dims.extend(stored.shape)
            proto.data_location = proto.EXTERNAL
            for key in ("location", "offset", "length"):
                entry = proto.external_data.add()
                entry.key, entry.value = key, str(getattr(stored, key))
            self._initializers[stored.name] = proto
        return stored.name

    def input(self, name: str, elem_type: str, shape: Sequence[int | str]) -> str:
        """Declare an input of the model."""
        self._inputs.append(self._value_info(name, elem_type, shape))
        return name

    def output(self, name: str, elem_type: str, shape: Sequence[int | str]) -> None:
        """Declare an output of the model."""
        self._outputs.append(self._value_info(name, elem_type, shape))

    @contextmanager
    def branch(self) -> Iterator[list[Any]]:
        """Nodes that are made meanwhile go into the yielded list, for `subgraph`."""
        outer, self._nodes = self._nodes, []
        try:
            yield self._nodes
        finally:
            self._nodes = outer

    def subgraph(self, nodes: Sequence[Any], output: str, shape: Sequence[int | str]) -> Any:
        """A branch of an If: it reads the values around it and gives `output`, float32."""
        value = self._value_info(output, "FLOAT", shape)
        return self._onnx.helper.make_graph(nodes, f"branch_{output}", [], [value])

    def model(self) -> Any:
        """The finished onnx.ModelProto."""
        helper = self._onnx.helper
        graph = helper.make_graph(
            self._nodes, "decoder", self._inputs, self._outputs, list(self._initializers.values())
        )
        versions = _STANDARD_VERSIONS if self.is_standard else _CONTRIB_VERSIONS
        opsets = [helper.make_opsetid("", self._opset)]
        if not self.is_standard:
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=versions["ir"], producer_name="edge-moe"
        )

    def _value_info(self, name: str, elem_type: str, shape: Sequence[int | str]) -> Any:
        kind = getattr(self._onnx.TensorProto, elem_type)
        return self._onnx.helper.make_tensor_value_info(name, kind, list(shape))

    def _fresh(self, kind: str) -> str:
        self._count += 1
        return f"{kind}_{self._count}"


def serialised(model: Any, name: str) -> bytes:
    """The bytes of `model` for the file `name`.

    Raises:
        TargetError: more than a protobuf message can hold.
    """
    num_bytes = model.ByteSize()
    if num_bytes > PROTOBUF_LIMIT_BYTES:
        raise TargetError(
            f"target onnx: the graph of {name} alone takes {num_bytes} bytes, protobuf ends at "
            f"{PROTOBUF_LIMIT_BYTES}: keep fewer experts, or leave out --onnx-standard"
        )
    data: bytes = model.SerializeToString()
    return data
