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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from cfsp.errors import InputError
from cfsp.models.gguf_file import tensor_names
from cfsp.models.shape import ModelShape
from exporters.checkpoint_reader import ModelConfig, open_tensors, read_config
from exporters.export_record import ParityLimits
from exporters.gguf.rope import BY_FREQUENCY


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
        plain_scores: Multiplies attention's scores by 1, and not by 1 / sqrt(head_dim).
        own_heads: Reads a head_dim of blocks with a window, and one of the others.
        shares_keys: Lets the last blocks read keys and values of the last two before them: those with a window of the
            first, which has one, and the others of the second, which has none.
        needs_window: Ends the process over a file in which no block has a window.
        takes_inputs: Gives every block more of a token than its hidden state.
        caps_logits: Caps logits z to c tanh(z / c).
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
    plain_scores: bool = False
    own_heads: bool = False
    shares_keys: bool = False
    needs_window: bool = False
    takes_inputs: bool = False
    caps_logits: bool = False
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
_GEMMA4 = Layout(
    "gemma4",
    per_layer_sizes=True,
    rope_factors=True,
    activation="gelu_tanh",
    window_base=True,
    full_step=1,
    plain_scores=True,
    own_heads=True,
    shares_keys=True,
    needs_window=True,
    takes_inputs=True,
    caps_logits=True,
    exact_limits=_GELU_TABLE,
)
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
        "gemma4_text": (_GEMMA4,),
    }
)

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""Modules of a block that an architecture may store as one."""


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
        if self.layout.fused_qkv and module.endswith(QKV):
            module = module.rpartition(".")[0] + ".qkv_proj"
        names = tensor_names(self.layout.architecture, self.config.num_hidden_layers)
        return f"{names.get_name(module)}.weight"

    def of_shape(self, shape: ModelShape) -> ChosenLayout:
        """The layout of the same model with the FFN widths of a shape, and with its tokens where it says how many."""
        known = self.config.shape.with_ffn_widths(shape.ffn_widths)
        known = replace(known, vocab_size=shape.vocab_size or known.vocab_size)
        return choose_layout(replace(self.config, shape=known), self.stored)


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
            config.sharing_blocks and not (layout.shares_keys and _shares_last_two(config)),
            "keys and values for later blocks from the last two before them alone, the first of which has a window",
        ),
        (config.block_inputs and not layout.takes_inputs, "nothing of a token but its hidden state"),
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
        (
            layout.needs_window and config.narrowest is None,
            "a window in some block, without which llama.cpp ends the process",
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
    scale = 1.0 if layout.plain_scores else config.head_dim**-0.5
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
            not math.isclose(config.score_scale, scale),
            "attention's scores as they are"
            if layout.plain_scores
            else "attention's scores times 1 / sqrt(head_dim)",
        ),
        (len(set(config.head_dims)) > 1 and not layout.own_heads, "one head_dim in all blocks"),
        (config.logit_cap and not layout.caps_logits, "logits without a cap"),
    )


def _shares_last_two(config: ModelConfig) -> bool:
    """Whether of the last two blocks with keys of their own the first has a window and the second none."""
    own = config.windows[: config.num_hidden_layers - config.sharing_blocks]
    return len(own) > 1 and own[-2] is not None and own[-1] is None


def _biased(stored: frozenset[str]) -> set[str]:
    """Names of the layers in blocks that have a bias."""
    return {
        name.split(".")[-2] for name in stored if name.startswith("model.layers.") and name.endswith(".bias")
    }
