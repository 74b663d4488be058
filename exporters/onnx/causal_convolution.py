"""A convolution over the text, each channel on its own, in ONNX's standard operators.

    y_t = sum over k of weights[k] z_{t - length + 1 + k} + bias

What is kept of a text are its last `length` z, zeros before its start, as (batch_size, channels, length): one more
than the next token reads, as ONNX Runtime GenAI and transformers.js want it. Rows of a batch that end with padding
keep the z of their last tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.onnx.graph_builder import GraphBuilder, Numbers
from exporters.onnx.layers import TOKENS
from exporters.onnx.text_mixer import MixerCall, count_column

_END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Kernels:
    """What each channel is multiplied by."""

    weights: Numbers  # (length, channels), the earliest token's first
    bias: Numbers | None = None  # (channels,), or None

    @property
    def length(self) -> int:
        """Tokens that a token sees, itself included."""
        return int(self.weights.shape[0])

    @property
    def channels(self) -> int:
        """Numbers of a token."""
        return int(self.weights.shape[1])

    @property
    def kept_shape(self) -> ir.Shape:
        """Of what is kept of a text."""
        return ir.Shape(["batch_size", self.channels, self.length])


def convolve(call: MixerCall, kernels: Kernels, z: ir.Value, prefix: str) -> tuple[ir.Value, ir.Value]:
    """Add the nodes of a convolution.

    Args:
        call: The graph, and as "conv" what is kept of the text.
        kernels: The weights.
        z: (batch_size, sequence_length, channels).
        prefix: Begins the names of its nodes.

    Returns:
        y (batch_size, sequence_length, channels), and what is kept of the text then.
    """
    b = call.builder
    before_shape = ("batch_size", kernels.length, kernels.channels)
    before = b.op("Transpose", [call.pasts["conv"]], f"{prefix}.before", perm=[0, 2, 1], shape=before_shape)
    seen_shape = ("batch_size", f"{kernels.length}+tokens", kernels.channels)
    seen = b.op("Concat", [before, z], f"{prefix}.seen", axis=1, shape=seen_shape)
    return _sum(b, kernels, seen, prefix), _last(call, kernels, seen, prefix)


def _sum(b: GraphBuilder, kernels: Kernels, seen: ir.Value, prefix: str) -> ir.Value:
    """The convolution of what is seen, (batch_size, sequence_length, channels): one product for each place.

    Of ONNX Runtime's Conv each channel is a product of its own, which for one token is slower by far.
    """
    total: ir.Value | None = None
    axis, shape = b.constant("token_axis", [1]), (*TOKENS, kernels.channels)
    for place in range(kernels.length):
        start, stop = place + 1, place + 1 - kernels.length
        ends = [b.constant(f"place_{start}", [start]), b.constant(f"place_{stop}", [stop or _END]), axis]
        moved = b.op("Slice", [seen, *ends], f"{prefix}.seen.{place}", shape=shape)
        kernel = b.constant(f"{prefix}.kernel.{place}", kernels.weights[place])
        product = b.op("Mul", [moved, kernel], f"{prefix}.product.{place}")
        total = product if total is None else b.op("Add", [total, product], f"{prefix}.sum.{place}")
    assert total is not None  # a kernel has a length
    return (
        total
        if kernels.bias is None
        else b.op("Add", [total, b.constant(f"{prefix}.bias", kernels.bias)], f"{prefix}.sum")
    )


def _last(call: MixerCall, kernels: Kernels, seen: ir.Value, prefix: str) -> ir.Value:
    """The last of each row that is no padding, (batch_size, channels, length)."""
    b, length = call.builder, kernels.length
    last = b.constant("last_axis", [-1])
    column = count_column(b, call.tokens.count)
    steps = b.constant(f"steps_{length}", list(range(length)))
    places = b.op("Add", [column, steps], f"kept_places_{length}", shape=["batch_size", length])
    places = b.op("Unsqueeze", [places, last], f"kept_places_{length}.apart", shape=["batch_size", length, 1])
    shape = ("batch_size", length, kernels.channels)
    rows = b.op("GatherND", [seen, places], f"{prefix}.kept", batch_dims=1, shape=shape)
    return b.op("Transpose", [rows], call.presents["conv"], perm=[0, 2, 1], shape=kernels.kept_shape)
