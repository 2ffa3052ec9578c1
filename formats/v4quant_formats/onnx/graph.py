"""ONNX graphs put together by hand: nodes, small constants, and weights that stay in a file.

A weight never enters the graph. An initializer only says in which file its bytes lie, from where
and how many ("external data"), so a graph of a layer of gigabytes is a few kilobytes, and the 2 GB
a protobuf may hold are never in question. The data file is an ordinary safetensors file: its header
gives every tensor's place, runtimes map it into memory, and any safetensors reader opens it too.

Operator set 21 is the oldest with blocked DequantizeLinear; runtimes from 2024 on know it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from v4quant_formats.errors import WrongDtype
from v4quant_formats.spec import TensorSpec
from v4quant_kernels.errors import V4QuantError

OPSET = 21
IR_VERSION = 10
MICROSOFT = "com.microsoft"
"""Domain of onnxruntime's own operators."""

# safetensors dtype -> number of onnx.TensorProto.DataType.
ONNX_DTYPES = {"F32": 1, "U8": 2, "I32": 6, "I64": 7, "F16": 10, "BF16": 16, "F8_E4M3": 17}

Shape = Sequence[int | str]


class OnnxUnavailable(V4QuantError):
    """The onnx package is not installed."""


def require_onnx() -> Any:
    """The onnx package, imported when first needed. Raises OnnxUnavailable."""
    try:
        import onnx
        import onnx.helper
        import onnx.numpy_helper
    except ImportError:
        raise OnnxUnavailable(
            "ONNX files need the package onnx; pip install onnx, or install v4quant with its "
            "extra 'onnx'"
        ) from None
    return onnx


class Graph:
    """One graph being built; every method that adds a value returns its name.

    `prefix` keeps the names of a subgraph (a loop's body) apart from those around it, which it may
    refer to.
    """

    def __init__(self, name: str, prefix: str = "") -> None:
        """An empty graph."""
        self._onnx = require_onnx()
        self._name, self._prefix = name, prefix
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def input(self, name: str, dtype: str, shape: Shape) -> str:
        """Declare an input; text in `shape` names an extent known only at run time."""
        self._inputs.append(self._value(name, dtype, shape))
        return name

    def output(self, name: str, value: str, dtype: str, shape: Shape) -> None:
        """Declare `value` an output called `name`."""
        self._nodes.append(self._onnx.helper.make_node("Identity", [value], [name]))
        self._outputs.append(self._value(name, dtype, shape))

    def _value(self, name: str, dtype: str, shape: Shape) -> Any:
        if dtype == "BOOL":
            return self._onnx.helper.make_tensor_value_info(name, 9, shape)
        return self._onnx.helper.make_tensor_value_info(name, ONNX_DTYPES[dtype], shape)

    def node(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node of one output."""
        return self.nodes(op, 1, *inputs, domain=domain, **attributes)[0]

    def nodes(
        self, op: str, outputs: int, *inputs: str, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node of several outputs."""
        names = [f"{self._prefix}{op}_{len(self._nodes)}_{i}" for i in range(outputs)]
        self._nodes.append(
            self._onnx.helper.make_node(op, list(inputs), names, domain=domain, **attributes)
        )
        return names

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike = np.int64) -> str:
        """A small constant, kept in the graph."""
        name = f"{self._prefix}constant_{len(self._initializers)}"
        array = np.asarray(value, dtype=dtype)
        self._initializers[name] = self._onnx.numpy_helper.from_array(array, name)
        return name

    def stored(self, spec: TensorSpec) -> str:
        """A tensor whose bytes stay at the place `spec` names. Raises WrongDtype."""
        if spec.dtype not in ONNX_DTYPES:
            raise WrongDtype(f"{spec.file}: '{spec}' has a dtype no ONNX initializer is made of")
        assert spec.file, spec
        tensor = self._onnx.TensorProto(
            name=spec.name, data_type=ONNX_DTYPES[spec.dtype], dims=spec.shape
        )
        tensor.data_location = self._onnx.TensorProto.EXTERNAL
        place = {"location": spec.file, "offset": spec.offset, "length": spec.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self._initializers[spec.name] = tensor
        return spec.name

    def proto(self) -> Any:
        """The finished onnx.GraphProto."""
        return self._onnx.helper.make_graph(
            self._nodes,
            self._name,
            self._inputs,
            self._outputs,
            list(self._initializers.values()),
        )

    def model(self, text: str, facts: Mapping[str, str]) -> bytes:
        """The finished model as bytes: `text` for people, `facts` as metadata."""
        helper = self._onnx.helper
        model = helper.make_model(
            self.proto(),
            producer_name="v4quant",
            doc_string=text,
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
        )
        helper.set_model_props(model, dict(facts))
        data: bytes = model.SerializeToString(deterministic=True)
        return data
