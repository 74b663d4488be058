"""A short convolution over the text (LFM 2's, in the place of attention) in ONNX's standard operators.

With b, c and x the three parts of in_proj(h), each (batch_size, sequence_length, hidden_size), channel by channel

    y = c convolution(b x)

goes through out_proj; see `exporters.onnx.causal_convolution`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from exporters.onnx.causal_convolution import Kernels, convolve
from exporters.onnx.graph_builder import Numbers
from exporters.onnx.layers import Layer, split_last
from exporters.onnx.text_mixer import MixerCall


@dataclass(frozen=True)
class ShortConvolution:
    """See `exporters.onnx.text_mixer.TextMixer`."""

    module: ClassVar[str] = "conv"
    input_norm: Numbers | None  # (hidden_size,) norm before it; None where it reads the residual sum as it is
    in_proj: Layer  # the gate b, the gate c and x, of all tokens
    kernels: Kernels  # of hidden_size channels
    out_proj: Layer  # the convolution's output

    @property
    def kept(self) -> Mapping[str, ir.Shape]:
        """See `TextMixer`."""
        return {"conv": self.kernels.kept_shape}

    def mix(self, call: MixerCall, hidden: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        """See `TextMixer`."""
        b, prefix, size = call.builder, call.prefix, self.kernels.channels
        projected = self.in_proj.apply(b, hidden, f"{prefix}.in_proj")
        gate, output_gate, x = split_last(
            b, projected, {f"{prefix}.{part}": size for part in ("b", "c", "x")}, f"{prefix}.split"
        )
        z = b.op("Mul", [gate, x], f"{prefix}.gated")
        y, kept = convolve(call, self.kernels, z, prefix)
        y = b.op("Mul", [output_gate, y], f"{prefix}.output")
        return self.out_proj.apply(b, y, f"{prefix}.out_proj"), [kept]
