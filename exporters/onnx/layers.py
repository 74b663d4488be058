"""Weights as a graph uses them: a Linear and an embedding, each stored as floats or as blocks of few bits.

The decoder graph only says where a layer's output goes; what multiplies is decided here, so that a variant with
other numbers is another table of layers and the same graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporters.onnx.graph_builder import CONTRIB, GraphBuilder

TOKENS = ("batch_size", "sequence_length")
"""Leading dimensions of everything that is computed for each token."""


class Layer(Protocol):
    """A Linear layer: y = x W^T + b."""

    @property
    def out_features(self) -> int: ...

    def apply(self, builder: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
        """Add the nodes that compute y (batch_size, sequence_length, out_features) from x."""
        ...


class Embedding(Protocol):
    """A table with a row a token."""

    def look_up(self, builder: GraphBuilder, ids: ir.Value, name: str) -> ir.Value:
        """Add the nodes that give the rows of token ids (batch_size, sequence_length)."""
        ...

    def as_head(self) -> Layer:
        """The same table as output matrix, for tied embeddings: stored once."""
        ...


@dataclass(frozen=True)
class BlockQuantized:
    """A matrix in blocks of `block_size` along its rows: w = (q - 2^(bits-1)) * scale.

    Attributes:
        bits: 4 or 8.
        block_size: Inputs that share a scale; a power of two, 16 or more.
        data: (rows, blocks, block_size * bits / 8) uint8; of two 4-bit numbers in a byte the first is the low one.
        scales: (rows, blocks) float16; the graph casts them when it is loaded.
        columns: Inputs before padding to whole blocks.
    """

    bits: int
    block_size: int
    data: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float16]
    columns: int


@dataclass(frozen=True)
class FloatLinear:
    """Weights as they are.

    Attributes:
        weight: W (out_features, in_features).
        bias: b (out_features,), or None.
        weight_name: Of the stored weight; a tied head names the embedding's.
        transposed: Multiply by the stored rows (FusedMatMul) instead of storing W^T.
    """

    weight: npt.NDArray[np.floating]
    bias: npt.NDArray[np.floating] | None = None
    weight_name: str | None = None
    transposed: bool = False

    @property
    def out_features(self) -> int:
        """Rows of W."""
        return int(self.weight.shape[0])

    def apply(self, builder: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
        """See `Layer`."""
        stored = self.weight_name or f"{name}.weight"
        dtype, shape = _dtype(x), (*TOKENS, self.out_features)
        product = name if self.bias is None else f"{name}.product"
        if self.transposed:
            factors = [x, builder.constant(stored, self.weight)]
            y = builder.op(
                "FusedMatMul", factors, product, domain=CONTRIB, transB=1, dtype=dtype, shape=shape
            )
        else:
            factors = [x, builder.constant(stored, self.weight.T)]
            y = builder.op("MatMul", factors, product, dtype=dtype, shape=shape)
        return y if self.bias is None else add_bias(builder, y, self.bias, name)


@dataclass(frozen=True)
class FloatEmbedding:
    """A table of floats (vocab_size, hidden_size)."""

    table: npt.NDArray[np.floating]
    stored_name: str = "model.embed_tokens.weight"

    def look_up(self, builder: GraphBuilder, ids: ir.Value, name: str) -> ir.Value:
        """See `Embedding`."""
        table = builder.constant(self.stored_name, self.table)
        return builder.op(
            "Gather", [table, ids], name, dtype=_dtype(table), shape=(*TOKENS, self.table.shape[1])
        )

    def as_head(self) -> FloatLinear:
        """See `Embedding`."""
        return FloatLinear(self.table, weight_name=self.stored_name, transposed=True)


@dataclass(frozen=True)
class NBitsLinear:
    """Weights of few bits, multiplied by MatMulNBits with float32 activations.

    Attributes:
        weight: W in blocks.
        bias: b (out_features,), or None.
        accuracy_level: How activations are rounded: 0 not at all, 4 to int8, which is the fastest on a CPU.
        stored_name: Prefix of the stored tensors; a tied head names the embedding's.
    """

    weight: BlockQuantized
    bias: npt.NDArray[np.floating] | None = None
    accuracy_level: int = 4
    stored_name: str | None = None

    @property
    def out_features(self) -> int:
        """Rows of W."""
        return int(self.weight.data.shape[0])

    def apply(self, builder: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
        """See `Layer`."""
        stored = self.stored_name or f"{name}.weight"
        y = builder.op(
            "MatMulNBits",
            [x, *_stored(builder, self.weight, stored)],
            name if self.bias is None else f"{name}.product",
            dtype=_dtype(x),
            shape=(*TOKENS, self.out_features),
            domain=CONTRIB,
            K=self.weight.columns,
            N=self.out_features,
            bits=self.weight.bits,
            block_size=self.weight.block_size,
            accuracy_level=self.accuracy_level,
        )
        return y if self.bias is None else add_bias(builder, y, self.bias, name)


@dataclass(frozen=True)
class NBitsEmbedding:
    """A table of few bits, looked up by GatherBlockQuantized; a tied head multiplies by the same bytes."""

    table: BlockQuantized
    accuracy_level: int = 4
    stored_name: str = "model.embed_tokens.weight"

    def look_up(self, builder: GraphBuilder, ids: ir.Value, name: str) -> ir.Value:
        """See `Embedding`."""
        data, scales = _stored(builder, self.table, self.stored_name)
        count, float32 = self.table.data.shape[1], ir.DataType.FLOAT
        size = self.table.block_size
        # The numbers keep the shape that MatMulNBits wants: a reshaped table would be a second one in memory.
        apart = builder.op(
            "Unsqueeze",
            [scales, builder.constant("last_axis", np.array([-1], dtype=np.int64))],
            f"{self.stored_name}.scale_blocks",
            dtype=float32,
            shape=(*self.table.scales.shape, 1),
        )
        rows = builder.op(
            "GatherBlockQuantized",
            [data, ids, apart],
            f"{name}.blocks",
            dtype=float32,
            shape=(*TOKENS, count, size),
            domain=CONTRIB,
            bits=self.table.bits,
            block_size=size,
            gather_axis=0,
            quantize_axis=2,
        )
        together = builder.constant("joined_blocks", np.array([0, 0, -1], dtype=np.int64))
        columns, padded = self.table.columns, count * size
        joined = builder.op(
            "Reshape",
            [rows, together],
            name if columns == padded else f"{name}.padded",
            dtype=float32,
            shape=(*TOKENS, padded),
        )
        if columns == padded:
            return joined
        bounds = [
            builder.constant(f"{self.stored_name}.{part}", np.array([value], dtype=np.int64))
            for part, value in (("first", 0), ("end", columns), ("axis", 2))
        ]
        return builder.op("Slice", [joined, *bounds], name, dtype=float32, shape=(*TOKENS, columns))

    def as_head(self) -> NBitsLinear:
        """See `Embedding`."""
        return NBitsLinear(self.table, None, self.accuracy_level, self.stored_name)


@dataclass(frozen=True)
class StackedLinear:
    """Layers of the same inputs as one: the outputs of the first, then those of the next.

    Attributes:
        parts: First rows first.
    """

    parts: tuple[Layer, ...]

    @property
    def out_features(self) -> int:
        """Rows of all."""
        return sum(part.out_features for part in self.parts)

    def apply(self, builder: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
        """See `Layer`."""
        outputs = [part.apply(builder, x, f"{name}.{index}") for index, part in enumerate(self.parts)]
        shape = (*TOKENS, self.out_features)
        return builder.op("Concat", outputs, name, dtype=_dtype(x), shape=shape, axis=-1)


@dataclass(frozen=True)
class StackedEmbedding:
    """Two tables as one, for rows of unlike formats.

    Attributes:
        first: Of the first tokens.
        rest: Of all others.
    """

    first: NBitsEmbedding
    rest: NBitsEmbedding

    def look_up(self, builder: GraphBuilder, ids: ir.Value, name: str) -> ir.Value:
        """See `Embedding`: both tables are asked, with an id that each has, and one of them is believed."""
        int64, first_rows = ir.DataType.INT64, len(self.first.table.data)

        def number(value: int) -> ir.Value:
            return builder.constant(f"{name}.{value}", np.array(value, dtype=np.int64))

        def on_ids(op: str, x: ir.Value, y: ir.Value, part: str, dtype: ir.DataType = int64) -> ir.Value:
            return builder.op(op, [x, y], f"{name}.{part}", dtype=dtype, shape=TOKENS)

        in_first = on_ids("Less", ids, number(first_rows), "in_first", ir.DataType.BOOL)
        first_ids = on_ids("Min", ids, number(first_rows - 1), "first_ids")
        moved = on_ids("Sub", ids, number(first_rows), "moved_ids")
        rest_ids = on_ids("Max", moved, number(0), "rest_ids")
        first = self.first.look_up(builder, first_ids, f"{name}.first")
        rest = self.rest.look_up(builder, rest_ids, f"{name}.rest")
        last = builder.constant("last_axis", np.array([-1], dtype=np.int64))
        chosen = builder.op(
            "Unsqueeze", [in_first, last], f"{name}.choice", dtype=ir.DataType.BOOL, shape=(*TOKENS, 1)
        )
        shape = (*TOKENS, self.first.table.columns)
        return builder.op("Where", [chosen, first, rest], name, dtype=_dtype(first), shape=shape)

    def as_head(self) -> StackedLinear:
        """See `Embedding`."""
        return StackedLinear((self.first.as_head(), self.rest.as_head()))


def _stored(builder: GraphBuilder, matrix: BlockQuantized, name: str) -> tuple[ir.Value, ir.Value]:
    """(numbers, scales in float32)."""
    scales = builder.constant(f"{name}.scale", matrix.scales)
    return (
        builder.constant(f"{name}.q{matrix.bits}", matrix.data),
        # The runtime computes it when it loads the file.
        builder.once(
            "Cast",
            [scales],
            f"{scales.name}.cast",
            dtype=ir.DataType.FLOAT,
            shape=matrix.scales.shape,
            to=ir.DataType.FLOAT,
        ),
    )


def add_bias(builder: GraphBuilder, y: ir.Value, bias: npt.NDArray[np.floating], name: str) -> ir.Value:
    """y + b, called `name`."""
    stored = builder.constant(f"{name}.bias", bias)
    return builder.op("Add", [y, stored], name, dtype=_dtype(y), shape=(*TOKENS, len(bias)))


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None  # every value of a GraphBuilder has its type
    return value.dtype
