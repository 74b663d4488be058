"""What mixes tokens in attention's place in some blocks, and keeps of a text what does not grow with it.

`kept` of a mixer: what is kept of a text, its kind (`past_<kind>` among the inputs) -> its shape. `mix` adds its nodes,
of hidden states (batch_size, sequence_length, hidden_size) that are normed, and returns what it adds to the residual
sum, and what is kept of the text then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from exporters.onnx.graph_builder import ACTIVATIONS, CONTRIB, GraphBuilder, Numbers, silu
from exporters.onnx.layers import TOKENS, Layer, norm_heads, split_last

_END = np.iinfo(np.int64).max
_LENGTH_EPSILON = 1e-6
"""What is added to the square of a query's or key's length; transformers' number."""


@dataclass(frozen=True, eq=False)
class NewTokens:
    """Those of a call."""

    count: ir.Value  # of each row, how many are no padding, (batch_size,) int64
    length: ir.Value  # sequence_length, () int64


@dataclass(frozen=True, eq=False)
class MixerCall:
    """Where a mixer's nodes go, and what of the text they read and leave."""

    builder: GraphBuilder  # of the graph
    prefix: str  # the module's name, which begins those of the nodes
    tokens: NewTokens  # of this call
    pasts: Mapping[str, ir.Value]  # what is kept of the text before, by its kind
    presents: Mapping[str, str]  # names of what is kept of the text then, by its kind


def count_column(builder: GraphBuilder, count: ir.Value) -> ir.Value:
    """`NewTokens.count` as (batch_size, 1)."""
    last = builder.constant("last_axis", [-1])
    return builder.op("Unsqueeze", [count, last], "new_tokens.column", shape=["batch_size", 1])


def token_places(builder: GraphBuilder, length: ir.Value) -> ir.Value:
    """0, 1, ... of the tokens of a call, (sequence_length,) int64."""
    ends = [builder.constant("range_start", 0), length, builder.constant("range_step", 1)]
    return builder.op("Range", ends, "steps", shape=["sequence_length"])


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
    """Add the nodes of a convolution over the text, each channel on its own:

        y_t = sum over k of weights[k] z_{t - length + 1 + k} + bias

    What is kept of a text are its last `length` z, zeros before its start, as (batch_size, channels, length): one more
    than the next token reads, as ONNX Runtime GenAI and transformers.js want it. Rows of a batch that end with padding
    keep the z of their last tokens.

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


@dataclass(frozen=True)
class ShortConvolution:
    """A short convolution over the text (LFM 2's).

    With b, c and x the three parts of in_proj(h), each (batch_size, sequence_length, hidden_size), channel by channel
    y = c convolution(b x) goes through out_proj.
    """

    module: ClassVar[str] = "conv"
    input_norm: Numbers | None  # (hidden_size,) norm before it; None if it reads the residual sum as it is
    in_proj: Layer  # the gate b, the gate c and x, of all tokens
    kernels: Kernels  # of hidden_size channels
    out_proj: Layer  # the convolution's output

    @property
    def kept(self) -> Mapping[str, ir.Shape]:
        return {"conv": self.kernels.kept_shape}

    def mix(self, call: MixerCall, hidden: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        b, prefix, size = call.builder, call.prefix, self.kernels.channels
        projected = self.in_proj.apply(b, hidden, f"{prefix}.in_proj")
        gate, output_gate, x = split_last(
            b, projected, {f"{prefix}.{part}": size for part in ("b", "c", "x")}, f"{prefix}.split"
        )
        z = b.op("Mul", [gate, x], f"{prefix}.gated")
        y, kept = convolve(call, self.kernels, z, prefix)
        y = b.op("Mul", [output_gate, y], f"{prefix}.output")
        return self.out_proj.apply(b, y, f"{prefix}.out_proj"), [kept]


@dataclass(frozen=True)
class DeltaNet:
    """A gated delta net (Qwen 3.5's) in ONNX Runtime's LinearAttention.

    With q, k and v the parts of act(convolution(in_proj_qkv(h))), q and k of each head made to length one, and of each
    value head a state S (key_head_dim, value_head_dim), zeros before the text (arXiv 2412.06464):

        g_t = rates softplus(in_proj_a(h_t) + bias)         rates are -exp(A_log)
        b_t = sigmoid(in_proj_b(h_t))
        S_t = exp(g_t) S_{t-1} + b_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T
        y_t = out_proj(norm(S_t^T q_t / sqrt(key_head_dim)) silu(in_proj_z(h_t)))

    What is kept of a text are S and what the convolution reads. g and b of padding are 0, so that S stays.
    """

    module: ClassVar[str] = "linear_attn"
    input_norm: Numbers | None  # (hidden_size,) norm before it; None if it reads the residual sum as it is
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
        state: list[int | str] = ["batch_size", self._value_heads, self._key_head_dim, len(self.norm)]
        return {"conv": self.kernels.kept_shape, "recurrent": ir.Shape(state)}

    def mix(self, call: MixerCall, hidden: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
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


TextMixer = ShortConvolution | DeltaNet
