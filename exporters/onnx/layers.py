"""What an ONNX graph is written with: nodes, matrices that multiply or are looked up, and which of them are one layer.

The decoder graph only says where a layer's output goes; how its matrix is stored and multiplied is decided here, so
that a variant with other numbers is another set of matrices in the same graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from cfsp.errors import InputError
from cfsp.models.families.row import Family
from cfsp.models.offload import at_hand
from exporters.onnx.matrix import ZERO_OF_ROWS, Int8Rows, Rounded, round_rows
from exporters.onnx.variants import HEAD

CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""
TOKENS = ("batch_size", "sequence_length")
"""Leading dimensions of everything that is computed for each token."""
TABLE = "model.embed_tokens.weight"
"""Name of a stored embedding."""
_ACCURACY_LEVEL = 4  # MatMulNBits rounds activations to int8, which is the fastest on a CPU
_FAR = 10**12
Dims = Iterable[int | str | ir.SymbolicDim | None]
Numbers = npt.NDArray[Any] | torch.Tensor


def unwritten(name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.ExternalTensor:
    """A reference to numbers in a file that is not there, with more digits than one to any that is."""
    return ir.ExternalTensor("unwritten", _FAR, _FAR, dtype, shape=ir.Shape(shape), name=name)


class GraphBuilder:
    """Collects nodes and initializers by name; all values have type and shape, which no inference knows."""

    def __init__(self) -> None:
        self.tape = ir.tape.Tape()
        self._values: dict[str, ir.Value] = {}

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        name: str,
        *,
        dtype: ir.DataType | None = None,
        shape: Dims | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """A node with one output, called `name`; its type and shape are the first input's unless given."""
        if name not in self._values:
            dims = inputs[0].shape if shape is None else shape
            assert dims is not None  # every value that is made here has a shape
            output = ir.val(name, dtype or inputs[0].dtype, ir.Shape(dims))
            self._values[name] = self.tape.op(
                op_type, inputs, attributes, domain=domain, name=name, output=output
            )
        return self._values[name]

    def constant(self, name: str, value: npt.ArrayLike | torch.Tensor) -> ir.Value:
        """An initializer; Python's integers become int64, and torch's meta tensors `unwritten`."""
        if name not in self._values:
            if isinstance(value, torch.Tensor) and value.is_meta:
                dtype = ir.DataType.from_numpy(torch.empty(0, dtype=value.dtype).numpy().dtype)
                tensor: ir.TensorProtocol = unwritten(name, dtype, value.shape)
            else:
                tensor = ir.tensor(np.asarray(value, order="C"), name=name)
            self._values[name] = self.tape.initializer(tensor, name)
        return self._values[name]

    def cast(self, x: ir.Value, name: str, dtype: ir.DataType) -> ir.Value:
        """x in a type; x itself if it is of that type."""
        return x if x.dtype == dtype else self.op("Cast", [x], name, dtype=dtype, to=dtype)

    def column(self, x: ir.Value, name: str) -> ir.Value:
        """x with a last axis of one."""
        assert x.shape is not None  # every value that is made here has a shape
        return self.op("Unsqueeze", [x, self.constant("last_axis", [-1])], name, shape=(*x.shape, 1))

    def several(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
        name: str,
        domain: str = CONTRIB,
        **attributes: Any,
    ) -> None:
        """A node with these outputs."""
        self.tape.op_multi_out(op_type, inputs, attributes, outputs=outputs, domain=domain, name=name)

    def split_last(self, x: ir.Value, parts: Mapping[str, int], name: str) -> tuple[ir.Value, ...]:
        """x cut along its last axis, into parts of these names and sizes."""
        assert x.shape is not None  # every value that is made here has a shape
        leading = list(x.shape)[:-1]
        outputs = [ir.val(part, x.dtype, ir.Shape([*leading, size])) for part, size in parts.items()]
        sizes = self.constant(f"sizes_{'_'.join(map(str, parts.values()))}", list(parts.values()))
        self.several("Split", [x, sizes], outputs, name, domain="", axis=-1)
        return tuple(outputs)

    def rms_norm(self, x: ir.Value, gamma: ir.Value, name: str, epsilon: float) -> ir.Value:
        """gamma x / sqrt(mean(x^2) + epsilon) along the last axis."""
        return self.op(
            "SimplifiedLayerNormalization", [x, gamma], name, axis=-1, epsilon=epsilon, stash_type=1
        )

    def norm_heads(self, x: ir.Value, gamma: ir.Value, heads: int, name: str, epsilon: float) -> ir.Value:
        """The norm of each head of x (batch_size, sequence_length, heads * size); gamma (size,) is all heads'."""
        assert gamma.shape is not None  # a constant's
        size = int(gamma.shape.numpy()[0])
        normed = self.rms_norm(self.heads(x, heads, size, f"{name}.heads"), gamma, f"{name}.normed", epsilon)
        return self.join_heads(normed, heads * size, name)

    def heads(self, x: ir.Value, heads: int, size: int, name: str) -> ir.Value:
        """(batch_size, sequence_length, heads * size) -> (batch_size, sequence_length, heads, size)."""
        apart = self.constant(f"{heads}_heads_of_{size}", [0, 0, heads, size])
        return self.op("Reshape", [x, apart], name, shape=(*TOKENS, heads, size))

    def join_heads(self, x: ir.Value, width: int, name: str) -> ir.Value:
        """What `heads` takes apart, together again."""
        return self.op(
            "Reshape", [x, self.constant("joined_heads", [0, 0, -1])], name, shape=(*TOKENS, width)
        )


def silu(builder: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
    """x sigmoid(x)."""
    return builder.op("QuickGelu", [x], name, alpha=1.0, domain=CONTRIB)


ACTIVATIONS: Mapping[str, Callable[[GraphBuilder, ir.Value, str], ir.Value]] = MappingProxyType(
    {"silu": silu, "gelu_tanh": lambda builder, x, name: builder.op("FastGelu", [x], name, domain=CONTRIB)}
)
"""As `exporters.checkpoint_reader` names them."""


class Matrix(Protocol):
    """W (out_features, in_features), or a table of tokens; a tied one is both, stored once, as `stored_name`."""

    @property
    def out_features(self) -> int: ...

    def apply(self, builder: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
        """x W^T + b, (batch_size, sequence_length, out_features)."""

    def look_up(self, builder: GraphBuilder, ids: ir.Value, name: str) -> ir.Value:
        """The rows of token ids (batch_size, sequence_length)."""


class Floats(NamedTuple):
    """Weights as they are; what is no table is stored as W^T."""

    weight: Numbers
    bias: Numbers | None = None
    stored_name: str | None = None

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    def apply(self, builder: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
        shape, product = (*TOKENS, self.out_features), _product_name(name, self.bias)
        if self.stored_name is None:
            matrix = builder.constant(f"{name}.weight", self.weight.T)
            y = builder.op("MatMul", [x, matrix], product, shape=shape)
        else:
            table = builder.constant(self.stored_name, self.weight)
            y = builder.op("FusedMatMul", [x, table], product, domain=CONTRIB, transB=1, shape=shape)
        return _add_bias(builder, y, self.bias, name)

    def look_up(self, builder: GraphBuilder, ids: ir.Value, name: str) -> ir.Value:
        table = builder.constant(self.stored_name or TABLE, self.weight)
        return builder.op("Gather", [table, ids], name, shape=(*TOKENS, self.weight.shape[1]))


@dataclass(frozen=True)
class NBits:
    """Blocks of few bits, multiplied by MatMulNBits and looked up by GatherBlockQuantized, from the same bytes."""

    weight: Rounded
    bias: Numbers | None = None
    stored_name: str | None = None

    @property
    def out_features(self) -> int:
        return len(self.weight.q)

    def apply(self, builder: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
        y = builder.op(
            "MatMulNBits",
            [x, *self._stored(builder, self.stored_name or f"{name}.weight")],
            _product_name(name, self.bias),
            shape=(*TOKENS, self.out_features),
            domain=CONTRIB,
            K=self.weight.columns,
            N=self.out_features,
            bits=self.weight.form.bits,
            block_size=self.weight.form.block_size,
            accuracy_level=_ACCURACY_LEVEL,
        )
        return _add_bias(builder, y, self.bias, name)

    def look_up(self, builder: GraphBuilder, ids: ir.Value, name: str) -> ir.Value:
        stored_name = self.stored_name or TABLE
        data, scales = self._stored(builder, stored_name)
        (_, count, size), columns = self.weight.q.shape, self.weight.columns
        # The numbers keep the shape that MatMulNBits wants: a reshaped table would be a second one in memory.
        apart = builder.column(scales, f"{stored_name}.scale_blocks")
        rows = builder.op(
            "GatherBlockQuantized",
            [data, ids, apart],
            f"{name}.blocks",
            dtype=ir.DataType.FLOAT,
            shape=(*TOKENS, count, size),
            domain=CONTRIB,
            bits=self.weight.form.bits,
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
            builder.constant(f"{stored_name}.{part}", [value])
            for part, value in (("first", 0), ("end", columns), ("axis", 2))
        ]
        return builder.op("Slice", [joined, *bounds], name, shape=(*TOKENS, columns))

    def _stored(self, builder: GraphBuilder, name: str) -> tuple[ir.Value, ir.Value]:
        """Numbers, and scales in float32, which the runtime computes when it loads the file."""
        scales = builder.constant(f"{name}.scale", self.weight.scales)
        data = builder.constant(f"{name}.q{self.weight.form.bits}", self.weight.packed())
        return data, builder.cast(scales, f"{scales.name}.cast", ir.DataType.FLOAT)


class Stacked(NamedTuple):
    """Matrices of the same inputs and unlike formats as one: the rows of the first, then those of the next."""

    parts: tuple[Matrix, ...]

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)

    def apply(self, builder: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
        outputs = [part.apply(builder, x, f"{name}.{index}") for index, part in enumerate(self.parts)]
        return builder.op("Concat", outputs, name, shape=(*TOKENS, self.out_features), axis=-1)

    def look_up(self, builder: GraphBuilder, ids: ir.Value, name: str) -> ir.Value:
        """Both of two tables are asked, with an id that each has, and one of them is believed."""
        (one, other), n_first = self.parts, self.parts[0].out_features

        def with_number(op: str, x: ir.Value, number: int, part: str, **given: Any) -> ir.Value:
            factors = [x, builder.constant(f"{name}.{number}", number)]
            return builder.op(op, factors, f"{name}.{part}", **given)

        in_first = with_number("Less", ids, n_first, "in_first", dtype=ir.DataType.BOOL)
        first_ids = with_number("Min", ids, n_first - 1, "first_ids")
        moved = with_number("Sub", ids, n_first, "moved_ids")
        rest_ids = with_number("Max", moved, 0, "rest_ids")
        first = one.look_up(builder, first_ids, f"{name}.first")
        rest = other.look_up(builder, rest_ids, f"{name}.rest")
        chosen = builder.column(in_first, f"{name}.choice")
        return builder.op("Where", [chosen, first, rest], name, dtype=first.dtype, shape=first.shape)


class Int8(NamedTuple):
    """Int8 with a scale for each output, multiplied as integers: W8A8 in standard operators.

        y = ((x_q - 128) (W_q - 128)^T) * s_x * s_w,   x_q = 128 + round(x / s_x),  s_x = max |x| / 127 of the token,
                                                       W_q likewise with s_w of the row

    Both are unsigned: WebAssembly's fast kernel wants that, and with AVX2 and no VNNI ONNX Runtime adds products of an
    unsigned and a signed number in 16 bits, which two do not fit. A scale for each token keeps apart the few whose
    activations are a hundred times as large.
    """

    weight: Int8Rows
    bias: Numbers | None = None
    stored_name: str | None = None

    @property
    def out_features(self) -> int:
        return int(self.weight.data.shape[0])

    def apply(self, builder: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
        stored, shape = self.stored_name or f"{name}.weight", (*TOKENS, self.out_features)
        if self.stored_name is None:
            weight = builder.constant(f"{stored}.q8", self.weight.data.T)
        else:
            table = builder.constant(f"{stored}.q8", self.weight.data)
            turned = self.weight.data.shape[::-1]
            weight = builder.op("Transpose", [table], f"{stored}.transpose", shape=turned, perm=[1, 0])
        assert x.shape is not None  # every value that is made here has a shape
        of_tokens = (*TOKENS, x.shape[-1])
        last = builder.constant("last_axis", [-1])
        sizes = builder.op("Abs", [x], f"{x.name}.abs", shape=of_tokens)
        largest = builder.op("ReduceMax", [sizes, last], f"{x.name}.largest", shape=(*TOKENS, 1), keepdims=1)
        # A token of zeros must not divide by zero.
        least = builder.constant("smallest_scale", np.float32(1e-30))
        share = builder.constant("int8_share", np.float32(1 / 127))
        scale = builder.op("Mul", [largest, share], f"{x.name}.scale")
        scale = builder.op("Max", [scale, least], f"{x.name}.token_scale")
        steps = builder.op("Div", [x, scale], f"{x.name}.steps", shape=of_tokens)
        whole = builder.op("Round", [steps], f"{x.name}.whole")
        moved = builder.op("Add", [whole, _middle(builder)], f"{x.name}.moved")
        rounded = builder.cast(moved, f"{x.name}.q8", ir.DataType.UINT8)
        zero = builder.constant("zero_q8", np.uint8(ZERO_OF_ROWS))
        factors = [rounded, weight, zero, zero]
        product = builder.op(
            "MatMulInteger", factors, f"{name}.product", dtype=ir.DataType.INT32, shape=shape
        )
        y = builder.cast(product, f"{name}.float", ir.DataType.FLOAT)
        y = builder.op("Mul", [y, scale], f"{name}.times_token")
        scales = builder.constant(f"{stored}.scale", self.weight.scales)
        y = builder.op("Mul", [y, scales], name if self.bias is None else f"{name}.times_row")
        return _add_bias(builder, y, self.bias, name)

    def look_up(self, builder: GraphBuilder, ids: ir.Value, name: str) -> ir.Value:
        data = builder.constant(f"{TABLE}.q8", self.weight.data)
        scales = builder.constant(f"{TABLE}.scale", self.weight.scales)
        rows = builder.op("Gather", [data, ids], f"{name}.rows", shape=(*TOKENS, self.weight.data.shape[1]))
        values = builder.cast(rows, f"{name}.float", ir.DataType.FLOAT)
        values = builder.op("Sub", [values, _middle(builder)], f"{name}.whole")
        scale = builder.op("Gather", [scales, ids], f"{name}.row_scale", shape=TOKENS)
        return builder.op("Mul", [values, builder.column(scale, f"{name}.scale")], name)


def _middle(builder: GraphBuilder) -> ir.Value:
    return builder.constant("middle_q8", np.float32(ZERO_OF_ROWS))


def _product_name(name: str, bias: Numbers | None) -> str:
    return name if bias is None else f"{name}.product"


def _add_bias(builder: GraphBuilder, y: ir.Value, bias: Numbers | None, name: str) -> ir.Value:
    """y + b, called `name`; y itself if there is no bias."""
    return y if bias is None else builder.op("Add", [y, builder.constant(f"{name}.bias", bias)], name)


PACKED, QKV = "qkv_proj", ("q_proj", "k_proj", "v_proj")
HEAD_PARTS = (f"{HEAD}.frequent", f"{HEAD}.rest")
"""The output matrix's first rows and all others: tokenizers number tokens as they learn them, common ones first."""
_FREQUENT_SHARE, _ROWS_ALIGN = 16, 32


def check_blocks(spec: Family) -> None:
    """Raise InputError for a model type whose blocks no graph computes."""
    if reason := spec.not_in_graphs:
        what, value = f"no graph is written yet of blocks {reason}", spec.model_type
        raise InputError(what, field="model_type", value=value, allowed="GGUF")


def check_rope(rope_type: str) -> None:
    """Raise InputError for a rope that the graph cannot compute."""
    if rope_type == "dynamic":
        raise InputError(
            "a rope whose frequencies change with the text's length is not supported by the fused graph",
            field="rope_type",
            value=rope_type,
            allowed="default, linear, llama3, longrope, yarn",
        )


def head_parts(vocab_size: int) -> dict[str, slice]:
    """Rows of the output matrix by the part's name: the first sixteenth of the tokens, and the rest."""
    rows = _ROWS_ALIGN * -(-vocab_size // (_FREQUENT_SHARE * _ROWS_ALIGN))
    return dict(zip(HEAD_PARTS, (slice(0, rows), slice(rows, vocab_size)), strict=True))


def group_of(name: str) -> tuple[str, ...]:
    """What can be one layer with a module, itself included: q, k and v; the output matrix's parts."""
    if name in HEAD_PARTS:
        return HEAD_PARTS
    prefix, _, last = name.rpartition(".")
    return tuple(f"{prefix}.{part}" for part in QKV) if last in QKV else (name,)


def packed_names(name: str) -> tuple[str, ...]:
    """The modules whose rows a layer holds: itself, or q, k and v of a packed one, or the output matrix's parts."""
    if name == HEAD:
        return HEAD_PARTS
    prefix, _, last = name.rpartition(".")
    return group_of(f"{prefix}.{QKV[0]}") if last == PACKED else (name,)


def weight_of(model: Any, name: str) -> torch.Tensor:
    """The weight of a Linear, of a part of the output matrix, or of `TABLE`, (rows, in_features); a view."""
    weight: torch.Tensor = _module_of(model, name).weight.detach()
    return weight[head_parts(len(weight))[name]] if name in HEAD_PARTS else weight


def read_weight(model: Any, name: str) -> torch.Tensor:
    """`weight_of` as float32, wherever the model keeps it."""
    with at_hand(_module_of(model, name)):
        return weight_of(model, name).float()


def _module_of(model: Any, name: str) -> Any:
    if name in HEAD_PARTS:
        return model.get_output_embeddings()
    return model.get_input_embeddings() if name == TABLE else model.get_submodule(name)


def is_tied(model: Any) -> bool:
    """Whether the token embedding is the output matrix."""
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How a model's weights are stored: as the checkpoint has them, unless a variant overrides it."""

    dtype: torch.dtype = torch.float32  # of norms, rotary tables, what is computed, and here of all
    # Parameter name -> the weight of a norm that is not the checkpoint's.
    norms: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def layer(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Matrix:
        """A Linear, W (out_features, in_features) float32; `...qkv_proj` for q, k and v in one."""
        return Floats(self.stored(weight), None if bias is None else self.stored(bias))

    def table(self, weight: torch.Tensor, *, tied: bool) -> Matrix:
        """The token embedding (vocab_size, hidden_size) float32; a tied one is the output matrix, too."""
        return Floats(self.stored(weight), stored_name=TABLE)

    def packs(self, names: Sequence[str]) -> bool:
        """Whether q, k and v, or the output matrix's parts, are one layer, which is faster."""
        return True

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """It in the dtype of what is computed."""
        return tensor.detach().to(self.dtype)


class Int8Weights(Weights):
    """Everything in int8, with a scale for each row."""

    def layer(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Int8:
        return Int8(round_rows(weight), bias)

    def table(self, weight: torch.Tensor, *, tied: bool) -> Int8:
        return Int8(round_rows(weight), stored_name=TABLE)
