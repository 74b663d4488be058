"""The decoder of a LLaMA-like model as one ONNX graph in ONNX Runtime's fused operators.

Read `build_decoder` from top to bottom: embedding, blocks, last norm, output matrix. A block is

    h  = rms_norm(x)                                    Skip/SimplifiedLayerNormalization
    x += o_proj(attention(qkv_proj(h)))                 GroupQueryAttention, which rotates and keeps the cache
    h  = rms_norm(x)                                    SkipSimplifiedLayerNormalization adds and normalizes
    x += down_proj(silu(gate_proj(h)) * up_proj(h))

with the FFN's own width and the attention's own heads in every block, and without the first two lines in a block
without attention. The residual sum x and the next norm are one operator, so x is handed on as (x so far, what is still
to be added).

Inputs and outputs have the names and shapes that optimum, transformers.js and ONNX Runtime GenAI agree on:
input_ids, attention_mask, past_key_values.N.key/value -> logits, present.N.key/value. N counts the blocks that attend:
consumers want caches from 0 on without a gap, and take num_hidden_layers for how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporters.onnx.graph_builder import CONTRIB, GraphBuilder
from exporters.onnx.layers import TOKENS, Embedding, Layer
from exporters.onnx.operators import ir_version_for, require_operators
from exporters.onnx.runtime import CACHE_KEY, FIXED_CACHE

OPSET = 21


@dataclass(frozen=True)
class Attention:
    """A block's attention, with the norm before it.

    Attributes:
        num_key_value_heads: Its key-value heads, each with as many query heads as in every block.
        input_norm: (hidden_size,).
        qkv: One layer with the rows of q, then k, then v; or the three, where heads are normed or stored unlike.
        q_norm: (head_dim,) norm of each head's query, or None.
        k_norm: (head_dim,) norm of each head's key, or None.
        o_proj: Attention's output.
        rotated: Whether queries and keys are rotated.
    """

    num_key_value_heads: int
    input_norm: npt.NDArray[np.floating]
    qkv: tuple[Layer, ...]
    o_proj: Layer
    q_norm: npt.NDArray[np.floating] | None = None
    k_norm: npt.NDArray[np.floating] | None = None
    rotated: bool = True


@dataclass(frozen=True)
class Block:
    """A block's weights.

    Attributes:
        attention: None in a block that does not attend.
        post_norm: (hidden_size,).
        gate_proj: FFN, to this block's width.
        up_proj: FFN, to this block's width.
        down_proj: FFN, back to hidden_size.
    """

    attention: Attention | None
    post_norm: npt.NDArray[np.floating]
    gate_proj: Layer
    up_proj: Layer
    down_proj: Layer


@dataclass(frozen=True)
class Decoder:
    """A whole model's weights.

    Attributes:
        heads_per_group: Query heads that read one key-value head.
        rms_norm_eps: Of all norms.
        embedding: The token embedding.
        blocks: First to last.
        final_norm: (hidden_size,).
        head: The output matrix; the embedding's own where they are tied.
        cos: (positions, head_dim / 2) of the rotary embedding.
        sin: The same.
        dtype: Of everything computed between the ends; logits are float32 always.
    """

    heads_per_group: int
    rms_norm_eps: float
    embedding: Embedding
    blocks: tuple[Block, ...]
    final_norm: npt.NDArray[np.floating]
    head: Layer
    cos: npt.NDArray[np.floating]
    sin: npt.NDArray[np.floating]
    dtype: ir.DataType = ir.DataType.FLOAT

    @property
    def head_dim(self) -> int:
        """Numbers of a head."""
        return 2 * int(self.cos.shape[1])


def build_decoder(
    decoder: Decoder,
    *,
    name: str,
    last_logits: bool = False,
    stored: Mapping[str, ir.TensorProtocol] | None = None,
    opset: int = OPSET,
) -> ir.Model:
    """Write the graph.

    Args:
        decoder: The weights.
        name: Of the graph.
        last_logits: Compute the logits of each sequence's last position alone.
        stored: Weights of another graph of this decoder, by name, which this one shares.
        opset: Of ONNX's own operators.

    Raises:
        InputError: The opset lacks an operator.
    """
    graph = _Graph(decoder, GraphBuilder(stored))
    x = decoder.embedding.look_up(graph.builder, graph.input_ids, "model.embed_tokens")
    added: ir.Value | None = None
    for index, block in enumerate(decoder.blocks):
        x, added = graph.block(index, block, x, added)
    hidden, _ = graph.add_norm(x, added, decoder.final_norm, "model.norm")
    graph.logits(hidden, last_logits=last_logits)
    tape = graph.builder.tape
    built = ir.Graph(
        graph.inputs,
        graph.outputs,
        nodes=tape.nodes,
        initializers=tape.initializers,
        name=name,
        opset_imports={"": opset, CONTRIB: 1},
    )
    require_operators(built, opset)
    return ir.Model(
        built,
        ir_version=ir_version_for(opset),
        producer_name="phoneready",
        metadata_props={CACHE_KEY: FIXED_CACHE},
    )


class _Graph:
    """The graph while it is written."""

    def __init__(self, decoder: Decoder, builder: GraphBuilder) -> None:
        self.decoder, self.dtype, self.builder = decoder, decoder.dtype, builder
        self.input_ids = ir.val("input_ids", ir.DataType.INT64, list(TOKENS))
        mask = ir.val("attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"])
        self.inputs = [self.input_ids, mask]
        self.outputs: list[ir.Value] = []
        self.seqlens_k, self.total = self._lengths(mask)

    def block(
        self, index: int, block: Block, x: ir.Value, added: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        """One block; returns the residual sum before its FFN, and the FFN's output that is still to be added."""
        prefix = f"model.layers.{index}"
        if block.attention is not None:
            hidden, x = self.add_norm(x, added, block.attention.input_norm, f"{prefix}.input_layernorm")
            attended = self._attention(prefix, block.attention, hidden)
            added = block.attention.o_proj.apply(self.builder, attended, f"{prefix}.self_attn.o_proj")
        hidden, x = self.add_norm(x, added, block.post_norm, f"{prefix}.post_attention_layernorm")
        return x, self._feed_forward(block, hidden, f"{prefix}.mlp")

    def add_norm(
        self, x: ir.Value, added: ir.Value | None, weight: npt.NDArray[np.floating], name: str
    ) -> tuple[ir.Value, ir.Value]:
        """(norm of x + added, x + added)."""
        gamma = self.builder.constant(f"{name}.weight", weight)
        if added is None:
            return self._norm(x, gamma, name), x
        normed, total = (ir.val(n, self.dtype, [*TOKENS, len(weight)]) for n in (name, f"{name}.sum"))
        self.builder.tape.op_multi_out(
            "SkipSimplifiedLayerNormalization",
            [x, added, gamma],
            {"epsilon": self.decoder.rms_norm_eps},
            outputs=[normed, ir.val(""), ir.val(""), total],
            domain=CONTRIB,
            name=name,
        )
        return normed, total

    def logits(self, hidden: ir.Value, *, last_logits: bool) -> None:
        """The output matrix, and its output in float32."""
        length: int | str = "sequence_length"
        if last_logits:
            length = 1
            last = self.builder.constant("last_position", [-1])
            shape = ("batch_size", length, len(self.decoder.final_norm))
            hidden = self.builder.op("Gather", [hidden, last], "last_hidden", axis=1, shape=shape)
        exact = self.dtype == ir.DataType.FLOAT
        logits = self.decoder.head.apply(self.builder, hidden, "logits" if exact else "lm_head")
        if not exact:
            logits = self.builder.cast(logits, "logits", ir.DataType.FLOAT)
        logits.shape = ir.Shape(("batch_size", length, self.decoder.head.out_features))
        self.outputs.insert(0, logits)

    def _lengths(self, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """What GroupQueryAttention wants to know: each sequence's last position, and the longest length."""
        int32, b = ir.DataType.INT32, self.builder
        one = b.constant("one", [1])
        count = b.op("ReduceSum", [mask, one], "n_tokens", keepdims=0, shape=["batch_size"])
        seqlens = b.cast(b.op("Sub", [count, one], "last_token"), "seqlens_k", int32)
        sizes = b.op("Shape", [mask], "mask_shape", shape=[2])
        length = b.op("Gather", [sizes, b.constant("mask_length_axis", 1)], "mask_length", axis=0, shape=[])
        return seqlens, b.cast(length, "total_sequence_length", int32)

    def _attention(self, block_prefix: str, block: Attention, hidden: ir.Value) -> ir.Value:
        """GroupQueryAttention on (batch_size, sequence_length, q + k + v); keys and values go to the cache."""
        s, prefix, index = self.decoder, f"{block_prefix}.self_attn", (len(self.inputs) - 2) // 2
        kv_heads = block.num_key_value_heads
        num_heads = kv_heads * s.heads_per_group
        query, key, value = self._heads(block, hidden, prefix)
        past = self._caches(f"past_key_values.{index}", kv_heads, "past_sequence_length")
        present = self._caches(f"present.{index}", kv_heads, "total_sequence_length")
        attended = ir.val(prefix, self.dtype, [*TOKENS, num_heads * s.head_dim])
        caches = (("cos_cache", s.cos), ("sin_cache", s.sin)) if block.rotated else ()
        rotary = [self.builder.constant(name, values) for name, values in caches]
        attributes = {
            "num_heads": num_heads,
            "kv_num_heads": kv_heads,
            "scale": s.head_dim**-0.5,
            "do_rotary": int(block.rotated),
            "rotary_interleaved": 0,
        }
        self.builder.tape.op_multi_out(
            "GroupQueryAttention",
            [query, key, value, *past, self.seqlens_k, self.total, *rotary],
            attributes,
            outputs=[attended, *present],
            domain=CONTRIB,
            name=prefix,
        )
        self.inputs += past
        self.outputs += present
        return attended

    def _caches(self, prefix: str, kv_heads: int, length: str) -> list[ir.Value]:
        """A block's keys and values."""
        shape = ir.Shape(["batch_size", kv_heads, length, self.decoder.head_dim])
        return [ir.val(f"{prefix}.{part}", self.dtype, shape) for part in ("key", "value")]

    def _heads(
        self, block: Attention, hidden: ir.Value, prefix: str
    ) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
        """Query, key and value; the query alone holds all three where one layer gives them."""
        b, kv_heads = self.builder, block.num_key_value_heads
        if len(block.qkv) == 1:
            return block.qkv[0].apply(b, hidden, f"{prefix}.qkv_proj"), None, None
        names = ("q_proj", "k_proj", "v_proj")
        query, key, value = (
            layer.apply(b, hidden, f"{prefix}.{name}") for name, layer in zip(names, block.qkv, strict=True)
        )
        if block.q_norm is not None and block.k_norm is not None:
            heads = kv_heads * self.decoder.heads_per_group
            query = self._head_norm(query, block.q_norm, heads, f"{prefix}.q_norm")
            key = self._head_norm(key, block.k_norm, kv_heads, f"{prefix}.k_norm")
        return query, key, value

    def _head_norm(self, x: ir.Value, weight: npt.NDArray[np.floating], heads: int, name: str) -> ir.Value:
        b, size = self.builder, self.decoder.head_dim
        apart = b.constant(f"{heads}_heads", [0, 0, heads, size])
        together = b.constant("joined_heads", [0, 0, -1])
        split = b.op("Reshape", [x, apart], f"{name}.heads", shape=(*TOKENS, heads, size))
        normed = self._norm(split, b.constant(f"{name}.weight", weight), f"{name}.normed")
        return b.op("Reshape", [normed, together], name, shape=(*TOKENS, heads * size))

    def _feed_forward(self, block: Block, hidden: ir.Value, name: str) -> ir.Value:
        b = self.builder
        gate = block.gate_proj.apply(b, hidden, f"{name}.gate_proj")
        up = block.up_proj.apply(b, hidden, f"{name}.up_proj")
        # x * sigmoid(alpha x) with alpha = 1 is silu.
        act = b.op("QuickGelu", [gate], f"{name}.act", alpha=1.0, domain=CONTRIB)
        product = b.op("Mul", [act, up], f"{name}.product")
        return block.down_proj.apply(b, product, f"{name}.down_proj")

    def _norm(self, x: ir.Value, gamma: ir.Value, name: str) -> ir.Value:
        return self.builder.op(
            "SimplifiedLayerNormalization",
            [x, gamma],
            name,
            axis=-1,
            epsilon=self.decoder.rms_norm_eps,
            stash_type=1,
        )
