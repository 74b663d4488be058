"""The tensors of a GGUF file: their names and shapes, and what of the checkpoint each is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cfsp.errors import InputError
from cfsp.models.gguf_file import DELTA_NET_NUMBERS, Tiling, tilings
from cfsp.models.shape import BlockShape
from exporters.checkpoint_reader import ModelConfig
from exporters.gguf.architecture import QKV, ChosenLayout

FloatArray = npt.NDArray[np.float32]
_UNREAD = ("k_proj", "v_proj", "k_norm")
"""Of the attention of a block that reads another block's keys and values; published files have them all the same."""


class Tensors(Protocol):
    """A checkpoint's tensors, stored or as they are to become."""

    def read(self, name: str, shape: tuple[int, ...]) -> FloatArray:
        """One of them."""
        ...


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the file and the checkpoint's tensors that it is made of."""

    name: str  # llama.cpp's name
    # In the file, outermost dimension first; if the sources are smaller, zeros are added.
    shape: tuple[int, ...]
    # Checkpoint names and their shapes; more than one are stacked along the first dimension.
    sources: tuple[tuple[str, tuple[int, ...]], ...]
    interleave_heads: int = 0  # number of heads whose rotary halves are interleaved; 0 leaves the rows alone
    offset: float = 0.0  # what is added to every number
    is_plain: bool = False  # stored in float32 always
    compute: Callable[[FloatArray], FloatArray] | None = None  # what else is made of them; None for nothing
    # How value heads of a delta net are ordered; None if there are none, or all are as in the sources.
    tiling: Tiling | None = None

    @property
    def is_matrix(self) -> bool:
        """Whether it is stored in the bits that are asked for."""
        return len(self.shape) == 2 and not self.is_plain

    def build(self, tensors: Tensors) -> FloatArray:
        """Read the sources and make the tensor, float32.

        Raises InputError: a source is missing, of another shape, or not finite.
        """
        values = self.stack([tensors.read(name, shape) for name, shape in self.sources])
        if self.offset:
            values = values + np.float32(self.offset)
        if self.compute:
            values = self.compute(values)
        if values.shape == self.shape or self.is_plain:
            return np.ascontiguousarray(values.reshape(self.shape))
        padded = np.zeros(self.shape, dtype=np.float32)
        padded[tuple(slice(n) for n in values.shape)] = values
        return padded

    def stack(self, parts: Sequence[FloatArray]) -> FloatArray:
        """Rows of the sources in the order of the file's; what it pads is missing."""
        values = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if self.tiling and values.ndim > self.tiling.axis:
            values = self.tiling.tiled(values)
        return interleave_halves(values, self.interleave_heads) if self.interleave_heads else values

    def of_inputs(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Values of a module's inputs, (..., in_features), in the order of the file's columns."""
        if self.tiling is None or self.tiling.axis == 0:
            return values
        return replace(self.tiling, axis=-1).tiled(values)

    def split(self, values: FloatArray) -> dict[str, FloatArray]:
        """What `build` would have to read to make a matrix: name of a source -> its values."""
        if self.tiling:
            values = self.tiling.grouped(values)
        if self.interleave_heads:
            values = join_halves(values, self.interleave_heads)
        ends = np.cumsum([shape[0] for _, shape in self.sources])
        return {
            name: values[end - rows : end, :columns]
            for end, (name, (rows, columns)) in zip(ends, self.sources, strict=True)
        }


def interleave_halves(values: FloatArray, heads: int) -> FloatArray:
    """Rows of q or k, (heads * head_dim, ...): row i of a head's first half comes before row i of its second half."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def join_halves(values: FloatArray, heads: int) -> FloatArray:
    """What `interleave_halves` was given."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def tensor_specs(chosen: ChosenLayout) -> list[TensorSpec]:
    """All tensors of the file, in file order.

    Raises InputError: the checkpoint has tensors that have no place in the file.
    """
    config = chosen.config
    embedding = (config.vocab_size, config.hidden_size)
    specs = [_plain("model.embed_tokens", embedding, chosen), *_input_specs(chosen)]
    for block in range(config.num_hidden_layers):
        specs += _block_specs(chosen, block)
    last_norm = f"model.{config.spec.last_norm}"
    specs.append(_plain(last_norm, (config.hidden_size,), chosen, config.spec.norm_offset))
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    ignored |= {
        f"model.layers.{block}.{config.spec.attention}.{name}.weight"
        for block in range(config.num_hidden_layers - config.sharing_blocks, config.num_hidden_layers)
        for name in _UNREAD
    }
    if not config.tie_word_embeddings:
        specs.append(_plain("lm_head", embedding, chosen))
    used = {name for spec in specs for name, _ in spec.sources}
    rest = (name for name in chosen.stored - used - ignored if not name.startswith(config.spec.left_out))
    unknown = sorted(name for name in rest if not name.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise InputError(
            f"the checkpoint has tensors that {config.model_type} does not have: {', '.join(unknown[:5])}"
        )
    return specs


def _input_specs(chosen: ChosenLayout) -> Iterator[TensorSpec]:
    """What blocks get of a token beside its hidden state; llama.cpp quantizes of it the table alone."""
    config, inputs = chosen.config, chosen.config.spec.block_inputs
    if not inputs or not config.block_inputs:
        return
    numbers = config.num_hidden_layers * config.block_inputs
    yield _plain(f"model.{inputs.table}", (config.vocab_size, numbers), chosen)
    projection = _plain(f"model.{inputs.projection}", (numbers, config.hidden_size), chosen)
    yield replace(projection, is_plain=True)
    yield _plain(f"model.{inputs.norm}", (config.block_inputs,), chosen, config.spec.norm_offset)


def _plain(module: str, shape: tuple[int, ...], chosen: ChosenLayout, offset: float = 0.0) -> TensorSpec:
    return TensorSpec(chosen.name(module), shape, ((f"{module}.weight", shape),), offset=offset)


def _block_specs(chosen: ChosenLayout, block: int) -> Iterator[TensorSpec]:
    config, prefix = chosen.config, f"model.layers.{block}"
    shapes = _block_shapes(config, config.shape.blocks[block], config.head_dims[block])
    in_file = _block_shapes(
        config, replace(config.shape.blocks[block], ffn_width=chosen.widths[block]), config.head_dims[block]
    )
    kv_heads = config.kv_heads[block]
    heads = {"self_attn.q_proj": kv_heads * config.heads_per_group, "self_attn.k_proj": kv_heads}
    if chosen.layout.fused_qkv:
        sources = tuple((f"{prefix}.{module}.weight", shapes.pop(module)) for module in QKV)
        rows = sum(shape[0] for _, shape in sources)
        yield TensorSpec(chosen.name(f"{prefix}.{QKV[0]}"), (rows, config.hidden_size), sources)
    if config.shape.blocks[block].is_keyless and config.spec.mixer:
        for module in _mixer_linears(config):
            del shapes[module]
        yield from _mixer_specs(chosen, prefix)
    for module, shape in shapes.items():
        source, stored = f"{prefix}.{module}", in_file[module]
        interleave = heads.get(module, 0) if chosen.layout.interleaved_rope else 0
        target = chosen.name(source)
        offset = config.spec.norm_offset if module.endswith("norm") else 0.0
        yield TensorSpec(target, stored, ((f"{source}.weight", shape),), interleave, offset)
        if f"{source}.bias" in chosen.stored:
            bias = target.removesuffix("weight") + "bias"
            yield TensorSpec(bias, stored[:1], ((f"{source}.bias", shape[:1]),), interleave)
    if config.spec.scalar:
        scalar = f"{prefix}.{config.spec.scalar}"
        yield TensorSpec(chosen.name(scalar), (1,), ((scalar, (1,)),))


def _mixer_linears(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of what takes attention's place in a block, every Linear inside the block -> shape of its weight."""
    size, net, mixer = config.hidden_size, config.delta_net, config.spec.mixer
    shapes: dict[str, tuple[int, ...]] = {"in_proj": (3 * size, size), "out_proj": (size, size)}
    if net:
        shapes = {
            "in_proj_qkv": (net.channels, size),
            "in_proj_z": (net.value_width, size),
            "in_proj_b": (net.value_heads, size),
            "in_proj_a": (net.value_heads, size),
            "out_proj": (size, net.value_width),
        }
    return {f"{mixer.module}.{part}": shape for part, shape in shapes.items()} if mixer else {}


def _mixer_specs(chosen: ChosenLayout, block: str) -> Iterator[TensorSpec]:
    """What takes attention's place in a block."""
    config, mixer, net = chosen.config, chosen.config.spec.mixer, chosen.config.delta_net
    assert mixer is not None  # of a model type with such blocks
    linears, order = _mixer_linears(config), {}
    parts: tuple[str, ...] = ("conv", "in_proj", "out_proj")
    kernels = (config.hidden_size, config.convolution_length)
    if net:
        order = dict(tilings(net.key_heads, net.value_heads, net.key_width))
        parts = (
            "in_proj_qkv",
            "in_proj_z",
            "conv1d",
            "dt_bias",
            "A_log",
            "in_proj_b",
            "in_proj_a",
            "norm",
            "out_proj",
        )
        kernels = (net.channels, net.length)
    for part in parts:
        called, suffix = DELTA_NET_NUMBERS.get(part, (part, ".weight"))
        target = chosen.name(f"{block}.{mixer.module}.{called}").removesuffix(".weight") + suffix
        source = f"{block}.{mixer.module}.{part}{'' if part in DELTA_NET_NUMBERS else '.weight'}"
        tiling = order.get(part)
        if part.startswith("conv"):  # as torch has them, (channels, 1, length)
            sources = ((source, (kernels[0], 1, kernels[1])),)
            yield TensorSpec(target, kernels, sources, is_plain=True, tiling=tiling)
            continue
        shape = linears.get(f"{mixer.module}.{part}")
        if shape is None:
            assert net is not None
            shape = (net.value_head_dim,) if part == "norm" else (net.value_heads,)
        compute = (lambda a_log: -np.exp(a_log)) if part == "A_log" else None  # rates of decay
        yield TensorSpec(target, shape, ((source, shape),), compute=compute, tiling=tiling)


def _block_shapes(config: ModelConfig, block: BlockShape, head_dim: int) -> dict[str, tuple[int, ...]]:
    """Module inside a block -> shape of its weight."""
    hidden, width, spec = config.hidden_size, block.ffn_width, config.spec
    is_mixed, shares = block.is_keyless and spec.mixer, block.is_keyless and not spec.mixer
    kv = (config.shape.most_kv_groups if shares else block.kv_groups or 0) * head_dim
    q = kv * config.heads_per_group
    mixing: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (q * (2 if spec.gated else 1), hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        f"self_attn.{spec.output}": (hidden, q),
    }
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(filter(None, [spec.attention_norm]), (hidden,)),
        **(_mixer_linears(config) if is_mixed else mixing),
        **dict.fromkeys(filter(None, (*spec.added_norms, spec.ffn_norm)), (hidden,)),
        f"{spec.mlp}.{spec.gate}": (width, hidden),
        f"{spec.mlp}.{spec.up}": (width, hidden),
        f"{spec.mlp}.{spec.down}": (hidden, width),
    }
    if spec.head_norms and not is_mixed:
        query, key = (q, kv) if spec.head_norms.joint else (head_dim, head_dim)
        shapes[f"self_attn.{spec.head_norms.query}"] = (query,)
        shapes[f"self_attn.{spec.head_norms.key}"] = (key,)
    if spec.block_inputs and (size := config.block_inputs):
        shapes |= {
            spec.block_inputs.gate: (size, hidden),
            spec.block_inputs.output: (hidden, size),
            spec.block_inputs.output_norm: (hidden,),
        }
    if not block.has_attention:
        gone = (*spec.attention_norms, "self_attn.")
        return {name: shape for name, shape in shapes.items() if not name.startswith(gone)}
    if shares:
        return {name: shape for name, shape in shapes.items() if not name.endswith(_UNREAD)}
    return shapes


def linear_inputs(config: ModelConfig) -> dict[str, int]:
    """Every Linear of the blocks, by Hugging Face's module name -> its in_features."""
    return {
        f"model.layers.{block}.{module}": shape[1]
        for block, of_block in enumerate(config.shape.blocks)
        for module, shape in _block_shapes(config, of_block, config.head_dims[block]).items()
        if len(shape) == 2
    }
