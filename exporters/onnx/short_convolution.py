"""A short convolution over the text (LFM 2's, in the place of attention) in ONNX's standard operators.

With b, c and x the three parts of in_proj(h), each (batch_size, sequence_length, hidden_size), channel by channel

    z   = b x
    y_t = c_t (sum over k of kernels[k] z_{t - length + 1 + k} + bias)

goes through out_proj. What is kept of a text are its last `length` z, zeros before its start, as (batch_size,
hidden_size, length): one more than the next token reads, as ONNX Runtime GenAI and transformers.js want it. Rows of a
batch that end with padding keep the z of their last tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.onnx.graph_builder import GraphBuilder, Numbers
from exporters.onnx.layers import TOKENS, Layer

_END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class ShortConvolution:
    """A block's convolution, with the norm before it.

    Attributes:
        input_norm: (hidden_size,) norm before it; None where it reads the residual sum as it is.
        in_proj: The gate b, the gate c and x, of all tokens.
        kernels: (length, hidden_size), the earliest token's first.
        out_proj: The convolution's output.
        bias: (hidden_size,), or None.
    """

    input_norm: Numbers | None
    in_proj: Layer
    kernels: Numbers
    out_proj: Layer
    bias: Numbers | None = None

    @property
    def length(self) -> int:
        """Tokens that a token sees, itself included."""
        return int(self.kernels.shape[0])

    @property
    def hidden_size(self) -> int:
        """Channels."""
        return int(self.kernels.shape[1])


def kept_shape(block: ShortConvolution) -> ir.Shape:
    """Of what a block keeps of a text."""
    return ir.Shape(["batch_size", block.hidden_size, block.length])


def convolve(
    builder: GraphBuilder,
    block: ShortConvolution,
    hidden: ir.Value,
    past: ir.Value,
    new_tokens: ir.Value,
    names: tuple[str, str],
) -> tuple[ir.Value, ir.Value]:
    """Add the nodes of a convolution.

    Args:
        builder: Of the graph.
        block: The weights.
        hidden: (batch_size, sequence_length, hidden_size), normed.
        past: What is kept of the text before.
        new_tokens: Of each row, how many of the tokens are no padding, (batch_size,) int64.
        names: Of the block's convolution, and of what is kept of the text then.

    Returns:
        Its output, and what is kept of the text then.
    """
    b, prefix, size = builder, names[0], block.hidden_size
    projected = block.in_proj.apply(b, hidden, f"{prefix}.in_proj")
    gate, output_gate, x = _thirds(b, projected, size, prefix)
    z = b.op("Mul", [gate, x], f"{prefix}.gated")
    before = b.op(
        "Transpose", [past], f"{prefix}.before", perm=[0, 2, 1], shape=("batch_size", block.length, size)
    )
    seen = b.op(
        "Concat", [before, z], f"{prefix}.seen", axis=1, shape=("batch_size", f"{block.length}+tokens", size)
    )
    y = b.op("Mul", [output_gate, _sum(b, block, seen, prefix)], f"{prefix}.output")
    kept = _last(b, seen, new_tokens, block, names)
    return block.out_proj.apply(b, y, f"{prefix}.out_proj"), kept


def _thirds(b: GraphBuilder, x: ir.Value, size: int, prefix: str) -> list[ir.Value]:
    parts = [ir.val(f"{prefix}.{part}", x.dtype, ir.Shape([*TOKENS, size])) for part in ("b", "c", "x")]
    sizes = b.constant(f"thirds_of_{size}", [size] * 3)
    b.tape.op_multi_out("Split", [x, sizes], {"axis": -1}, outputs=parts, name=f"{prefix}.split")
    return parts


def _sum(b: GraphBuilder, block: ShortConvolution, seen: ir.Value, prefix: str) -> ir.Value:
    """The convolution of what is seen, (batch_size, sequence_length, hidden_size): one product for each place.

    Of ONNX Runtime's Conv each channel is a product of its own, which for one token is slower by far.
    """
    total: ir.Value | None = None
    axis, shape = b.constant("token_axis", [1]), (*TOKENS, block.hidden_size)
    for place in range(block.length):
        start, stop = place + 1, place + 1 - block.length
        ends = [b.constant(f"place_{start}", [start]), b.constant(f"place_{stop}", [stop or _END]), axis]
        moved = b.op("Slice", [seen, *ends], f"{prefix}.seen.{place}", shape=shape)
        kernel = b.constant(f"{prefix}.kernel.{place}", block.kernels[place])
        product = b.op("Mul", [moved, kernel], f"{prefix}.product.{place}")
        total = product if total is None else b.op("Add", [total, product], f"{prefix}.sum.{place}")
    assert total is not None  # a kernel has a length
    return (
        total
        if block.bias is None
        else b.op("Add", [total, b.constant(f"{prefix}.bias", block.bias)], f"{prefix}.sum")
    )


def _last(
    b: GraphBuilder, seen: ir.Value, new_tokens: ir.Value, block: ShortConvolution, names: tuple[str, str]
) -> ir.Value:
    """The last of each row that is no padding, (batch_size, hidden_size, length)."""
    length, last = block.length, b.constant("last_axis", [-1])
    column = b.op("Unsqueeze", [new_tokens, last], "new_tokens.column", shape=["batch_size", 1])
    steps = b.constant(f"steps_{length}", list(range(length)))
    places = b.op("Add", [column, steps], f"kept_places_{length}", shape=["batch_size", length])
    places = b.op("Unsqueeze", [places, last], f"kept_places_{length}.apart", shape=["batch_size", length, 1])
    shape = ("batch_size", length, block.hidden_size)
    rows = b.op("GatherND", [seen, places], f"{names[0]}.kept", batch_dims=1, shape=shape)
    return b.op("Transpose", [rows], names[1], perm=[0, 2, 1], shape=kept_shape(block))
