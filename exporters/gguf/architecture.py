"""Which of llama.cpp's architectures holds a model, and what its tensors are called there.

Every family lists its layouts (`cfsp.models.families`) in order of preference; the first that can represent the model
is used. Where none takes its widths, the FFN is padded with zero channels to the widest block: exact, but the pruned
space comes back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from cfsp.errors import InputError
from cfsp.models.families.row import Layout
from cfsp.models.gguf_file import tensor_names
from cfsp.models.shape import ModelShape
from exporters.checkpoint_reader import ModelConfig, open_tensors, read_config
from exporters.export_record import ParityLimits
from exporters.gguf.rope import BY_FREQUENCY

# ggml looks GELU up in a table of float16: a number that falls to the other side of a step is off by 0.05 %.
_GELU_TABLE = ParityLimits(max_logit_diff=0.5, kl_mean=1e-4, same_top1=0.99)
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""Modules of a block that an architecture may store as one."""


@dataclass(frozen=True)
class ChosenLayout:
    """A layout and the model that goes into it."""

    config: ModelConfig  # the model
    stored: frozenset[str]  # names of the checkpoint's tensors
    layout: Layout  # the architecture
    # Width to which every block is zero-padded; None if each keeps its own.
    padded_width: int | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """FFN widths of the blocks in the file."""
        widths = self.config.shape.ffn_widths
        return widths if self.padded_width is None else (self.padded_width,) * len(widths)

    @property
    def exact_limits(self) -> ParityLimits | None:
        """What holds a float32 file, if llama.cpp computes something of it in fewer bits."""
        return _GELU_TABLE if self.layout.activation == "gelu_tanh" else None

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
    """The layout of a Hugging Face folder; raises InputError: no usable checkpoint, or no layout can represent it."""
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
    for layout in config.spec.layouts:
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


def _obstacle(layout: Layout, config: ModelConfig, stored: frozenset[str]) -> str | None:
    """Why a layout cannot hold the model, its widths aside; of several reasons the first."""
    misplaced, mixer, net = _biased(stored) - layout.biases, config.spec.mixer, config.delta_net
    step, depth = layout.unrotated_step, layout.windowed_depth
    stay = step or (depth and config.narrowest)
    instead = (
        "channels and tokens can go (--prune-ratio, --vocabulary)"
        if stay
        else "whole blocks can go (--blocks)"
    )
    # Of the last two blocks with keys of their own the first has a window and the second none.
    own = config.windows[: config.num_hidden_layers - config.sharing_blocks]
    shares_last_two = len(own) > 1 and own[-2] is not None and own[-1] is None
    rope = (config.rope_scaling or {}).get("rope_type")
    widths = {config.head_dim * config.heads_per_group * n for n in config.kv_heads if n}
    scale = 1.0 if layout.plain_scores else config.head_dim**-0.5
    obstacles = (
        # What blocks have and lack.
        (misplaced, f"no bias on {', '.join(sorted(misplaced))}"),
        (
            config.shape.without_attention and not layout.attention_free,
            f"no blocks without attention, {instead}",
        ),
        (
            config.sharing_blocks and not (layout.shares_keys and shares_last_two),
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
        # Windows and ropes.
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
        # Sizes, and what is computed from them.
        (not (layout.untied or config.tie_word_embeddings), "tied embeddings only"),
        (config.tie_word_embeddings and not layout.tied, "untied embeddings only"),
        (
            not layout.free_head_dim and widths != {config.hidden_size},
            "head_dim must be hidden_size / num_attention_heads",
        ),
        (
            net and net.key_head_dim != net.value_head_dim,
            "key heads and value heads of a delta net of one size",
        ),
        (config.activation != layout.activation, f"{layout.activation} as activation"),
        (
            not math.isclose(config.score_scale, scale),
            f"attention's scores {'as they are' if layout.plain_scores else 'times 1 / sqrt(head_dim)'}",
        ),
        (len(set(config.head_dims)) > 1 and not layout.own_heads, "one head_dim in all blocks"),
        (config.logit_cap and not layout.caps_logits, "logits without a cap"),
    )
    return next((reason for is_there, reason in obstacles if is_there), None)


def _turn_all(config: ModelConfig) -> bool:
    """Whether llama.cpp turns all frequencies of a text: each third by one section, and no more than a head has."""
    sections, total = config.rope_sections, sum(config.rope_sections)
    places = (frequency % total for frequency in range((config.rotary_dim or 0) // 2)) if total else [0]
    return total <= config.head_dim and all(place < 3 * sections[place % 3] for place in places)


def _biased(stored: frozenset[str]) -> set[str]:
    """Names of the layers in blocks that have a bias."""
    return {
        name.split(".")[-2] for name in stored if name.startswith("model.layers.") and name.endswith(".bias")
    }
