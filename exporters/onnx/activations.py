"""Functions of single numbers, in ONNX Runtime's operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import onnx_ir as ir

from exporters.onnx.graph_builder import CONTRIB, GraphBuilder


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
