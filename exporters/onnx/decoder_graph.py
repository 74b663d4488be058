"""The decoder of a LLaMA-like model as one ONNX graph in ONNX Runtime's fused operators.

    h  = rms_norm(x)                                    Skip/SimplifiedLayerNormalization
    x += o_proj(attention(qkv_proj(h)))                 GroupQueryAttention, which rotates and keeps the cache
    h  = rms_norm(x)                                    SkipSimplifiedLayerNormalization adds and normalizes
    x += down_proj(silu(gate_proj(h)) * up_proj(h))

is a block, with a width and heads of its own; in some families what is added is normed, or a short convolution or a
gated delta net takes attention's place in some blocks. The residual sum x and the next norm are one operator, so x is
handed on as (x so far, what is still to be added).

Inputs and outputs are named as optimum, transformers.js and ONNX Runtime GenAI have them: input_ids, attention_mask,
past_key_values.N.key/value, past_conv.N, past_recurrent.N -> logits, present.N.key/value, present_conv.N,
present_recurrent.N. N counts the blocks that mix tokens: consumers want caches from 0 on without a gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.defs
import onnx.helper
import onnx_ir as ir
import torch
from torch import nn

from cfsp.errors import InputError
from cfsp.models.architectures import (
    attention_of,
    decoder_layers,
    feed_forward,
    mixer_of,
    norm_epsilon,
    rotated_blocks,
    spec_for,
    windows_of_blocks,
)
from cfsp.models.families.row import FULL, WINDOWED
from cfsp.models.offload import at_hand
from cfsp.models.rope import steady_context
from exporters.checkpoint_reader import ACTIVATIONS as KNOWN_ACTIVATIONS
from exporters.checkpoint_reader import rope_of
from exporters.onnx.layers import (
    ACTIVATIONS,
    CONTRIB,
    PACKED,
    QKV,
    TABLE,
    TOKENS,
    Floats,
    GraphBuilder,
    Matrix,
    Weights,
    check_blocks,
    check_rope,
    is_tied,
    silu,
)
from exporters.onnx.runtime import CACHE_KEY, FIXED_CACHE
from exporters.onnx.variants import HEAD

OPSET = 21
OPSETS = range(13, 24)
"""What may be asked for: older ones give axes as attributes, newer ones have no kernels yet."""
_RUNTIMES_OWN = "SimplifiedLayerNormalization"
"""ONNX Runtime registers it in ONNX's domain, whose opsets do not know it."""
_ROPE_NAMES = {FULL: "", WINDOWED: "window_"}
_END = np.iinfo(np.int64).max
_LENGTH_EPSILON = 1e-6
"""What transformers adds to the square of the length of a delta net's queries and keys."""


def decoder_graph(model: Any, weights: Weights, *, name: str, opset: int = OPSET) -> ir.Model:
    """The graph of a causal LM with the logits of every position; InputError: it, or the opset, cannot compute it."""
    spec, tied = spec_for(model.config), is_tied(model)
    with at_hand(*([] if tied else [model.get_input_embeddings()])):
        table = weights.table(model.get_input_embeddings().weight.detach(), tied=tied)
    head = table if tied else _layer(HEAD, model.get_output_embeddings(), weights)
    graph = _Graph(model, weights)
    norm = graph.norm_weight(f"{spec.layers.rpartition('.')[0]}.{spec.last_norm}")
    scale = model.config.hidden_size**0.5 if spec.scaled_embedding else 1.0
    return graph.built(range(len(decoder_layers(model))), (table, norm, head), name, scale=scale, opset=opset)


def block_graph(model: Any, block: int, entering: torch.Tensor, gain: torch.Tensor, *, name: str) -> ir.Model:
    """A block of a causal LM as a decoder of its own, float32, between hidden states that enter (tokens, hidden_size)
    and a norm that multiplies by gain (hidden_size,): see `exporters.proof`."""
    table = Floats(entering, stored_name=TABLE)
    return _Graph(model, Weights()).built(range(block, block + 1), (table, gain, table), name)


def keep_last_logits(graph: ir.Graph) -> None:
    """Turn a graph into the one that gives the logits of each sequence's last position only."""
    norm = next(node for node in graph if node.name == "model.norm")
    hidden, logits = norm.outputs[0], graph.outputs[0]
    assert hidden.shape is not None  # every value of a graph of ours has a shape
    assert logits.shape is not None
    position = ir.tensor(np.array([-1]), name="last_position")
    last = ir.val("last_position", ir.DataType.INT64, [1], const_value=position)
    output = ir.val("last_hidden", hidden.dtype, ir.Shape(("batch_size", 1, hidden.shape[-1])))
    gather = ir.node("Gather", [hidden, last], {"axis": 1}, name="last_hidden", outputs=[output])
    for node, index in list(hidden.uses()):
        if node is not gather:
            node.replace_input_with(index, output)
    graph.register_initializer(last)
    graph.insert_after(norm, gather)
    logits.shape = ir.Shape(("batch_size", 1, logits.shape[-1]))


def ropes_of(model: Any) -> tuple[dict[str, tuple[npt.NDArray[np.float32], float]], list[str | None]]:
    """Kind of blocks -> frequencies (head_dim / 2,), of short texts, and a factor of cos and sin; each block's kind.

    If kinds of blocks have their own, transformers 5 has them in one module, and transformers 4 in two.
    """
    config, decoder = model.config, model.get_decoder()
    own, settings = spec_for(config).has_window_rope, config.to_dict()
    tables: dict[str, tuple[npt.NDArray[np.float32], float]] = {}
    kinds: list[str | None] = []
    for rotated, window in zip(rotated_blocks(config), windows_of_blocks(config), strict=True):
        kind = WINDOWED if own and window is not None else FULL
        kinds.append(kind if rotated else None)
        if not rotated or kind in tables:
            continue
        check_rope(rope_of(settings, kind)["rope_type"])
        local = getattr(decoder, "rotary_emb_local", None)
        if hasattr(decoder, "rotary_embs"):
            rotary = decoder.rotary_embs[kind]
        else:
            rotary = local if local is not None and kind == WINDOWED else decoder.rotary_emb
        prefix = f"{kind}_" if isinstance(rotary.rope_type, dict) else ""
        # `inv_freq` are those of the longest text that the model has read.
        frequencies = getattr(rotary, f"{prefix}original_inv_freq").float().numpy()
        tables[kind] = frequencies, float(getattr(rotary, f"{prefix}attention_scaling"))
    return tables, kinds


def _layer(name: str, linear: Any, weights: Weights) -> Matrix:
    return weights.layer(name, linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


class _Graph:
    """The graph of some of a model's blocks while it is written."""

    def __init__(self, model: Any, weights: Weights) -> None:
        config = model.config
        self.model, self.weights, self.spec = model, weights, spec_for(config)
        check_blocks(self.spec)
        self.heads_per_group = config.num_attention_heads // config.num_key_value_heads
        self.head_dim = int(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self.epsilon = norm_epsilon(config)
        self.ropes, self.rope_kinds = ropes_of(model)
        self.windows = windows_of_blocks(config)
        self.positions = steady_context(rope_of(config.to_dict(), FULL), int(config.max_position_embeddings))
        self.dtype = ir.DataType.FLOAT16 if weights.dtype == torch.float16 else ir.DataType.FLOAT
        self.builder = b = GraphBuilder()
        int32 = ir.DataType.INT32
        self.input_ids = ir.val("input_ids", ir.DataType.INT64, list(TOKENS))
        mask = ir.val("attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"])
        self.inputs, self.outputs, self.n_mixers = [self.input_ids, mask], list[ir.Value](), 0
        # Each sequence's tokens, and as GroupQueryAttention wants it its last position, and the longest length.
        one = b.constant("one", [1])
        self.n_tokens = b.op("ReduceSum", [mask, one], "n_tokens", keepdims=0, shape=["batch_size"])
        self.seqlens_k = b.cast(b.op("Sub", [self.n_tokens, one], "last_token"), "seqlens_k", int32)
        sizes = b.op("Shape", [mask], "mask_shape", shape=[2])
        length = b.op("Gather", [sizes, b.constant("mask_length_axis", 1)], "mask_length", axis=0, shape=[])
        self.total = b.cast(length, "total_sequence_length", int32)

    def built(
        self,
        blocks: Sequence[int],
        ends: tuple[Matrix, torch.Tensor, Matrix],
        name: str,
        *,
        scale: float = 1.0,
        opset: int = OPSET,
    ) -> ir.Model:
        """The graph of blocks between a token embedding, times a scale, and a norm and an output matrix."""
        b, (table, final_norm, head) = self.builder, ends
        x = table.look_up(b, self.input_ids, "model.embed_tokens")
        if scale != 1:
            factor = b.constant("embedding_scale", np.array(scale, dtype=self.dtype.numpy()))
            x = b.op("Mul", [x, factor], "model.embed_tokens.scaled", shape=x.shape)
        added: ir.Value | None = None
        layers = decoder_layers(self.model)
        for index, block in enumerate(blocks):
            with at_hand(layers[block]):
                x, added = self.block(index, block, layers[block], x, added)
        hidden, _ = self.add_norm(x, added, final_norm, "model.norm")
        # Logits are float32 always.
        logits = head.apply(b, hidden, "logits" if self.dtype == ir.DataType.FLOAT else "lm_head")
        logits = b.cast(logits, "logits", ir.DataType.FLOAT)
        logits.shape = ir.Shape((*TOKENS, head.out_features))
        graph = ir.Graph(
            self.inputs,
            [logits, *self.outputs],
            nodes=b.tape.nodes,
            initializers=b.tape.initializers,
            name=name,
            opset_imports={"": opset, CONTRIB: 1},
        )
        _require_operators(graph, opset)
        # The oldest file format that has the opset: older runtimes refuse newer ones.
        opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(CONTRIB, 1)]
        return ir.Model(
            graph,
            ir_version=int(onnx.helper.find_min_ir_version_for(opsets, ignore_unknown=True)),
            producer_name="phoneready",
            metadata_props={CACHE_KEY: FIXED_CACHE},
        )

    def block(
        self, index: int, block: int, layer: nn.Module, x: ir.Value, added: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        """One block; returns the residual sum before its FFN, and the FFN's output that is still to be added."""
        spec, b = self.spec, self.builder
        prefix, name = f"model.layers.{index}", f"{spec.layers}.{block}"
        behind_attention, behind_ffn = spec.added_norms or ("", "")

        def norm(part: str) -> torch.Tensor | None:
            return self.norm_weight(f"{name}.{part}") if part else None

        def output_norm(y: ir.Value, part: str, norm_name: str) -> ir.Value:
            weight = norm(part)
            return y if weight is None else self.norm(y, weight, norm_name)

        attention, mixer = attention_of(self.model, layer), mixer_of(self.model, layer)
        if attention or mixer is not None:
            before = norm(spec.attention_norm)
            hidden, x = self.add_norm(x, added, before, f"{prefix}.input_layernorm")
            if attention:
                place, module = f"{prefix}.self_attn", f"{name}.{spec.attention}"
                attended = self.attention(block, attention, hidden, place, module)
                o_proj = getattr(attention, spec.output)
                added = self.linear(f"{module}.{spec.output}", o_proj, attended, f"{place}.o_proj")
                added = output_norm(added, behind_attention, f"{place}.output_norm")
            else:
                assert spec.mixer is not None  # or there would be none in the block
                write = {"conv": self.convolution, "linear_attention": self.delta_net}[spec.mixer.kind]
                added = write(mixer, hidden, prefix, f"{name}.{spec.mixer.module}")
            self.n_mixers += 1
        hidden, x = self.add_norm(x, added, norm(spec.ffn_norm), f"{prefix}.ffn_norm")
        ffn, mlp, place = feed_forward(self.model, layer), f"{name}.{spec.mlp}", f"{prefix}.mlp"
        gate = self.linear(f"{mlp}.{spec.gate}", ffn.gate, hidden, f"{place}.gate_proj")
        up = self.linear(f"{mlp}.{spec.up}", ffn.up, hidden, f"{place}.up_proj")
        activation = KNOWN_ACTIVATIONS[getattr(self.model.config, spec.activation_setting, "silu")]
        act = ACTIVATIONS[activation](b, gate, f"{place}.act")
        product = b.op("Mul", [act, up], f"{place}.product")
        down = self.linear(f"{mlp}.{spec.down}", ffn.down, product, f"{place}.down_proj")
        return x, output_norm(down, behind_ffn, f"{place}.output_norm")

    def linear(self, module: str, linear: Any, x: ir.Value, name: str) -> ir.Value:
        """A Linear of the model, by its name there, and its place in the graph."""
        return _layer(module, linear, self.weights).apply(self.builder, x, name)

    def norm_weight(self, module: str) -> torch.Tensor:
        """What a norm of the model multiplies by."""
        parameter, offset = f"{module}.weight", self.spec.norm_offset
        weight = self.weights.norms.get(parameter, self.model.get_parameter(parameter))
        return self.weights.stored(weight + offset if offset else weight)

    def norm(self, x: ir.Value, weight: torch.Tensor, name: str) -> ir.Value:
        return self.builder.rms_norm(x, self.builder.constant(f"{name}.weight", weight), name, self.epsilon)

    def add_norm(
        self, x: ir.Value, added: ir.Value | None, weight: torch.Tensor | None, name: str
    ) -> tuple[ir.Value, ir.Value]:
        """(norm of x + added, x + added); the sum twice without a norm."""
        if weight is None:
            total = x if added is None else self.builder.op("Add", [x, added], f"{name}.sum", shape=x.shape)
            return total, total
        if added is None:
            return self.norm(x, weight, name), x
        gamma = self.builder.constant(f"{name}.weight", weight)
        normed, total = (ir.val(n, self.dtype, [*TOKENS, len(weight)]) for n in (name, f"{name}.sum"))
        outputs = [normed, ir.val(""), ir.val(""), total]
        operator = "SkipSimplifiedLayerNormalization"
        self.builder.several(operator, [x, added, gamma], outputs, name, epsilon=self.epsilon)
        return normed, total

    def attention(self, block: int, attention: Any, hidden: ir.Value, prefix: str, module: str) -> ir.Value:
        """GroupQueryAttention on (batch_size, sequence_length, q + k + v); keys and values go to the cache."""
        b, spec, size, index = self.builder, self.spec, self.head_dim, self.n_mixers
        kv_heads = attention.k_proj.out_features // attention.head_dim
        heads, rope, norms = kv_heads * self.heads_per_group, self.rope_kinds[block], spec.head_norms
        rotated_first = False
        if rope is not None:
            # The operator norms nothing behind its rotation, and rotates heads of whole sixteens, by tables of whole
            # eights of columns.
            fits = len(self.ropes[rope][0]) % 8 == 0 and size % 16 == 0
            rotated_first = (norms is not None and norms.after_rope) or not fits
        names = [f"{prefix}.{part}" for part in QKV]
        modules = {f"{module}.{part}": getattr(attention, part) for part in QKV}
        query, gate = hidden, None
        key: ir.Value | None = None
        value: ir.Value | None = None
        if norms or not self.weights.packs(list(modules)):
            query, key, value = (
                self.linear(one, linear, hidden, name)
                for name, (one, linear) in zip(names, modules.items(), strict=True)
            )
        else:
            weight = torch.cat([linear.weight.detach() for linear in modules.values()])
            biases = [linear.bias.detach() for linear in modules.values() if linear.bias is not None]
            bias = torch.cat(biases) if biases else None
            query = self.weights.layer(f"{module}.{PACKED}", weight, bias).apply(
                b, hidden, f"{prefix}.{PACKED}"
            )
            if spec.gated or rotated_first:
                rows = ((1 + spec.gated) * heads * size, kv_heads * size, kv_heads * size)
                query, key, value = b.split_last(
                    query, dict(zip(names, rows, strict=True)), f"{prefix}.qkv_split"
                )
        if spec.gated:
            # A gate stands behind each head's query: its sigmoid multiplies what o_proj reads.
            both = b.heads(query, heads, 2 * size, f"{prefix}.q_and_gate")
            parts = b.split_last(
                both, {f"{prefix}.{part}.heads": size for part in ("q", "gate")}, f"{prefix}.q_gate"
            )
            query, gate = (
                b.join_heads(part, heads * size, f"{prefix}.{name}")
                for name, part in zip(("q", "gate"), parts, strict=True)
            )
        steps = ["norm"] * (norms is not None) + ["rotate"] * rotated_first
        for step in reversed(steps) if norms and norms.after_rope else steps:
            assert key is not None  # it is apart if anything is done to it
            if step == "rotate":
                query = self.rotated(query, rope, heads, f"{prefix}.q_rotated")
                key = self.rotated(key, rope, kv_heads, f"{prefix}.k_rotated")
            elif norms:
                of_query = f"{module}.{norms.query}", f"{prefix}.q_norm"
                query = self.head_norm(query, heads, *of_query)
                key = self.head_norm(key, kv_heads, f"{module}.{norms.key}", f"{prefix}.k_norm")

        def caches(start: str, length: str) -> list[ir.Value]:
            shape = ir.Shape(["batch_size", kv_heads, length, size])
            return [ir.val(f"{start}.{index}.{part}", self.dtype, shape) for part in ("key", "value")]

        past = caches("past_key_values", "past_sequence_length")
        present = caches("present", "total_sequence_length")
        attended = ir.val(prefix, self.dtype, [*TOKENS, heads * size])
        rotary = self.tables(rope) if rope is not None and not rotated_first else []
        attributes: dict[str, int | float] = {
            "num_heads": heads,
            "kv_num_heads": kv_heads,
            "scale": float(attention.scaling),
            "do_rotary": int(bool(rotary)),
            "rotary_interleaved": 0,
        }
        window = self.windows[block]
        if window is not None:
            attributes["local_window_size"] = window
        inputs = [query, key, value, *past, self.seqlens_k, self.total, *rotary]
        outputs, op = [attended, *present], "GroupQueryAttention"
        b.tape.op_multi_out(op, inputs, attributes, outputs=outputs, domain=CONTRIB, name=prefix)
        self.inputs += past
        self.outputs += present
        if gate is None:
            return attended
        share = b.op("Sigmoid", [gate], f"{prefix}.gated.share")
        return b.op("Mul", [attended, share], f"{prefix}.gated")

    def head_norm(self, x: ir.Value, heads: int, module: str, name: str) -> ir.Value:
        """The norm of each head, or one of all heads' numbers together."""
        weight = self.norm_weight(module)
        if len(weight) == heads * self.head_dim:
            return self.norm(x, weight, name)
        gamma = self.builder.constant(f"{name}.weight", weight)
        return self.builder.norm_heads(x, gamma, heads, name, self.epsilon)

    def rotated(self, x: ir.Value, rope: str | None, heads: int, name: str) -> ir.Value:
        """Queries or keys, rotated; positions are from what is in the cache on."""
        assert rope is not None  # or nothing would be rotated
        b, length = self.builder, self.input_length()
        before = b.op("Sub", [self.n_tokens, length], "tokens_before", shape=["batch_size"])
        # A row that ends with padding has fewer tokens than there are in the first call.
        start = b.op("Max", [before, b.constant("zero", [0])], "first_position", shape=["batch_size"])
        column = b.column(start, "first_positions")
        positions = b.op("Add", [column, self.steps(length)], "positions", shape=TOKENS)
        return b.op(
            "RotaryEmbedding",
            [x, positions, *self.tables(rope)],
            name,
            domain=CONTRIB,
            num_heads=heads,
            rotary_embedding_dim=2 * len(self.ropes[rope][0]),
        )

    def tables(self, kind: str) -> list[ir.Value]:
        """Cosines and sines of position * frequency, (positions, head_dim / 2) each, which a runtime computes."""
        b, (numbers, scale) = self.builder, self.ropes[kind]
        name, rows = _ROPE_NAMES[kind], self.positions
        prefix, counted = f"{name}rope", {"start": 0, "limit": rows, "step": 1}
        found = []
        for function in ("Cos", "Sin"):
            ends = [b.constant(f"{prefix}.{end}", np.float32(number)) for end, number in counted.items()]
            steps = b.op("Range", ends, f"{prefix}.positions", shape=[rows])
            column = b.column(steps, f"{prefix}.column")
            frequencies = b.constant(f"{prefix}.frequencies", numbers)
            angles = b.op("Mul", [column, frequencies], f"{prefix}.angles", shape=[rows, len(numbers)])
            cache = f"{name}{function.lower()}_cache"
            table = b.op(function, [angles], f"{cache}.plain")
            factor = b.constant(f"{prefix}.scale", np.float32(scale))
            found.append(b.cast(b.op("Mul", [table, factor], f"{cache}.scaled"), cache, self.dtype))
        return found

    def input_length(self) -> ir.Value:
        """Tokens of a row in this call."""
        b = self.builder
        sizes = b.op("Shape", [self.input_ids], "input_shape", shape=[2])
        return b.op("Gather", [sizes, b.constant("input_length_axis", 1)], "input_length", axis=0, shape=[])

    def steps(self, length: ir.Value) -> ir.Value:
        """0, 1, ... of the tokens of a call, (sequence_length,)."""
        ends = [self.builder.constant("range_start", 0), length, self.builder.constant("range_step", 1)]
        return self.builder.op("Range", ends, "steps", shape=["sequence_length"])

    def new_tokens(self) -> ir.Value:
        """How many of this call's tokens are no padding, (batch_size, 1)."""
        b = self.builder
        count = b.op("Min", [self.n_tokens, self.input_length()], "new_tokens", shape=["batch_size"])
        return b.column(count, "new_tokens.column")

    def kept(self, kind: str, shape: Sequence[int | str]) -> tuple[ir.Value, ir.Value]:
        """What is kept of a text that does not grow with it, as it was and as it becomes."""
        past, present = (
            ir.val(f"{when}_{kind}.{self.n_mixers}", self.dtype, ir.Shape(shape))
            for when in ("past", "present")
        )
        self.inputs.append(past)
        self.outputs.append(present)
        return past, present

    def convolve(self, convolution: nn.Conv1d, z: ir.Value, prefix: str) -> ir.Value:
        """A convolution over the text, each channel on its own, of z (batch_size, sequence_length, channels):

            y_t = sum over k of weights[k] z_{t - length + 1 + k} + bias

        Kept are the last `length` z that are no padding, one more than the next token reads, as its consumers want it.
        ONNX Runtime's Conv has a product for each channel, which for one token is slower by far.
        """
        b, weights = self.builder, self.weights.stored(convolution.weight.squeeze(1).T)
        length, channels = weights.shape
        past, present = self.kept("conv", ["batch_size", channels, length])
        shape = ("batch_size", length, channels)
        before = b.op("Transpose", [past], f"{prefix}.before", perm=[0, 2, 1], shape=shape)
        seen_shape = ("batch_size", f"{length}+tokens", channels)
        seen = b.op("Concat", [before, z], f"{prefix}.seen", axis=1, shape=seen_shape)
        total: ir.Value | None = None
        axis = b.constant("token_axis", [1])
        for place in range(length):
            start, stop = place + 1, place + 1 - length
            ends = [b.constant(f"place_{start}", [start]), b.constant(f"place_{stop}", [stop or _END]), axis]
            moved = b.op("Slice", [seen, *ends], f"{prefix}.seen.{place}", shape=(*TOKENS, channels))
            kernel = b.constant(f"{prefix}.kernel.{place}", weights[place])
            product = b.op("Mul", [moved, kernel], f"{prefix}.product.{place}")
            total = product if total is None else b.op("Add", [total, product], f"{prefix}.sum.{place}")
        assert total is not None  # a kernel has a length
        if convolution.bias is not None:
            bias = b.constant(f"{prefix}.bias", self.weights.stored(convolution.bias))
            total = b.op("Add", [total, bias], f"{prefix}.sum")
        column = self.new_tokens()
        steps = b.constant(f"steps_{length}", list(range(length)))
        places = b.op("Add", [column, steps], f"kept_places_{length}", shape=["batch_size", length])
        places = b.column(places, f"kept_places_{length}.apart")
        rows = b.op("GatherND", [seen, places], f"{prefix}.kept", batch_dims=1, shape=shape)
        b.several("Transpose", [rows], [present], str(present.name), domain="", perm=[0, 2, 1])
        return total

    def convolution(self, conv: Any, hidden: ir.Value, prefix: str, module: str) -> ir.Value:
        """LFM 2's: with b, c and x the three parts of in_proj(h), c convolution(b x) goes through out_proj."""
        b, prefix, size = self.builder, f"{prefix}.conv", conv.conv.out_channels
        self.new_tokens()
        projected = self.linear(f"{module}.in_proj", conv.in_proj, hidden, f"{prefix}.in_proj")
        parts = {f"{prefix}.{part}": size for part in ("b", "c", "x")}
        gate, output_gate, x = b.split_last(projected, parts, f"{prefix}.split")
        y = self.convolve(conv.conv, b.op("Mul", [gate, x], f"{prefix}.gated"), prefix)
        y = b.op("Mul", [output_gate, y], f"{prefix}.output")
        return self.linear(f"{module}.out_proj", conv.out_proj, y, f"{prefix}.out_proj")

    def delta_net(self, net: Any, hidden: ir.Value, prefix: str, module: str) -> ir.Value:
        """A gated delta net (Qwen 3.5's) in ONNX Runtime's LinearAttention.

        With q, k and v the parts of act(convolution(in_proj_qkv(h))), q and k of each head made to length one, and of
        each value head a state S (key_head_dim, value_head_dim), zeros before the text (arXiv 2412.06464):

            g_t = -exp(A_log) softplus(in_proj_a(h_t) + dt_bias)
            b_t = sigmoid(in_proj_b(h_t))
            S_t = exp(g_t) S_{t-1} + b_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T
            y_t = out_proj(norm(S_t^T q_t / sqrt(key_head_dim)) silu(in_proj_z(h_t)))

        What is kept of a text are S and what the convolution reads. g and b of padding are 0, so that S stays.
        """
        b, prefix, exact = self.builder, f"{prefix}.linear_attn", ir.DataType.FLOAT
        key_heads, value_heads = net.num_k_heads, len(net.A_log)
        parameter = f"{module}.norm.weight"
        gain = self.weights.stored(self.weights.norms.get(parameter, net.norm.weight))
        value_width = value_heads * len(gain)
        width = (net.conv1d.out_channels - value_width) // 2
        size = width // key_heads

        def project(part: str, x: ir.Value) -> ir.Value:
            return self.linear(f"{module}.{part}", getattr(net, part), x, f"{prefix}.{part}")

        new_tokens = self.new_tokens()
        convolved = self.convolve(net.conv1d, project("in_proj_qkv", hidden), f"{prefix}.conv1d")
        qkv = ACTIVATIONS[KNOWN_ACTIVATIONS[net.activation]](b, convolved, f"{prefix}.qkv")
        parts = {f"{prefix}.qk": 2 * width, f"{prefix}.value": value_width}
        both, value = b.split_last(qkv, parts, f"{prefix}.qk_v")
        # What is normed has a length of sqrt(its numbers).
        unit = b.constant(f"unit_of_{size}", np.full(size, size**-0.5, dtype=self.dtype.numpy()))
        normed = b.norm_heads(both, unit, 2 * key_heads, f"{prefix}.unit", _LENGTH_EPSILON / size)
        query, key = b.split_last(
            normed, {f"{prefix}.{part}": width for part in ("query", "key")}, f"{prefix}.q_k"
        )
        fading = b.cast(project("in_proj_a", hidden), f"{prefix}.a", exact)
        bias = b.constant(f"{prefix}.dt_bias", net.dt_bias.detach().float())
        fading = b.op("Softplus", [b.op("Add", [fading, bias], f"{prefix}.a_moved")], f"{prefix}.a_positive")
        rates = b.constant(f"{prefix}.rates", -net.A_log.detach().float().exp())
        fading = b.op("Mul", [fading, rates], f"{prefix}.g_plain")
        written = b.op("Sigmoid", [project("in_proj_b", hidden)], f"{prefix}.b_plain")
        # 1 for each token that is no padding, else 0.
        places = [self.steps(self.input_length()), new_tokens]
        inside = b.op("Less", places, "new_tokens.inside", dtype=ir.DataType.BOOL, shape=TOKENS)
        mask = b.cast(inside, "new_tokens.mask", self.dtype)
        mask = b.column(mask, "new_tokens.mask.apart")
        decay = b.op("Mul", [b.cast(fading, f"{prefix}.g_cast", self.dtype), mask], f"{prefix}.g")
        rate = b.op("Mul", [written, mask], f"{prefix}.b")
        past, present = self.kept("recurrent", ["batch_size", value_heads, size, len(gain)])
        attended = ir.val(f"{prefix}.attended", self.dtype, ir.Shape([*TOKENS, value_width]))
        b.several(
            "LinearAttention",
            [query, key, value, past, decay, rate],
            [attended, present],
            prefix,
            update_rule="gated_delta",
            q_num_heads=key_heads,
            kv_num_heads=value_heads,
            scale=size**-0.5,
        )
        gamma = b.constant(f"{prefix}.norm.weight", gain)
        normed = b.norm_heads(attended, gamma, value_heads, f"{prefix}.norm", net.layer_norm_epsilon)
        gate = silu(b, project("in_proj_z", hidden), f"{prefix}.gate")
        return project("out_proj", b.op("Mul", [normed, gate], f"{prefix}.gated"))


def _require_operators(graph: ir.Graph, opset: int) -> None:
    """Raise InputError if an opset lacks an operator, or has it with fewer inputs or without an attribute."""
    for node in graph:
        if node.domain or node.op_type == _RUNTIMES_OWN:
            continue
        try:
            schema = onnx.defs.get_schema(node.op_type, opset)
        except onnx.defs.SchemaError:
            lacks = node.op_type
        else:
            unknown = ", ".join(sorted(node.attributes.keys() - schema.attributes.keys()))
            lacks = f"{node.op_type} with {unknown}" if unknown else ""
            if len(node.inputs) > schema.max_input:
                lacks = f"{node.op_type} with {len(node.inputs)} inputs"
        if lacks:
            raise InputError(f"the graph wants {lacks}, which ONNX has not", field="opset", value=opset)
