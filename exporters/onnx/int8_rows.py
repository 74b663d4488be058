"""Weights in int8 with a scale for each output, multiplied as integers: W8A8 in standard operators.

    y = ((x_q - 128) (W_q - 128)^T) * s_x * s_w,   x_q = 128 + round(x / s_x),  s_x = max |x| / 127 of the token,
                                                   W_q likewise with s_w of the row

Both are unsigned: WebAssembly has a fast kernel for x_q of that kind alone, and where a processor has AVX2 but no VNNI,
ONNX Runtime adds pairs of products of an unsigned and a signed number in 16 bits, which 255 * 127 * 2 does not fit.

MatMulInteger is fast where MatMulNBits is not: runtimes in a browser unpack the latter's weights for every token.
A scale for each token keeps apart the few tokens whose activations are a hundred times as large as all others',
which one scale for all of them, DynamicQuantizeLinear's, does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from exporters.onnx.graph_builder import GraphBuilder, Numbers
from exporters.onnx.layers import TABLE, TOKENS, add_bias
from exporters.onnx.matrix import ZERO_OF_ROWS, Int8Rows, round_rows
from exporters.onnx.weights import Weights

_LARGEST = 127


@dataclass(frozen=True)
class Int8Linear:
    """A Linear of int8 rows.

    Attributes:
        weight: W.
        bias: b (out_features,), or None.
        table_name: Of the embedding whose rows these are, stored as W and not as W^T.
    """

    weight: Int8Rows
    bias: Numbers | None = None
    table_name: str | None = None

    @property
    def out_features(self) -> int:
        """Rows of W."""
        return int(self.weight.data.shape[0])

    def apply(self, builder: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
        """See `exporters.onnx.layers.Layer`."""
        stored, shape = self.table_name or f"{name}.weight", (*TOKENS, self.out_features)
        if self.table_name is None:
            weight = builder.constant(f"{stored}.q8", self.weight.data.T)
        else:
            table = builder.constant(f"{stored}.q8", self.weight.data)
            turned = self.weight.data.shape[::-1]
            weight = builder.op("Transpose", [table], f"{stored}.transpose", shape=turned, perm=[1, 0])
        rounded, scale = _rounded(builder, x)
        zero = builder.constant("zero_q8", np.uint8(ZERO_OF_ROWS))
        factors = [rounded, weight, zero, zero]
        product = builder.op(
            "MatMulInteger", factors, f"{name}.product", dtype=ir.DataType.INT32, shape=shape
        )
        y = builder.cast(product, f"{name}.float", ir.DataType.FLOAT)
        y = builder.op("Mul", [y, scale], f"{name}.times_token")
        scales = builder.constant(f"{stored}.scale", self.weight.scales)
        y = builder.op("Mul", [y, scales], name if self.bias is None else f"{name}.times_row")
        return add_bias(builder, y, self.bias, name)


@dataclass(frozen=True)
class Int8Embedding:
    """A table of int8 rows; a tied head multiplies by the same bytes, turned when the file is loaded."""

    table: Int8Rows

    def look_up(self, builder: GraphBuilder, ids: ir.Value, name: str) -> ir.Value:
        """See `exporters.onnx.layers.Embedding`."""
        data = builder.constant(f"{TABLE}.q8", self.table.data)
        scales = builder.constant(f"{TABLE}.scale", self.table.scales)
        rows = builder.op("Gather", [data, ids], f"{name}.rows", shape=(*TOKENS, self.table.data.shape[1]))
        values = builder.cast(rows, f"{name}.float", ir.DataType.FLOAT)
        values = builder.op("Sub", [values, _middle(builder)], f"{name}.whole")
        scale = builder.op("Gather", [scales, ids], f"{name}.row_scale", shape=TOKENS)
        last = builder.constant("last_axis", [-1])
        apart = builder.op("Unsqueeze", [scale, last], f"{name}.scale", shape=(*TOKENS, 1))
        return builder.op("Mul", [values, apart], name)

    def as_head(self) -> Int8Linear:
        """See `exporters.onnx.layers.Embedding`."""
        return Int8Linear(self.table, table_name=TABLE)


class Int8Weights(Weights):
    """Layers and embedding of int8 rows."""

    def layer(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Int8Linear:
        """See `Weights`."""
        return Int8Linear(round_rows(weight), bias)

    def embedding(self, table: torch.Tensor, *, tied: bool) -> Int8Embedding:
        """See `Weights`."""
        return Int8Embedding(round_rows(table))


def _rounded(builder: GraphBuilder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(x_q in uint8, s_x of each token); layers that read the same x share them."""
    assert x.shape is not None  # every value of a GraphBuilder has its shape
    shape = (*TOKENS, x.shape[-1])
    last = builder.constant("last_axis", [-1])
    sizes = builder.op("Abs", [x], f"{x.name}.abs", shape=shape)
    largest = builder.op("ReduceMax", [sizes, last], f"{x.name}.largest", shape=(*TOKENS, 1), keepdims=1)
    # A token of zeros must not divide by zero.
    least = builder.constant("smallest_scale", np.float32(1e-30))
    share = builder.constant("int8_share", np.float32(1 / _LARGEST))
    scale = builder.op("Mul", [largest, share], f"{x.name}.scale")
    scale = builder.op("Max", [scale, least], f"{x.name}.token_scale")
    steps = builder.op("Div", [x, scale], f"{x.name}.steps", shape=shape)
    whole = builder.op("Round", [steps], f"{x.name}.whole")
    moved = builder.op("Add", [whole, _middle(builder)], f"{x.name}.moved")
    return builder.cast(moved, f"{x.name}.q8", ir.DataType.UINT8), scale


def _middle(builder: GraphBuilder) -> ir.Value:
    return builder.constant("middle_q8", np.float32(ZERO_OF_ROWS))
