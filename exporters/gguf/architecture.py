"""Which llama.cpp architecture holds a model type, and what its tensors are called and look like there.

Most of llama.cpp's architectures use block 0's FFN width for all blocks. Two take a width for each block and compute
what our model types compute: `deci` (llama, mistral, qwen2) and `openelm` (qwen3 with tied embeddings). Every model
type lists its layouts in order of preference; the first that can represent the model is used. Where none takes its
widths, the FFN is padded with zero channels to the widest block: exact, but the pruned space comes back.

Both take numbers of heads for each block as well; `deci` alone takes blocks without attention (head counts of 0).

Two conventions of rotary embedding exist. `llama` and `deci` rotate neighbouring pairs of a head's values, so the rows
of q and k (weights and biases) are interleaved; the others rotate halves, as Hugging Face's models do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from cfsp.errors import InputError
from cfsp.models.gguf_file import tensor_names
from cfsp.models.shape import BlockShape, ModelShape
from exporters.checkpoint_reader import CheckpointTensors, ModelConfig, open_tensors, read_config
from exporters.export_record import ParityLimits
from exporters.gguf.mixers import MixerTensor, Tiling, mixer_tensors
from exporters.gguf.rope import BY_FREQUENCY

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layout:
    """What one of llama.cpp's architectures takes.

    Attributes:
        architecture: Its name in general.architecture.
        per_layer_sizes: Takes an FFN width and numbers of heads for each block.
        interleaved_rope: Rotates neighbouring pairs: rows of q and k are interleaved.
        fused_qkv: Stores q, k and v as one matrix, and head counts as arrays.
        biases: Linear layers of a block that may have a bias.
        rope_factors: Reads divisors of single frequencies (llama3's and longrope's scaling).
        free_head_dim: All heads together may be wider or narrower than hidden_size.
        untied: Has an output matrix of its own.
        attention_free: Takes blocks without attention.
        unrotated_step: The last of each so many blocks does not rotate its queries and keys; 0: all do.
        rotates_windowed: Rotates them in blocks that see a window alone, where there are such, and in no others.
        activation: Of the FFN, as `ModelConfig` names it.
        tied: Takes a model whose output matrix is its embedding.
        window_base: Where it takes a window, reads a base of the rope for blocks that have one.
        full_step: Where it takes a window, the last of each so many blocks has none, unless a file says of each block
            whether it has; 0: it takes none.
        windowed_depth: Takes a window in models of so many blocks, which all have one, and in no others; 0: in any.
        exact_limits: What holds a float32 file, where llama.cpp computes something of it in fewer bits.
    """

    architecture: str
    per_layer_sizes: bool = False
    interleaved_rope: bool = False
    fused_qkv: bool = False
    biases: frozenset[str] = frozenset()
    rope_factors: bool = False
    free_head_dim: bool = True
    untied: bool = True
    tied: bool = True
    attention_free: bool = False
    unrotated_step: int = 0
    rotates_windowed: bool = False
    activation: str = "silu"
    window_base: bool = False
    full_step: int = 0
    windowed_depth: int = 0
    exact_limits: ParityLimits | None = None

    def rotated(self, windows: Sequence[int | None]) -> tuple[bool, ...]:
        """Whether each block's queries and keys are rotated, of blocks that see so many tokens (None: all)."""
        if self.rotates_windowed and any(windows):
            return tuple(window is not None for window in windows)
        step = self.unrotated_step
        return tuple(not step or (block + 1) % step != 0 for block in range(len(windows)))


_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_ALL_LINEAR = _ATTENTION | {"gate_proj", "up_proj", "down_proj"}

_LLAMA = Layout("llama", interleaved_rope=True, biases=_ALL_LINEAR, rope_factors=True)
_DECI = replace(_LLAMA, architecture="deci", per_layer_sizes=True, attention_free=True)
_QWEN2 = Layout("qwen2", biases=_ATTENTION - {"o_proj"}, free_head_dim=False)
_QWEN3 = Layout("qwen3", biases=_ATTENTION - {"o_proj"})
_OPENELM = Layout("openelm", per_layer_sizes=True, fused_qkv=True, untied=False)

_SMOLLM3 = Layout("smollm3", interleaved_rope=True, biases=_ATTENTION - {"o_proj"}, unrotated_step=4)
# ggml looks GELU up in a table of float16: a number that falls to the other side of a step is off by 0.05 %.
_GELU_TABLE = ParityLimits(max_logit_diff=0.5, kl_mean=1e-4, same_top1=0.99)
_GEMMA3 = Layout("gemma3", activation="gelu_tanh", window_base=True, full_step=6, exact_limits=_GELU_TABLE)
_OLMO2 = Layout("olmo2", biases=_ATTENTION - {"o_proj"}, free_head_dim=False, tied=False, full_step=4)
_EXAONE4 = Layout(
    "exaone4",
    rope_factors=True,
    free_head_dim=False,
    rotates_windowed=True,
    full_step=4,
    windowed_depth=64,
)
_LFM2 = Layout("lfm2", free_head_dim=False)
_QWEN35 = Layout("qwen35")
_HUNYUAN = Layout("hunyuan-dense", biases=_ATTENTION - {"o_proj"})

LAYOUTS: Mapping[str, tuple[Layout, ...]] = MappingProxyType(
    {
        "llama": (_LLAMA, _DECI),
        "mistral": (_LLAMA, _DECI),
        "qwen2": (_QWEN2, _DECI),
        "qwen3": (_QWEN3, _OPENELM),
        "smollm3": (_SMOLLM3,),
        "gemma3_text": (_GEMMA3,),
        "olmo2": (_OLMO2,),
        "olmo3": (_OLMO2,),
        "exaone4": (_EXAONE4,),
        "hunyuan_v1_dense": (_HUNYUAN,),
        "lfm2": (_LFM2,),
        "qwen3_5_text": (_QWEN35,),
    }
)

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class ChosenLayout:
    """A layout and the model that goes into it.

    Attributes:
        config: The model.
        stored: Names of the checkpoint's tensors.
        layout: The architecture.
        padded_width: Width to which every block is zero-padded; None where each keeps its own.
    """

    config: ModelConfig
    stored: frozenset[str]
    layout: Layout
    padded_width: int | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """FFN widths of the blocks in the file."""
        widths = self.config.shape.ffn_widths
        return widths if self.padded_width is None else (self.padded_width,) * len(widths)

    @property
    def context_length(self) -> int:
        """Longest context for which llama.cpp computes what the checkpoint computes.

        As long as the context is not longer than a window, the window makes no difference.
        """
        config = self.config
        cut = None if self.layout.full_step else config.narrowest
        return min(config.max_position_embeddings, cut or config.max_position_embeddings)

    def name(self, module: str) -> str:
        """llama.cpp's name of the weight that a module's is stored in."""
        if self.layout.fused_qkv and module.endswith(_QKV):
            module = module.rpartition(".")[0] + ".qkv_proj"
        names = tensor_names(self.layout.architecture, self.config.num_hidden_layers)
        return f"{names.get_name(module)}.weight"

    def of_shape(self, shape: ModelShape) -> ChosenLayout:
        """The layout of the same model with the FFN widths of a shape, and with its tokens where it says how many."""
        known = self.config.shape.with_ffn_widths(shape.ffn_widths)
        known = replace(known, vocab_size=shape.vocab_size or known.vocab_size)
        return choose_layout(replace(self.config, shape=known), self.stored)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the file and the checkpoint's tensors that it is made of.

    Attributes:
        name: llama.cpp's name.
        shape: In the file, outermost dimension first; where the sources are smaller, zeros are added.
        sources: Checkpoint names and their shapes; more than one are stacked along the first dimension.
        interleave_heads: Number of heads whose rotary halves are interleaved; 0 leaves the rows alone.
        offset: What is added to every number.
        compute: What else is made of them; None for nothing.
        tiling: How value heads of a delta net are ordered; None where there are none, or all are as in the sources.
        is_plain: Stored in float32 always.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[tuple[str, tuple[int, ...]], ...]
    interleave_heads: int = 0
    offset: float = 0.0
    is_plain: bool = False
    compute: Callable[[FloatArray], FloatArray] | None = None
    tiling: Tiling | None = None

    @property
    def is_matrix(self) -> bool:
        """Whether it is stored in the bits that are asked for."""
        return len(self.shape) == 2 and not self.is_plain

    def build(self, tensors: CheckpointTensors) -> FloatArray:
        """Read the sources and make the tensor, float32.

        Raises:
            InputError: A source is missing, of another shape, or not finite.
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


def read_layout(checkpoint: Path) -> ChosenLayout:
    """The layout of a Hugging Face folder.

    Raises:
        InputError: No usable checkpoint, or no layout can represent it.
    """
    with open_tensors(checkpoint) as tensors:
        return choose_layout(read_config(checkpoint), frozenset(tensors.handles))


def choose_layout(config: ModelConfig, stored: frozenset[str]) -> ChosenLayout:
    """The first of the model type's layouts that can represent the model; padded to one width where none can as it is.

    Args:
        config: The model.
        stored: Names of the checkpoint's tensors.

    Raises:
        InputError: No layout can represent it even padded.
    """
    padded: ChosenLayout | None = None
    obstacles: list[str] = []
    for layout in LAYOUTS[config.model_type]:
        obstacle = _obstacle(layout, config, stored)
        if obstacle is not None:
            obstacles.append(f"{layout.architecture}: {obstacle}")
        elif config.shape.is_uniform or layout.per_layer_sizes:
            return ChosenLayout(config, stored, layout)
        elif padded is None:
            padded = ChosenLayout(config, stored, layout, max(config.shape.ffn_widths))
    if padded is None:
        raise InputError(
            f"llama.cpp has no architecture for this {config.model_type} model ({'; '.join(obstacles)})"
        )
    return padded


def holds_blocks_without_attention(model_type: str) -> bool:
    """Whether some architecture of llama.cpp holds a model of this type in which blocks have no attention."""
    return any(layout.attention_free for layout in LAYOUTS.get(model_type, ()))


def holds_unlike_blocks(model_type: str, *, tied: bool) -> bool:
    """Whether some architecture of llama.cpp holds a model of this type whose blocks have unlike widths and heads."""
    return any(layout.per_layer_sizes and (tied or layout.untied) for layout in LAYOUTS.get(model_type, ()))


def holds_fewer_blocks(model_type: str, *, windowed: bool) -> bool:
    """Whether some architecture of llama.cpp holds a model of this type, with windows or without, less any block."""
    return any(
        not layout.unrotated_step and not (windowed and layout.windowed_depth)
        for layout in LAYOUTS.get(model_type, ())
    )


_Obstacles = tuple[tuple[object, str], ...]
"""Whether something stands in the way, and what."""


def _obstacle(layout: Layout, config: ModelConfig, stored: frozenset[str]) -> str | None:
    """Why a layout cannot hold the model, its widths aside; of several reasons the first."""
    obstacles = (
        *_obstacles_of_blocks(layout, config, stored),
        *_obstacles_of_positions(layout, config),
        *_obstacles_of_numbers(layout, config),
    )
    return next((reason for is_there, reason in obstacles if is_there), None)


def _obstacles_of_blocks(layout: Layout, config: ModelConfig, stored: frozenset[str]) -> _Obstacles:
    """What blocks have and lack."""
    misplaced, mixer = _biased(stored) - layout.biases, config.spec.mixer
    stay = layout.unrotated_step or (layout.windowed_depth and config.narrowest)
    instead = (
        "channels and tokens can go (--prune-ratio, --vocabulary)"
        if stay
        else "whole blocks can go (--blocks)"
    )
    return (
        (misplaced, f"no bias on {', '.join(sorted(misplaced))}"),
        (
            config.shape.without_attention and not layout.attention_free,
            f"no blocks without attention, {instead}",
        ),
        (
            mixer and all(config.kv_heads),
            f"{mixer.name if mixer else ''} in some block, without which llama.cpp ends the process",
        ),
        (
            not (config.shape.has_equal_heads or layout.per_layer_sizes),
            f"as many heads in every block, {instead}",
        ),
    )


def _obstacles_of_positions(layout: Layout, config: ModelConfig) -> _Obstacles:
    """Windows and ropes."""
    step, depth = layout.unrotated_step, layout.windowed_depth
    rope = (config.rope_scaling or {}).get("rope_type")
    return (
        (
            depth and (config.num_hidden_layers == depth) != (config.narrowest is not None),
            f"windows in models of {depth} blocks and in no others",
        ),
        (
            config.rotated != layout.rotated(config.windows),
            f"a rope in all blocks but each {step}th, as where all blocks stay"
            if step
            else "a rope in every block",
        ),
        (
            config.window_rope_theta not in (None, config.rope_theta) and not layout.window_base,
            "one base of the rope in all blocks",
        ),
        (not layout.rope_factors and rope in BY_FREQUENCY, f"no {rope} rope scaling"),
        (
            config.rope_sections and not _turn_all(config),
            "sections of the rope (mrope_section) that hold each of a head's frequencies",
        ),
    )


def _turn_all(config: ModelConfig) -> bool:
    """Whether llama.cpp turns all frequencies of a text: each third by one section, and no more than a head has."""
    sections, total = config.rope_sections, sum(config.rope_sections)
    places = (frequency % total for frequency in range((config.rotary_dim or 0) // 2)) if total else [0]
    return total <= config.head_dim and all(place < 3 * sections[place % 3] for place in places)


def _obstacles_of_numbers(layout: Layout, config: ModelConfig) -> _Obstacles:
    """Sizes, and what is computed from them."""
    widths = {config.head_dim * config.heads_per_group * n for n in config.kv_heads if n}
    return (
        (not (layout.untied or config.tie_word_embeddings), "tied embeddings only"),
        (config.tie_word_embeddings and not layout.tied, "untied embeddings only"),
        (
            not layout.free_head_dim and widths != {config.hidden_size},
            "head_dim must be hidden_size / num_attention_heads",
        ),
        (
            config.delta_net and config.delta_net.key_head_dim != config.delta_net.value_head_dim,
            "key heads and value heads of a delta net of one size",
        ),
        (config.activation != layout.activation, f"{layout.activation} as activation"),
        (
            not math.isclose(config.score_scale, config.head_dim**-0.5),
            "attention's scores times 1 / sqrt(head_dim)",
        ),
    )


def _biased(stored: frozenset[str]) -> set[str]:
    """Names of the layers in blocks that have a bias."""
    return {
        name.split(".")[-2] for name in stored if name.startswith("model.layers.") and name.endswith(".bias")
    }


def tensor_specs(chosen: ChosenLayout) -> list[TensorSpec]:
    """All tensors of the file, in file order.

    Raises:
        InputError: The checkpoint has tensors that have no place in the file.
    """
    config = chosen.config
    embedding = (config.vocab_size, config.hidden_size)
    specs = [_plain("model.embed_tokens", embedding, chosen)]
    for block in range(config.num_hidden_layers):
        specs += _block_specs(chosen, block)
    last_norm = f"model.{config.spec.last_norm}"
    specs.append(_plain(last_norm, (config.hidden_size,), chosen, config.spec.norm_offset))
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
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


def _plain(module: str, shape: tuple[int, ...], chosen: ChosenLayout, offset: float = 0.0) -> TensorSpec:
    return TensorSpec(chosen.name(module), shape, ((f"{module}.weight", shape),), offset=offset)


def _block_specs(chosen: ChosenLayout, block: int) -> Iterator[TensorSpec]:
    config, prefix = chosen.config, f"model.layers.{block}"
    shapes = _block_shapes(config, config.shape.blocks[block])
    in_file = _block_shapes(config, replace(config.shape.blocks[block], ffn_width=chosen.widths[block]))
    kv_heads = config.kv_heads[block]
    heads = {"self_attn.q_proj": kv_heads * config.heads_per_group, "self_attn.k_proj": kv_heads}
    if chosen.layout.fused_qkv:
        sources = tuple((f"{prefix}.{module}.weight", shapes.pop(module)) for module in _QKV)
        rows = sum(shape[0] for _, shape in sources)
        yield TensorSpec(chosen.name(f"{prefix}.{_QKV[0]}"), (rows, config.hidden_size), sources)
    if config.shape.blocks[block].is_keyless:
        for tensor in mixer_tensors(config):
            shapes.pop(tensor.module, None)
            yield _mixer_spec(chosen, prefix, tensor)
    for module, shape in shapes.items():
        source, stored = f"{prefix}.{module}", in_file[module]
        interleave = heads.get(module, 0) if chosen.layout.interleaved_rope else 0
        target = chosen.name(source)
        offset = config.spec.norm_offset if module.endswith("norm") else 0.0
        yield TensorSpec(target, stored, ((f"{source}.weight", shape),), interleave, offset)
        if f"{source}.bias" in chosen.stored:
            bias = target.removesuffix("weight") + "bias"
            yield TensorSpec(bias, stored[:1], ((f"{source}.bias", shape[:1]),), interleave)


def _mixer_spec(chosen: ChosenLayout, block: str, tensor: MixerTensor) -> TensorSpec:
    return TensorSpec(
        chosen.name(f"{block}.{tensor.module}").removesuffix(".weight") + tensor.suffix,
        tensor.stored,
        ((f"{block}.{tensor.parameter}", tensor.shape),),
        is_plain=tensor.is_plain,
        compute=tensor.compute,
        tiling=tensor.tiling,
    )


def _block_shapes(config: ModelConfig, block: BlockShape) -> dict[str, tuple[int, ...]]:
    """Module inside a block -> shape of its weight."""
    hidden, width, spec = config.hidden_size, block.ffn_width, config.spec
    kv = (block.kv_groups or 0) * config.head_dim
    q = kv * config.heads_per_group
    mixing: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (q * (2 if spec.gated else 1), hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        f"self_attn.{spec.output}": (hidden, q),
    }
    if block.is_keyless:
        mixing = {tensor.module: tensor.shape for tensor in mixer_tensors(config) if tensor.is_linear}
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(filter(None, [spec.attention_norm]), (hidden,)),
        **mixing,
        **dict.fromkeys(filter(None, (*spec.added_norms, spec.ffn_norm)), (hidden,)),
        f"{spec.mlp}.{spec.gate}": (width, hidden),
        f"{spec.mlp}.{spec.up}": (width, hidden),
        f"{spec.mlp}.{spec.down}": (hidden, width),
    }
    if (norms := spec.head_norms) and not block.is_keyless:
        sizes = (
            {norms.query: q, norms.key: kv}
            if norms.joint
            else dict.fromkeys((norms.query, norms.key), config.head_dim)
        )
        shapes |= {f"self_attn.{name}": (size,) for name, size in sizes.items()}
    if not block.has_attention:
        gone = (*spec.attention_norms, "self_attn.")
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(gone)}
    return shapes


def linear_inputs(config: ModelConfig) -> dict[str, int]:
    """Every Linear of the blocks, by Hugging Face's module name -> its in_features."""
    return {
        f"model.layers.{block}.{module}": shape[1]
        for block, of_block in enumerate(config.shape.blocks)
        for module, shape in _block_shapes(config, of_block).items()
        if len(shape) == 2
    }
