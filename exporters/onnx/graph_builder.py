"""A thin hand for writing ONNX graphs: nodes with named, typed outputs, and constants that are stored once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

Dims = Sequence[int | str]


class GraphBuilder:
    """Collects nodes and initializers.

    Args:
        stored: Initializers that are written already, by name; they are used as they are.

    Every value is given its type and shape when it is made: the shape inference of onnx knows nothing of
    the contributed operators, and runtimes without a full one (the web's) believe what the file says.
    """

    def __init__(self, stored: Mapping[str, ir.TensorProtocol] | None = None) -> None:
        self._stored = stored or {}
        self._tape = ir.tape.Tape()
        self._constants: dict[str, ir.Value] = {}
        self._shared: dict[str, ir.Value] = {}

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        dtype: ir.DataType,
        shape: Dims,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """A node with one output, called `name`."""
        output = ir.val(name, dtype, list(shape))
        return self._tape.op(op_type, inputs, attributes, domain=domain, name=name, output=output)

    def op_outputs(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[ir.Value],
        *,
        name: str,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """A node with several outputs; an output called "" is not computed."""
        return self._tape.op_multi_out(op_type, inputs, attributes, outputs=outputs, domain=domain, name=name)

    def constant(self, name: str, value: npt.NDArray[Any]) -> ir.Value:
        """An initializer; the same name gives the same one."""
        if name not in self._constants:
            tensor = self._stored.get(name)
            if tensor is None:
                tensor = ir.tensor(np.asarray(value, order="C"), name=name)
            self._constants[name] = self._tape.initializer(tensor, name)
        return self._constants[name]

    def once(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        dtype: ir.DataType,
        shape: Dims,
        **attributes: Any,
    ) -> ir.Value:
        """`op`, or the value that it gave when it was called with this name before."""
        if name not in self._shared:
            self._shared[name] = self.op(op_type, inputs, name, dtype=dtype, shape=shape, **attributes)
        return self._shared[name]

    def graph(
        self,
        inputs: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
        *,
        name: str,
        opsets: Mapping[str, int],
    ) -> ir.Graph:
        """The finished graph."""
        return ir.Graph(
            inputs,
            outputs,
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            name=name,
            opset_imports=dict(opsets),
        )
