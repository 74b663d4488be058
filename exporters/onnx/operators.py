"""Whether an opset has the operators of a graph, in the forms that the graph uses them in."""

from __future__ import annotations

import onnx.defs
import onnx.helper
import onnx_ir as ir

from cfsp.errors import InputError
from exporters.onnx.graph_builder import CONTRIB

OPSETS = range(13, 24)
"""What may be asked for: older ones give axes as attributes, newer ones have no kernels yet."""

_RUNTIMES_OWN = frozenset({"SimplifiedLayerNormalization"})
"""ONNX Runtime registers it in ONNX's domain, whose opsets do not know it."""


def ir_version_for(opset: int) -> int:
    """The oldest file format that has an opset: older runtimes refuse newer ones."""
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(CONTRIB, 1)]
    return int(onnx.helper.find_min_ir_version_for(opsets, ignore_unknown=True))


def require_operators(graph: ir.Graph, opset: int) -> None:
    """Raise InputError where an opset lacks an operator, or has it with fewer inputs or without an attribute."""
    for node in graph:
        if node.domain or node.op_type in _RUNTIMES_OWN:
            continue
        lacks = _what_is_lacking(node, opset)
        if lacks:
            raise InputError(f"the graph wants {lacks}, which ONNX has not", field="opset", value=opset)


def _what_is_lacking(node: ir.Node, opset: int) -> str | None:
    try:
        schema = onnx.defs.get_schema(node.op_type, opset)
    except onnx.defs.SchemaError:
        return node.op_type
    if len(node.inputs) > schema.max_input:
        return f"{node.op_type} with {len(node.inputs)} inputs"
    unknown = node.attributes.keys() - schema.attributes.keys()
    return f"{node.op_type} with {', '.join(sorted(unknown))}" if unknown else None
