"""A thin hand for writing ONNX graphs: nodes with named, typed outputs, and constants that are stored once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

Dims = Iterable[int | str | ir.SymbolicDim | None]
Numbers = npt.NDArray[Any] | torch.Tensor
"""Of a weight."""


class Unwritten(ir.LazyTensor):
    """Zeros in place of numbers that there are not: they take no memory, and in a file they are a hole.

    Args:
        like: A tensor on torch's meta device.
        name: Of the initializer.
    """

    def __init__(self, like: torch.Tensor, name: str) -> None:
        shape, dtype = tuple(like.shape), torch.empty(0, dtype=like.dtype).numpy().dtype
        super().__init__(
            lambda: ir.tensor(np.zeros(shape, dtype), name=name),
            ir.DataType.from_numpy(dtype),
            ir.Shape(shape),
            name=name,
        )

    def tofile(self, file: BinaryIO) -> None:
        """Take as much room as numbers would."""
        file.seek(self.nbytes - 1, os.SEEK_CUR)
        file.write(b"\0")


class GraphBuilder:
    """Collects nodes and initializers; what is asked for twice by one name is there once.

    Args:
        stored: Initializers that are written already, by name; they are used as they are.

    Attributes:
        tape: Nodes and initializers, and the way to add nodes with several outputs.

    Every value is given its type and shape when it is made: the shape inference of onnx knows nothing of
    the contributed operators, and runtimes without a full one (the web's) believe what the file says.
    """

    def __init__(self, stored: Mapping[str, ir.TensorProtocol] | None = None) -> None:
        self._stored = stored or {}
        self.tape = ir.tape.Tape()
        self._values: dict[str, ir.Value] = {}

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        name: str,
        *,
        dtype: ir.DataType | None = None,
        shape: Dims | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """A node with one output, called `name`; its type and shape are the first input's unless given."""
        if name not in self._values:
            dims = inputs[0].shape if shape is None else shape
            assert dims is not None  # every value that is made here has a shape
            output = ir.val(name, dtype or inputs[0].dtype, ir.Shape(dims))
            self._values[name] = self.tape.op(
                op_type, inputs, attributes, domain=domain, name=name, output=output
            )
        return self._values[name]

    def constant(self, name: str, value: npt.ArrayLike | torch.Tensor) -> ir.Value:
        """An initializer; Python's integers become int64, and a tensor that is nowhere is `Unwritten`."""
        if name not in self._values:
            tensor = self._stored.get(name)
            if tensor is None:
                tensor = _tensor(name, value)
            self._values[name] = self.tape.initializer(tensor, name)
        return self._values[name]

    def cast(self, x: ir.Value, name: str, dtype: ir.DataType) -> ir.Value:
        """The numbers of x in a type; x itself if it is of that type."""
        return x if x.dtype == dtype else self.op("Cast", [x], name, dtype=dtype, to=dtype)


def _tensor(name: str, value: npt.ArrayLike | torch.Tensor) -> ir.TensorProtocol:
    if isinstance(value, torch.Tensor) and value.is_meta:
        return Unwritten(value, name)
    return ir.tensor(np.asarray(value, order="C"), name=name)


def silu(builder: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
    """x sigmoid(alpha x) with alpha = 1."""
    return builder.op("QuickGelu", [x], name, alpha=1.0, domain=CONTRIB)


def gelu_tanh(builder: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
    """GELU in its approximation by tanh."""
    return builder.op("FastGelu", [x], name, domain=CONTRIB)


ACTIVATIONS: Mapping[str, Callable[[GraphBuilder, ir.Value, str], ir.Value]] = MappingProxyType(
    {"silu": silu, "gelu_tanh": gelu_tanh}
)
"""Of an FFN, as `exporters.checkpoint_reader` names them."""
