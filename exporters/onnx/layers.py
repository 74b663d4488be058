"""Weights as a graph uses them: a Linear and an embedding, each stored as floats or as blocks of few bits.

The decoder graph only says where a layer's output goes; what multiplies is decided here, so that a variant with
other numbers is another table of layers and the same graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from exporters.onnx.graph_builder import CONTRIB, GraphBuilder, Numbers
from exporters.onnx.matrix import Rounded

TOKENS = ("batch_size", "sequence_length")
"""Leading dimensions of everything that is computed for each token."""
TABLE = "model.embed_tokens.weight"
"""Name of a stored embedding."""
_ACCURACY_LEVEL = 4
"""MatMulNBits rounds activations to int8, which is the fastest on a CPU."""


class Layer(Protocol):
    """A Linear layer: y = x W^T + b."""

    @property
    def out_features(self) -> int: ...

    def apply(self, builder: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
        """Add the nodes that compute y (batch_size, sequence_length, out_features) from x."""


class Embedding(Protocol):
    """A table with a row a token."""

    def look_up(self, builder: GraphBuilder, ids: ir.Value, name: str) -> ir.Value:
        """Add the nodes that give the rows of token ids (batch_size, sequence_length)."""

    def as_head(self) -> Layer:
        """The same table as output matrix, for tied embeddings: stored once."""


@dataclass(frozen=True)
class FloatLinear:
    """Weights as they are."""

    weight: Numbers  # w (out_features, in_features)
    bias: Numbers | None = None  # b (out_features,), or None
    # Of the embedding whose rows these are, multiplied as they are stored; else W^T is stored.
    table_name: str | None = None

    @property
    def out_features(self) -> int:
        """Rows of W."""
        return int(self.weight.shape[0])

    def apply(self, builder: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
        """See `Layer`."""
        shape, product = (*TOKENS, self.out_features), product_name(name, self.bias)
        if self.table_name is None:
            matrix = builder.constant(f"{name}.weight", self.weight.T)
            y = builder.op("MatMul", [x, matrix], product, shape=shape)
        else:
            table = builder.constant(self.table_name, self.weight)
            y = builder.op("FusedMatMul", [x, table], product, domain=CONTRIB, transB=1, shape=shape)
        return add_bias(builder, y, self.bias, name)


@dataclass(frozen=True)
class FloatEmbedding:
    """A table of floats (vocab_size, hidden_size)."""

    table: Numbers

    def look_up(self, builder: GraphBuilder, ids: ir.Value, name: str) -> ir.Value:
        """See `Embedding`."""
        table = builder.constant(TABLE, self.table)
        return builder.op("Gather", [table, ids], name, shape=(*TOKENS, self.table.shape[1]))

    def as_head(self) -> FloatLinear:
        """See `Embedding`."""
        return FloatLinear(self.table, table_name=TABLE)


@dataclass(frozen=True)
class NBitsLinear:
    """Weights of few bits, multiplied by MatMulNBits with float32 activations."""

    weight: Rounded  # w in blocks
    bias: Numbers | None = None  # b (out_features,), or None
    stored_name: str | None = None  # prefix of the stored tensors; a tied head names the embedding's

    @property
    def out_features(self) -> int:
        """Rows of W."""
        return len(self.weight.q)

    def apply(self, builder: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
        """See `Layer`."""
        y = builder.op(
            "MatMulNBits",
            [x, *_stored(builder, self.weight, self.stored_name or f"{name}.weight")],
            product_name(name, self.bias),
            shape=(*TOKENS, self.out_features),
            domain=CONTRIB,
            K=self.weight.columns,
            N=self.out_features,
            bits=self.weight.form.bits,
            block_size=self.weight.form.block_size,
            accuracy_level=_ACCURACY_LEVEL,
        )
        return add_bias(builder, y, self.bias, name)


@dataclass(frozen=True)
class NBitsEmbedding:
    """A table of few bits, looked up by GatherBlockQuantized; a tied head multiplies by the same bytes."""

    table: Rounded
    stored_name: str = TABLE

    def look_up(self, builder: GraphBuilder, ids: ir.Value, name: str) -> ir.Value:
        """See `Embedding`."""
        data, scales = _stored(builder, self.table, self.stored_name)
        (_, count, size), columns = self.table.q.shape, self.table.columns
        # The numbers keep the shape that MatMulNBits wants: a reshaped table would be a second one in memory.
        apart = builder.op(
            "Unsqueeze",
            [scales, builder.constant("last_axis", [-1])],
            f"{self.stored_name}.scale_blocks",
            shape=(*self.table.scales.shape, 1),
        )
        rows = builder.op(
            "GatherBlockQuantized",
            [data, ids, apart],
            f"{name}.blocks",
            dtype=ir.DataType.FLOAT,
            shape=(*TOKENS, count, size),
            domain=CONTRIB,
            bits=self.table.form.bits,
            block_size=size,
            gather_axis=0,
            quantize_axis=2,
        )
        joined_name = name if columns == count * size else f"{name}.padded"
        together = builder.constant("joined_blocks", [0, 0, -1])
        joined = builder.op("Reshape", [rows, together], joined_name, shape=(*TOKENS, count * size))
        if joined_name == name:
            return joined
        bounds = [
            builder.constant(f"{self.stored_name}.{part}", [value])
            for part, value in (("first", 0), ("end", columns), ("axis", 2))
        ]
        return builder.op("Slice", [joined, *bounds], name, shape=(*TOKENS, columns))

    def as_head(self) -> NBitsLinear:
        """See `Embedding`."""
        return NBitsLinear(self.table, stored_name=self.stored_name)


@dataclass(frozen=True)
class StackedLinear:
    """Layers of the same inputs as one: the outputs of the first, then those of the next."""

    parts: tuple[Layer, ...]  # first rows first

    @property
    def out_features(self) -> int:
        """Rows of all."""
        return sum(part.out_features for part in self.parts)

    def apply(self, builder: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
        """See `Layer`."""
        outputs = [part.apply(builder, x, f"{name}.{index}") for index, part in enumerate(self.parts)]
        return builder.op("Concat", outputs, name, shape=(*TOKENS, self.out_features), axis=-1)


@dataclass(frozen=True)
class StackedEmbedding:
    """Two tables as one, for rows of unlike formats."""

    first: NBitsEmbedding  # of the first tokens
    rest: NBitsEmbedding  # of all others

    def look_up(self, builder: GraphBuilder, ids: ir.Value, name: str) -> ir.Value:
        """See `Embedding`: both tables are asked, with an id that each has, and one of them is believed."""
        first_rows, int64 = len(self.first.table.q), ir.DataType.INT64

        def with_number(op: str, x: ir.Value, number: int, part: str, dtype: ir.DataType = int64) -> ir.Value:
            factors = [x, builder.constant(f"{name}.{number}", number)]
            return builder.op(op, factors, f"{name}.{part}", dtype=dtype)

        in_first = with_number("Less", ids, first_rows, "in_first", ir.DataType.BOOL)
        first_ids = with_number("Min", ids, first_rows - 1, "first_ids")
        moved = with_number("Sub", ids, first_rows, "moved_ids")
        rest_ids = with_number("Max", moved, 0, "rest_ids")
        first = self.first.look_up(builder, first_ids, f"{name}.first")
        rest = self.rest.look_up(builder, rest_ids, f"{name}.rest")
        last = builder.constant("last_axis", [-1])
        chosen = builder.op("Unsqueeze", [in_first, last], f"{name}.choice", shape=(*TOKENS, 1))
        shape = (*TOKENS, self.first.table.columns)
        return builder.op("Where", [chosen, first, rest], name, dtype=first.dtype, shape=shape)

    def as_head(self) -> StackedLinear:
        """See `Embedding`."""
        return StackedLinear((self.first.as_head(), self.rest.as_head()))


def _stored(builder: GraphBuilder, matrix: Rounded, name: str) -> tuple[ir.Value, ir.Value]:
    """(numbers, scales in float32)."""
    scales = builder.constant(f"{name}.scale", matrix.scales)
    data = builder.constant(f"{name}.q{matrix.form.bits}", matrix.packed())
    # The runtime computes it when it loads the file.
    return data, builder.cast(scales, f"{scales.name}.cast", ir.DataType.FLOAT)


def split_last(
    builder: GraphBuilder, x: ir.Value, parts: Mapping[str, int], name: str
) -> tuple[ir.Value, ...]:
    """x cut along its last axis, into parts of these names and sizes."""
    assert x.shape is not None  # every value of a GraphBuilder has its shape
    leading = list(x.shape)[:-1]
    outputs = [ir.val(part, x.dtype, ir.Shape([*leading, size])) for part, size in parts.items()]
    sizes = builder.constant(f"sizes_{'_'.join(map(str, parts.values()))}", list(parts.values()))
    builder.tape.op_multi_out("Split", [x, sizes], {"axis": -1}, outputs=outputs, name=name)
    return tuple(outputs)


def rms_norm(builder: GraphBuilder, x: ir.Value, gamma: ir.Value, name: str, epsilon: float) -> ir.Value:
    """gamma x / sqrt(mean(x^2) + epsilon) along the last axis."""
    return builder.op(
        "SimplifiedLayerNormalization", [x, gamma], name, axis=-1, epsilon=epsilon, stash_type=1
    )


def norm_heads(
    builder: GraphBuilder, x: ir.Value, gamma: ir.Value, heads: int, name: str, epsilon: float
) -> ir.Value:
    """The norm of each head of x (batch_size, sequence_length, heads * size); gamma is (size,), of all heads."""
    assert gamma.shape is not None  # a constant's
    size = int(gamma.shape.numpy()[0])
    apart = builder.constant(f"{heads}_heads_of_{size}", [0, 0, heads, size])
    split = builder.op("Reshape", [x, apart], f"{name}.heads", shape=(*TOKENS, heads, size))
    normed = rms_norm(builder, split, gamma, f"{name}.normed", epsilon)
    return join_heads(builder, normed, heads * size, name)


def join_heads(builder: GraphBuilder, x: ir.Value, width: int, name: str) -> ir.Value:
    """The numbers of all heads, `width`, behind each other: (batch_size, sequence_length, width)."""
    together = builder.constant("joined_heads", [0, 0, -1])
    return builder.op("Reshape", [x, together], name, shape=(*TOKENS, width))


def product_name(name: str, bias: Numbers | None) -> str:
    """What a product is called, to which `add_bias` adds."""
    return name if bias is None else f"{name}.product"


def add_bias(builder: GraphBuilder, y: ir.Value, bias: Numbers | None, name: str) -> ir.Value:
    """y + b, called `name`; y itself if there is no bias."""
    return y if bias is None else builder.op("Add", [y, builder.constant(f"{name}.bias", bias)], name)
