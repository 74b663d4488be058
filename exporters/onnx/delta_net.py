"""A gated delta net (Qwen 3.5's, in the place of attention) in ONNX Runtime's LinearAttention.

With q, k and v the parts of act(convolution(in_proj_qkv(h))), q and k of each head made to length one, and of each
value head a state S (key_head_dim, value_head_dim), zeros before the text (arXiv 2412.06464):

    g_t = rates softplus(in_proj_a(h_t) + bias)         rates are -exp(A_log)
    b_t = sigmoid(in_proj_b(h_t))
    S_t = exp(g_t) S_{t-1} + b_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T
    y_t = out_proj(norm(S_t^T q_t / sqrt(key_head_dim)) silu(in_proj_z(h_t)))

What is kept of a text are S and what the convolution reads. g and b of padding are 0, so that S stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from exporters.onnx.causal_convolution import Kernels, convolve
from exporters.onnx.graph_builder import ACTIVATIONS, CONTRIB, GraphBuilder, Numbers, silu
from exporters.onnx.layers import TOKENS, Layer, norm_heads, split_last
from exporters.onnx.text_mixer import MixerCall, NewTokens, count_column, token_places

_LENGTH_EPSILON = 1e-6
"""What is added to the square of a query's or key's length; transformers' number."""


@dataclass(frozen=True)
class DeltaNet:
    """See `exporters.onnx.text_mixer.TextMixer`."""

    module: ClassVar[str] = "linear_attn"
    input_norm: Numbers | None  # (hidden_size,) norm before it; None where it reads the residual sum as it is
    in_proj_qkv: Layer  # queries and keys of all key heads, and values of all value heads
    in_proj_z: Layer  # the gate of what it gives
    in_proj_b: Layer  # of each value head, how much of a token is written
    in_proj_a: Layer  # of each value head, how fast its state fades
    kernels: Kernels  # of the convolution of queries, keys and values
    rates: Numbers  # (value_heads,) float32, all below 0
    bias: Numbers  # (value_heads,) float32
    norm: Numbers  # (value_head_dim,) of each head's output
    out_proj: Layer  # its output
    key_heads: int  # each is read by as many value heads
    rms_norm_eps: float  # of `norm`
    activation: str  # behind the convolution, a name in ACTIVATIONS

    @property
    def _value_heads(self) -> int:
        return len(self.rates)

    @property
    def _value_width(self) -> int:
        return self._value_heads * len(self.norm)

    @property
    def _key_width(self) -> int:
        return (self.kernels.channels - self._value_width) // 2

    @property
    def _key_head_dim(self) -> int:
        return self._key_width // self.key_heads

    @property
    def kept(self) -> Mapping[str, ir.Shape]:
        """See `TextMixer`."""
        state: list[int | str] = ["batch_size", self._value_heads, self._key_head_dim, len(self.norm)]
        return {"conv": self.kernels.kept_shape, "recurrent": ir.Shape(state)}

    def mix(self, call: MixerCall, hidden: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        """See `TextMixer`."""
        assert hidden.dtype is not None  # every value of a GraphBuilder has its type
        b, prefix, dtype = call.builder, call.prefix, hidden.dtype
        qkv = self.in_proj_qkv.apply(b, hidden, f"{prefix}.in_proj_qkv")
        convolved, kept = convolve(call, self.kernels, qkv, f"{prefix}.conv1d")
        qkv = ACTIVATIONS[self.activation](b, convolved, f"{prefix}.qkv")
        query, key, value = self._parts(b, qkv, dtype, prefix)
        attended, state = (
            ir.val(name, dtype, shape)
            for name, shape in (
                (f"{prefix}.attended", ir.Shape([*TOKENS, self._value_width])),
                (call.presents["recurrent"], self.kept["recurrent"]),
            )
        )
        b.tape.op_multi_out(
            "LinearAttention",
            [query, key, value, call.pasts["recurrent"], *self._gates(call, hidden, dtype)],
            {
                "update_rule": "gated_delta",
                "q_num_heads": self.key_heads,
                "kv_num_heads": self._value_heads,
                "scale": self._key_head_dim**-0.5,
            },
            outputs=[attended, state],
            domain=CONTRIB,
            name=prefix,
        )
        gamma = b.constant(f"{prefix}.norm.weight", self.norm)
        normed = norm_heads(b, attended, gamma, self._value_heads, f"{prefix}.norm", self.rms_norm_eps)
        gate = silu(b, self.in_proj_z.apply(b, hidden, f"{prefix}.in_proj_z"), f"{prefix}.gate")
        y = b.op("Mul", [normed, gate], f"{prefix}.gated")
        return self.out_proj.apply(b, y, f"{prefix}.out_proj"), [kept, state]

    def _parts(self, b: GraphBuilder, qkv: ir.Value, dtype: ir.DataType, prefix: str) -> tuple[ir.Value, ...]:
        """Queries and keys of length one, and values; what is normed has a length of sqrt(its numbers)."""
        size, width = self._key_head_dim, self._key_width
        both, value = split_last(
            b, qkv, {f"{prefix}.qk": 2 * width, f"{prefix}.value": self._value_width}, f"{prefix}.qk_v"
        )
        unit = b.constant(f"unit_of_{size}", np.full(size, size**-0.5, dtype=dtype.numpy()))
        normed = norm_heads(b, both, unit, 2 * self.key_heads, f"{prefix}.unit", _LENGTH_EPSILON / size)
        query, key = split_last(
            b, normed, {f"{prefix}.query": width, f"{prefix}.key": width}, f"{prefix}.q_k"
        )
        return query, key, value

    def _gates(self, call: MixerCall, hidden: ir.Value, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
        """g and b."""
        b, prefix = call.builder, call.prefix
        b_name, a_name = f"{prefix}.in_proj_b", f"{prefix}.in_proj_a"
        fading = b.cast(self.in_proj_a.apply(b, hidden, a_name), f"{prefix}.a", ir.DataType.FLOAT)
        fading = b.op("Add", [fading, b.constant(f"{prefix}.dt_bias", self.bias)], f"{prefix}.a_moved")
        fading = b.op("Softplus", [fading], f"{prefix}.a_positive")
        fading = b.op("Mul", [fading, b.constant(f"{prefix}.rates", self.rates)], f"{prefix}.g_plain")
        written = b.op("Sigmoid", [self.in_proj_b.apply(b, hidden, b_name)], f"{prefix}.b_plain")
        mask = _mask(b, call.tokens, dtype)
        decay = b.op("Mul", [b.cast(fading, f"{prefix}.g_cast", dtype), mask], f"{prefix}.g")
        return decay, b.op("Mul", [written, mask], f"{prefix}.b")


def _mask(b: GraphBuilder, tokens: NewTokens, dtype: ir.DataType) -> ir.Value:
    """1 for each token that is no padding, else 0, (batch_size, sequence_length, 1)."""
    last = b.constant("last_axis", [-1])
    ends = count_column(b, tokens.count)
    inside = b.op(
        "Less",
        [token_places(b, tokens.length), ends],
        "new_tokens.inside",
        dtype=ir.DataType.BOOL,
        shape=TOKENS,
    )
    numbers = b.cast(inside, "new_tokens.mask", dtype)
    return b.op("Unsqueeze", [numbers, last], "new_tokens.mask.apart", shape=(*TOKENS, 1))
