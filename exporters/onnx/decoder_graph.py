"""The decoder of a LLaMA-like model as one ONNX graph in ONNX Runtime's fused operators.

Read `build_decoder` from top to bottom: embedding, blocks, last norm, output matrix. A block is

    h  = rms_norm(x)                                    Skip/SimplifiedLayerNormalization
    x += o_proj(attention(qkv_proj(h)))                 GroupQueryAttention, which rotates and keeps the cache
    h  = rms_norm(x)                                    SkipSimplifiedLayerNormalization adds and normalizes
    x += down_proj(silu(gate_proj(h)) * up_proj(h))

with the FFN's own width and the attention's own heads in every block, and without the first two lines in a block
without attention. In some families what is added goes through a norm of its own, in place of h or beside it, silu is
another function, or a short convolution or a gated delta net takes attention's place in some blocks
(`exporters.onnx.mixers`).
The residual sum x and the next norm are one operator, so x is handed on as (x so far, what is still to be added).

Inputs and outputs have the names and shapes that optimum, transformers.js and ONNX Runtime GenAI agree on:
input_ids, attention_mask, past_key_values.N.key/value, past_conv.N, past_recurrent.N -> logits, present.N.key/value,
present_conv.N, present_recurrent.N. N counts the blocks that mix tokens: consumers want caches from 0 on without a
gap, and take num_hidden_layers for how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx.defs
import onnx.helper
import onnx_ir as ir

from cfsp.errors import InputError
from exporters.onnx.graph_builder import ACTIVATIONS, CONTRIB, GraphBuilder, Numbers
from exporters.onnx.layers import TOKENS, Embedding, Layer, join_heads, norm_heads, rms_norm, split_last
from exporters.onnx.mixers import MixerCall, NewTokens, TextMixer, token_places
from exporters.onnx.runtime import CACHE_KEY, FIXED_CACHE

OPSET = 21
OPSETS = range(13, 24)
"""What may be asked for: older ones give axes as attributes, newer ones have no kernels yet."""

_RUNTIMES_OWN = frozenset({"SimplifiedLayerNormalization"})
"""ONNX Runtime registers it in ONNX's domain, whose opsets do not know it."""


@dataclass(frozen=True, eq=False)
class Rope:
    """A rotary embedding, which blocks share: cos and sin of position * frequency, times a scale.

    The graph says how its tables come about, and a runtime computes them when it loads the file: of 32,768 positions
    and heads of 256 numbers they would take 32 MiB in it.
    """

    name: str  # goes before the names of its tables
    frequencies: npt.NDArray[np.float32]  # (head_dim / 2,) float32
    scale: float  # of both tables
    positions: int  # rows of a table


@dataclass(frozen=True)
class Attention:
    """A block's attention, with the norm before it."""

    num_key_value_heads: int  # its key-value heads, each with as many query heads as in every block
    input_norm: Numbers | None  # (hidden_size,) norm before it; None if it reads the residual sum as it is
    # One layer with the rows of q, then k, then v; or the three, where heads are normed or stored unlike.
    qkv: tuple[Layer, ...]
    o_proj: Layer  # attention's output
    scale: float  # what scores are multiplied by
    rope: Rope | None  # what rotates queries and keys; None if nothing does
    window: int | None = None  # how many tokens are seen, the one that looks included; None if all
    output_norm: Numbers | None = None  # (hidden_size,) norm of o_proj's output, or None
    # (head_dim,) norm of each head's query, (all heads' numbers,) one norm of them together, or None.
    q_norm: Numbers | None = None
    k_norm: Numbers | None = None  # the same of keys
    normed_after_rope: bool = False  # whether queries and keys are normed after they are rotated
    # Whether rows of a gate stand behind those of each head's query: its sigmoid multiplies what o_proj reads.
    gated: bool = False


@dataclass(frozen=True)
class Block:
    """A block's weights."""

    # Attention, or what takes its place; None in a block that has neither.
    mixer: Attention | TextMixer | None
    # (hidden_size,) norm before the FFN; None if it reads the residual sum as it is.
    ffn_norm: Numbers | None
    gate_proj: Layer  # FFN, to this block's width
    up_proj: Layer  # FFN, to this block's width
    down_proj: Layer  # FFN, back to hidden_size
    output_norm: Numbers | None = None  # (hidden_size,) norm of down_proj's output, or None


@dataclass(frozen=True)
class Decoder:
    """A whole model's weights."""

    heads_per_group: int  # query heads that read one key-value head
    head_dim: int  # numbers of a head
    rms_norm_eps: float  # of all norms
    embedding: Embedding  # the token embedding
    blocks: tuple[Block, ...]  # first to last
    final_norm: Numbers  # (hidden_size,)
    head: Layer  # the output matrix; the embedding's own if they are tied
    activation: str = "silu"  # of the FFNs, a name in ACTIVATIONS
    embedding_scale: float = 1.0  # what embeddings are multiplied by
    # Of everything computed between the ends; logits are float32 always.
    dtype: ir.DataType = ir.DataType.FLOAT


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
        last_logits: Compute the logits of each sequence's last position only.
        stored: Weights of another graph of this decoder, by name, which this one shares.
        opset: Of ONNX's own operators.

    Raises:
        InputError: The opset lacks an operator.
    """
    graph = _Graph(decoder, GraphBuilder(stored))
    x = graph.embed()
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
    _require_operators(built, opset)
    # The oldest file format that has the opset: older runtimes refuse newer ones.
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(CONTRIB, 1)]
    return ir.Model(
        built,
        ir_version=int(onnx.helper.find_min_ir_version_for(opsets, ignore_unknown=True)),
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
        self.n_tokens, self.seqlens_k, self.total = self._lengths(mask)
        self.n_mixers = 0

    def embed(self) -> ir.Value:
        """Embeddings of the tokens, scaled."""
        name, scale = "model.embed_tokens", self.decoder.embedding_scale
        x = self.decoder.embedding.look_up(self.builder, self.input_ids, name)
        if scale == 1:
            return x
        factor = self.builder.constant("embedding_scale", np.array(scale, dtype=self.dtype.numpy()))
        return self.builder.op("Mul", [x, factor], f"{name}.scaled", shape=x.shape)

    def block(
        self, index: int, block: Block, x: ir.Value, added: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        """One block; returns the residual sum before its FFN, and the FFN's output that is still to be added."""
        prefix = f"model.layers.{index}"
        if block.mixer is not None:
            hidden, x = self.add_norm(x, added, block.mixer.input_norm, f"{prefix}.input_layernorm")
            added = self._mixed(prefix, block.mixer, hidden)
            self.n_mixers += 1
        hidden, x = self.add_norm(x, added, block.ffn_norm, f"{prefix}.ffn_norm")
        added = self._feed_forward(block, hidden, f"{prefix}.mlp")
        return x, self._output_norm(added, block.output_norm, f"{prefix}.mlp.output_norm")

    def _mixed(self, prefix: str, mixer: Attention | TextMixer, hidden: ir.Value) -> ir.Value:
        """What a block's attention, or what takes its place, adds."""
        if not isinstance(mixer, Attention):
            return self._kept_apart(f"{prefix}.{mixer.module}", mixer, hidden)
        attended = self._attention(prefix, mixer, hidden)
        added = mixer.o_proj.apply(self.builder, attended, f"{prefix}.self_attn.o_proj")
        return self._output_norm(added, mixer.output_norm, f"{prefix}.self_attn.output_norm")

    def _kept_apart(self, prefix: str, mixer: TextMixer, hidden: ir.Value) -> ir.Value:
        """What a mixer makes of what is normed; what it keeps of the text goes to caches of its own."""
        index = self.n_mixers
        pasts = {
            kind: ir.val(f"past_{kind}.{index}", self.dtype, shape) for kind, shape in mixer.kept.items()
        }
        names = {kind: f"present_{kind}.{index}" for kind in pasts}
        call = MixerCall(self.builder, prefix, self._new_tokens(), pasts, names)
        added, presents = mixer.mix(call, hidden)
        self.inputs += pasts.values()
        self.outputs += presents
        return added

    def _new_tokens(self) -> NewTokens:
        length = self._input_length()
        count = self.builder.op("Min", [self.n_tokens, length], "new_tokens", shape=["batch_size"])
        return NewTokens(count, length)

    def _output_norm(self, x: ir.Value, weight: Numbers | None, name: str) -> ir.Value:
        return x if weight is None else self._norm(x, self.builder.constant(f"{name}.weight", weight), name)

    def add_norm(
        self, x: ir.Value, added: ir.Value | None, weight: Numbers | None, name: str
    ) -> tuple[ir.Value, ir.Value]:
        """(norm of x + added, x + added); the sum twice without a norm."""
        if weight is None:
            total = x if added is None else self.builder.op("Add", [x, added], f"{name}.sum", shape=x.shape)
            return total, total
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

    def _lengths(self, mask: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Each sequence's tokens, and as GroupQueryAttention wants it its last position, and the longest length."""
        int32, b = ir.DataType.INT32, self.builder
        one = b.constant("one", [1])
        count = b.op("ReduceSum", [mask, one], "n_tokens", keepdims=0, shape=["batch_size"])
        seqlens = b.cast(b.op("Sub", [count, one], "last_token"), "seqlens_k", int32)
        sizes = b.op("Shape", [mask], "mask_shape", shape=[2])
        length = b.op("Gather", [sizes, b.constant("mask_length_axis", 1)], "mask_length", axis=0, shape=[])
        return count, seqlens, b.cast(length, "total_sequence_length", int32)

    def _attention(self, block_prefix: str, block: Attention, hidden: ir.Value) -> ir.Value:
        """GroupQueryAttention on (batch_size, sequence_length, q + k + v); keys and values go to the cache."""
        s, prefix, index = self.decoder, f"{block_prefix}.self_attn", self.n_mixers
        kv_heads, num_heads = block.num_key_value_heads, self._query_heads(block)
        query, key, value, gate = self._heads(block, hidden, prefix)
        past = self._caches(f"past_key_values.{index}", kv_heads, "past_sequence_length")
        present = self._caches(f"present.{index}", kv_heads, "total_sequence_length")
        attended = ir.val(prefix, self.dtype, [*TOKENS, num_heads * s.head_dim])
        rotary = [] if self._rotates_before(block) else self._tables(block.rope)
        attributes: dict[str, int | float] = {
            "num_heads": num_heads,
            "kv_num_heads": kv_heads,
            "scale": block.scale,
            "do_rotary": int(bool(rotary)),
            "rotary_interleaved": 0,
        }
        if block.window is not None:
            attributes["local_window_size"] = block.window
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
        return attended if gate is None else self._opened(attended, gate, f"{prefix}.gated")

    def _tables(self, rope: Rope | None) -> list[ir.Value]:
        """Cosines and sines of a rope."""
        return [self._rotary(rope, function) for function in ("Cos", "Sin")] if rope else []

    def _rotary(self, rope: Rope, function: str) -> ir.Value:
        """A table of a rope, (positions, head_dim / 2)."""
        b, prefix = self.builder, f"{rope.name}rope"
        counted = {"start": 0, "limit": rope.positions, "step": 1}
        ends = [b.constant(f"{prefix}.{name}", np.float32(number)) for name, number in counted.items()]
        rows = b.op("Range", ends, f"{prefix}.positions", shape=[rope.positions])
        column = b.op(
            "Unsqueeze", [rows, b.constant("last_axis", [-1])], f"{prefix}.column", shape=[rope.positions, 1]
        )
        frequencies = b.constant(f"{prefix}.frequencies", rope.frequencies)
        shape = [rope.positions, len(rope.frequencies)]
        angles = b.op("Mul", [column, frequencies], f"{prefix}.angles", shape=shape)
        name = f"{rope.name}{function.lower()}_cache"
        table = b.op(function, [angles], f"{name}.plain")
        table = b.op("Mul", [table, b.constant(f"{prefix}.scale", np.float32(rope.scale))], f"{name}.scaled")
        return b.cast(table, name, self.dtype)

    def _caches(self, prefix: str, kv_heads: int, length: str) -> list[ir.Value]:
        """A block's keys and values."""
        shape = ir.Shape(["batch_size", kv_heads, length, self.decoder.head_dim])
        return [ir.val(f"{prefix}.{part}", self.dtype, shape) for part in ("key", "value")]

    def _heads(
        self, block: Attention, hidden: ir.Value, prefix: str
    ) -> tuple[ir.Value, ir.Value | None, ir.Value | None, ir.Value | None]:
        """Query, key, value and gate; the query alone holds the first three where one layer gives them."""
        b, kv_heads, size = self.builder, block.num_key_value_heads, self.decoder.head_dim
        heads = self._query_heads(block)
        names = [f"{prefix}.{part}" for part in ("q_proj", "k_proj", "v_proj")]
        if len(block.qkv) == 1:
            packed = block.qkv[0].apply(b, hidden, f"{prefix}.qkv_proj")
            if not (block.gated or self._rotates_before(block)):
                return packed, None, None, None
            rows = ((1 + block.gated) * heads * size, kv_heads * size, kv_heads * size)
            parts = split_last(b, packed, dict(zip(names, rows, strict=True)), f"{prefix}.qkv_split")
        else:
            layers = zip(names, block.qkv, strict=True)
            parts = tuple(layer.apply(b, hidden, name) for name, layer in layers)
        query, key, value = parts
        query, gate = self._apart(query, heads, prefix) if block.gated else (query, None)
        steps = [self._head_norms, self._rotated]
        for step in reversed(steps) if block.normed_after_rope else steps:
            query, key = step(block, query, key, prefix)
        return query, key, value, gate

    def _head_norms(
        self, block: Attention, query: ir.Value, key: ir.Value, prefix: str
    ) -> tuple[ir.Value, ir.Value]:
        """Query and key with each head normed, where they are."""
        if block.q_norm is None or block.k_norm is None:
            return query, key
        query = self._head_norm(query, block.q_norm, self._query_heads(block), f"{prefix}.q_norm")
        return query, self._head_norm(key, block.k_norm, block.num_key_value_heads, f"{prefix}.k_norm")

    def _rotated(
        self, block: Attention, query: ir.Value, key: ir.Value, prefix: str
    ) -> tuple[ir.Value, ir.Value]:
        """Query and key rotated, where GroupQueryAttention does not do it."""
        rope = block.rope
        if rope is None or not self._rotates_before(block):
            return query, key

        def turned(x: ir.Value, heads: int, name: str) -> ir.Value:
            return self.builder.op(
                "RotaryEmbedding",
                [x, self._positions(), *self._tables(rope)],
                name,
                domain=CONTRIB,
                num_heads=heads,
                rotary_embedding_dim=2 * len(rope.frequencies),
            )

        query = turned(query, self._query_heads(block), f"{prefix}.q_rotated")
        return query, turned(key, block.num_key_value_heads, f"{prefix}.k_rotated")

    def _query_heads(self, block: Attention) -> int:
        return block.num_key_value_heads * self.decoder.heads_per_group

    def _rotates_before(self, block: Attention) -> bool:
        """Whether queries and keys are rotated before GroupQueryAttention sees them.

        It norms nothing behind its rotation, and rotates heads of whole sixteens, by tables of whole eights of columns.
        """
        if block.rope is None:
            return False
        fits = len(block.rope.frequencies) % 8 == 0 and self.decoder.head_dim % 16 == 0
        return block.normed_after_rope or not fits

    def _apart(self, both: ir.Value, heads: int, prefix: str) -> tuple[ir.Value, ...]:
        """Queries, and the gates that stand behind those of each head."""
        b, size = self.builder, self.decoder.head_dim
        apart = b.constant(f"{heads}_heads_of_{2 * size}", [0, 0, heads, 2 * size])
        split = b.op("Reshape", [both, apart], f"{prefix}.q_and_gate", shape=(*TOKENS, heads, 2 * size))
        names = {f"{prefix}.{part}.heads": size for part in ("q", "gate")}
        parts = zip(("q", "gate"), split_last(b, split, names, f"{prefix}.q_gate"), strict=True)
        return tuple(join_heads(b, part, heads * size, f"{prefix}.{name}") for name, part in parts)

    def _opened(self, attended: ir.Value, gate: ir.Value, name: str) -> ir.Value:
        """What comes through a gate."""
        share = self.builder.op("Sigmoid", [gate], f"{name}.share")
        return self.builder.op("Mul", [attended, share], name)

    def _positions(self) -> ir.Value:
        """Where the tokens stand in their rows, (batch_size, sequence_length): from what is in the cache on."""
        b, length = self.builder, self._input_length()
        before = b.op("Sub", [self.n_tokens, length], "tokens_before", shape=["batch_size"])
        # A row that ends with padding has fewer tokens than there are in the first call.
        start = b.op("Max", [before, b.constant("zero", [0])], "first_position", shape=["batch_size"])
        column = b.op(
            "Unsqueeze", [start, b.constant("last_axis", [-1])], "first_positions", shape=["batch_size", 1]
        )
        steps = token_places(b, length)
        return b.op("Add", [column, steps], "positions", shape=TOKENS)

    def _input_length(self) -> ir.Value:
        """Tokens of a row in this call."""
        b = self.builder
        sizes = b.op("Shape", [self.input_ids], "input_shape", shape=[2])
        return b.op("Gather", [sizes, b.constant("input_length_axis", 1)], "input_length", axis=0, shape=[])

    def _head_norm(self, x: ir.Value, weight: Numbers, heads: int, name: str) -> ir.Value:
        gamma = self.builder.constant(f"{name}.weight", weight)
        if len(weight) == heads * self.decoder.head_dim:
            return self._norm(x, gamma, name)
        return norm_heads(self.builder, x, gamma, heads, name, self.decoder.rms_norm_eps)

    def _feed_forward(self, block: Block, hidden: ir.Value, name: str) -> ir.Value:
        b = self.builder
        gate = block.gate_proj.apply(b, hidden, f"{name}.gate_proj")
        up = block.up_proj.apply(b, hidden, f"{name}.up_proj")
        act = ACTIVATIONS[self.decoder.activation](b, gate, f"{name}.act")
        product = b.op("Mul", [act, up], f"{name}.product")
        return block.down_proj.apply(b, product, f"{name}.down_proj")

    def _norm(self, x: ir.Value, gamma: ir.Value, name: str) -> ir.Value:
        return rms_norm(self.builder, x, gamma, name, self.decoder.rms_norm_eps)


def _require_operators(graph: ir.Graph, opset: int) -> None:
    """Raise InputError if an opset lacks an operator, or has it with fewer inputs or without an attribute."""
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
