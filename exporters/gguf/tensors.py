"""The tensors of a GGUF file: names, shapes, types and sizes, and what of the checkpoint each is made of.

llama.cpp chooses a tensor's type by its name, its block and the quantization, not by its width, unless a row does not
divide into the type's blocks. So one written file, a `SizeTemplate`, says what others of its architecture will weigh.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cfsp.errors import InputError
from cfsp.models.gguf_file import DELTA_NET_NUMBERS, UNQUANTIZED, GGUFTensor, Tiling, read_gguf, tilings
from exporters.checkpoint_reader import ModelConfig
from exporters.gguf.architecture import QKV, ROPE_TENSORS, ChosenLayout
from exporters.gguf.quants import Quant, block_of, find_quant

FloatArray = npt.NDArray[np.float32]
_UNREAD = ("k_proj", "v_proj", "k_norm")
"""Of the attention of a block that reads another block's keys and values; published files have them all the same."""
_ALIGNMENT = 32
# Where a row does not divide into blocks of 256, llama.cpp stores the right-hand type instead; where it does not even
# divide into blocks of 32, float16.
_FALLBACKS = MappingProxyType(
    {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "Q4_0", "Q2_K": "Q4_0"}
    | dict.fromkeys(("IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S"), "IQ4_NL")
)
_SMALL_BLOCK, _LARGE_BLOCK = 32, 256


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the file and the checkpoint's tensors that it is made of."""

    name: str  # llama.cpp's name
    shape: tuple[int, ...]  # in the file, outermost dimension first
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

    def build(self, read: Callable[[str, tuple[int, ...]], FloatArray]) -> FloatArray:
        """The tensor, float32, of what `read` gives for the name and shape of each source."""
        values = self.stack([read(name, shape) for name, shape in self.sources])
        if self.offset:
            values = values + np.float32(self.offset)
        if self.compute:
            values = self.compute(values)
        return np.ascontiguousarray(values.reshape(self.shape))

    def stack(self, parts: Sequence[FloatArray]) -> FloatArray:
        """Rows of the sources in the order of the file's."""
        values = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if self.tiling and values.ndim > self.tiling.axis:
            values = self.tiling.tiled(values)
        return swap_halves(values, (self.interleave_heads, 2, -1)) if self.interleave_heads else values

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
            values = swap_halves(values, (self.interleave_heads, -1, 2))
        ends = np.cumsum([shape[0] for _, shape in self.sources])
        parts = np.split(values, ends[:-1])
        return {name: part for (name, _), part in zip(self.sources, parts, strict=True)}


def swap_halves(values: FloatArray, parts: tuple[int, int, int]) -> FloatArray:
    """Rows of q or k, (heads * head_dim, ...), with halves (heads, 2, n) as neighbours; (heads, n, 2) turns it back."""
    split = values.reshape(*parts, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


def tensor_specs(chosen: ChosenLayout) -> list[TensorSpec]:
    """All tensors of the file, in file order; raises InputError: the checkpoint has some without a place in it."""
    config, spec = chosen.config, chosen.config.spec
    embedding = (config.vocab_size, config.hidden_size)

    def plain(module: str, shape: tuple[int, ...], offset: float = 0.0, is_plain: bool = False) -> TensorSpec:
        sources = ((f"{module}.weight", shape),)
        return TensorSpec(chosen.name(module), shape, sources, offset=offset, is_plain=is_plain)

    specs = [plain("model.embed_tokens", embedding)]
    if (inputs := spec.block_inputs) and config.block_inputs:
        # What blocks get of a token beside its hidden state; llama.cpp quantizes of it the table alone.
        numbers = config.num_hidden_layers * config.block_inputs
        specs += [
            plain(f"model.{inputs.table}", (config.vocab_size, numbers)),
            plain(f"model.{inputs.projection}", (numbers, config.hidden_size), is_plain=True),
            plain(f"model.{inputs.norm}", (config.block_inputs,), spec.norm_offset),
        ]
    for block in range(config.num_hidden_layers):
        specs += _block_specs(chosen, block)
    specs.append(plain(f"model.{spec.last_norm}", (config.hidden_size,), spec.norm_offset))
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    ignored |= {
        f"model.layers.{block}.{spec.attention}.{name}.weight"
        for block in range(config.num_hidden_layers - config.sharing_blocks, config.num_hidden_layers)
        for name in _UNREAD
    }
    if not config.tie_word_embeddings:
        specs.append(plain("lm_head", embedding))
    used = {name for each in specs for name, _ in each.sources}
    rest = (name for name in chosen.stored - used - ignored if not name.startswith(spec.left_out))
    unknown = sorted(name for name in rest if not name.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise InputError(
            f"the checkpoint has tensors that {config.model_type} does not have: {', '.join(unknown[:5])}"
        )
    return specs


def _block_specs(chosen: ChosenLayout, block: int) -> Iterator[TensorSpec]:
    config, prefix = chosen.config, f"model.layers.{block}"
    shapes, kv_heads = _block_shapes(config, block), config.kv_heads[block]
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
        source = f"{prefix}.{module}"
        interleave = heads.get(module, 0) if chosen.layout.interleaved_rope else 0
        target = chosen.name(source)
        offset = config.spec.norm_offset if module.endswith("norm") else 0.0
        yield TensorSpec(target, shape, ((f"{source}.weight", shape),), interleave, offset)
        if f"{source}.bias" in chosen.stored:
            bias = target.removesuffix("weight") + "bias"
            yield TensorSpec(bias, shape[:1], ((f"{source}.bias", shape[:1]),), interleave)
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
    shapes: dict[str, tuple[int, ...]] = {
        name.rpartition(".")[2]: shape for name, shape in _mixer_linears(config).items()
    }
    order: dict[str, Tiling] = {}
    parts: tuple[str, ...] = ("conv", "in_proj", "out_proj")
    kernels = (config.hidden_size, config.convolution_length)
    if net:
        order = dict(tilings(net.key_heads, net.value_heads, net.key_width))
        parts = ("in_proj_qkv", "in_proj_z", "conv1d", "dt_bias", "A_log")
        parts = (*parts, "in_proj_b", "in_proj_a", "norm", "out_proj")
        shapes |= {"norm": (net.value_head_dim,), "dt_bias": (net.value_heads,), "A_log": (net.value_heads,)}
        kernels = (net.channels, net.length)
    for part in parts:
        called, suffix = DELTA_NET_NUMBERS.get(part, (part, ".weight"))
        target = chosen.name(f"{block}.{mixer.module}.{called}").removesuffix(".weight") + suffix
        source = f"{block}.{mixer.module}.{part}{'' if part in DELTA_NET_NUMBERS else '.weight'}"
        tiling = order.get(part)
        if part.startswith("conv"):  # as torch has them, (channels, 1, length)
            stored = (kernels[0], 1, kernels[1])
            yield TensorSpec(target, kernels, ((source, stored),), is_plain=True, tiling=tiling)
        else:
            shape = shapes[part]
            compute = (lambda a_log: -np.exp(a_log)) if part == "A_log" else None  # rates of decay
            yield TensorSpec(target, shape, ((source, shape),), compute=compute, tiling=tiling)


def _block_shapes(config: ModelConfig, index: int) -> dict[str, tuple[int, ...]]:
    """Module inside a block -> shape of its weight."""
    block, head_dim = config.shape.blocks[index], config.head_dims[index]
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


class PredictedTensor(NamedTuple):
    """A tensor of a file that is not written; its size is without padding."""

    name: str
    shape: tuple[int, ...]
    kind: str
    n_bytes: int


class SizeTemplate(NamedTuple):
    """What a written file says of others of its model, quantization and architecture."""

    architecture: str
    # All that is not a tensor. A name of another length moves it by at most one step of the alignment.
    overhead_bytes: int
    types: dict[str, str]  # tensor -> the type that the quantization asks for, before any fallback

    def tensors(self, chosen: ChosenLayout) -> list[PredictedTensor]:
        """A model's tensors in file order; raises InputError: it needs another architecture than the template's."""
        if chosen.layout.architecture != self.architecture:
            raise InputError(
                "the size template is of another architecture",
                field="architecture",
                value=self.architecture,
                allowed=chosen.layout.architecture,
            )
        found = []
        for spec in tensor_specs(chosen):
            kind = self.types[spec.name]
            while spec.shape[-1] % block_of(kind)[0]:
                kind = _FALLBACKS.get(kind, "F16")
            found.append(PredictedTensor(spec.name, spec.shape, kind, stored_bytes(spec.shape, kind)))
        return found

    def file_bytes(self, chosen: ChosenLayout) -> int:
        return self.overhead_bytes + sum(padded(tensor.n_bytes) for tensor in self.tensors(chosen))


def size_template(path: Path, quant: str) -> SizeTemplate:
    """Read a written file; raises InputError: no GGUF file, or an unknown quantization."""
    row, file = find_quant(quant), read_gguf(path)
    # Tensors that are made of the config count as overhead: no width changes them.
    tensors = [tensor for tensor in file.tensors if tensor.name not in ROPE_TENSORS]
    data = sum(padded(int(tensor.data.nbytes)) for tensor in tensors)
    types = {tensor.name: _asked_type(tensor, row) for tensor in tensors}
    return SizeTemplate(file.architecture, path.stat().st_size - data, types)


def stored_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor whose rows divide into a type's blocks."""
    elements, size = block_of(kind)
    return math.prod(shape) // elements * size


def padded(count: int) -> int:
    """Bytes of a tensor with what fills up to the next."""
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def fallbacks(tensors: Iterable[GGUFTensor], quant: Quant) -> Iterator[str]:
    """Warnings of tensors that are not of the type asked for, because their rows do not divide into its blocks."""
    groups: dict[tuple[str, str, int], list[str]] = defaultdict(list)
    for tensor in tensors:
        asked = _asked_type(tensor, quant)
        if asked != tensor.kind.name:
            groups[asked, tensor.kind.name, tensor.shape[-1]].append(tensor.name)
    for (asked, actual, length), (name, *others) in sorted(groups.items()):
        more = f" and {len(others)} more" if others else ""
        yield f"stored as {actual} instead of {asked}, for rows of {length}: {name}{more}"


def _asked_type(tensor: GGUFTensor, quant: Quant) -> str:
    """The type a tensor would have had if its rows divided into blocks; of several the quantization's own."""
    actual, shape = str(tensor.kind.name), tensor.shape
    if len(shape) < 2 or tensor.name.endswith(UNQUANTIZED) or quant.is_plain or actual == quant.base_type:
        return actual
    if shape[-1] % _SMALL_BLOCK and actual in ("F16", "F32"):
        return quant.base_type
    if shape[-1] % _LARGE_BLOCK:
        asked = [kind for kind, stored in _FALLBACKS.items() if stored == actual]
        return quant.base_type if quant.base_type in asked else next(iter(asked), actual)
    return actual
