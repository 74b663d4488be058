"""Which of llama.cpp's architectures holds a model, what its tensors are called there, and what the file says of it.

Every family lists its layouts (`cfsp.models.families`) in order of preference; the first that can represent the model
is used.

llama.cpp rotates by position / freq_factor * freq_base^(-2i/d) * freq_scale. Hugging Face's models rotate by
position * inv_freq, so a scaling that changes single frequencies is written as freq_factor = plain / scaled inv_freq.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cfsp.errors import InputError
from cfsp.models.families.row import Layout
from cfsp.models.gguf_file import tensor_names
from cfsp.models.gguf_model import llama3_divisors
from cfsp.models.rope import long_magnitude, yarn_magnitude
from cfsp.models.shape import ModelShape
from exporters.checkpoint_reader import ModelConfig, open_tensors, read_config
from exporters.export_record import ParityLimits

# ggml looks GELU up in a table of float16: a number that falls to the other side of a step is off by 0.05 %.
_GELU_TABLE = ParityLimits(max_logit_diff=0.5, kl_mean=1e-4, same_top1=0.99)
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""Modules of a block that an architecture may store as one."""
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Divisors for every text; for a context that is longer than the original one, and for one that is not."""
_BY_FREQUENCY = ("llama3", "longrope", "proportional")  # rope scalings that are written as such tensors
_STILL = 1e30  # divisor of a frequency at which nothing turns; llama.cpp's converter has the same


@dataclass(frozen=True)
class ChosenLayout:
    """A model and the layout that it goes into."""

    config: ModelConfig
    stored: frozenset[str]  # names of the checkpoint's tensors
    layout: Layout

    @property
    def exact_limits(self) -> ParityLimits | None:
        """What holds a float32 file, if llama.cpp computes something of it in fewer bits."""
        return _GELU_TABLE if self.layout.activation == "gelu_tanh" else None

    @property
    def context_length(self) -> int:
        """Longest context for which llama.cpp computes what the checkpoint does: without windows, the narrowest."""
        longest = self.config.max_position_embeddings
        return longest if self.layout.full_step else min(longest, self.config.narrowest or longest)

    def name(self, module: str) -> str:
        """llama.cpp's name of the weight that a module's is stored in."""
        if self.layout.fused_qkv and module.endswith(QKV):
            module = module.rpartition(".")[0] + ".qkv_proj"
        names = tensor_names(self.layout.architecture, self.config.num_hidden_layers)
        return f"{names.get_name(module)}.weight"

    def of_shape(self, shape: ModelShape) -> ChosenLayout:
        """The layout of the same model with a shape's FFN widths, and its number of tokens if it says one."""
        known = self.config.shape.with_ffn_widths(shape.ffn_widths)
        known = replace(known, vocab_size=shape.vocab_size or known.vocab_size)
        return choose_layout(replace(self.config, shape=known), self.stored)


def read_layout(checkpoint: Path) -> ChosenLayout:
    """The layout of a Hugging Face folder; raises InputError: no usable checkpoint, or no layout can represent it."""
    with open_tensors(checkpoint) as tensors:
        return choose_layout(read_config(checkpoint), frozenset(tensors.handles))


def choose_layout(config: ModelConfig, stored: frozenset[str]) -> ChosenLayout:
    """The first of the model type's layouts that can hold a model with these tensors; InputError says why none can."""
    obstacles = []
    for layout in config.spec.layouts:
        obstacle = _obstacle(layout, config, stored)
        if obstacle is None:
            return ChosenLayout(config, stored, layout)
        obstacles.append(f"{layout.architecture}: {obstacle}")
    raise InputError(
        f"llama.cpp has no architecture for this {config.model_type} model ({'; '.join(obstacles)})"
    )


def _obstacle(layout: Layout, config: ModelConfig, stored: frozenset[str]) -> str | None:
    """Why a layout cannot hold the model; of several reasons the first."""
    biased = {
        name.split(".")[-2] for name in stored if name.startswith("model.layers.") and name.endswith(".bias")
    }
    misplaced, mixer, net = biased - layout.biases, config.spec.mixer, config.delta_net
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
    # llama.cpp turns each third of a text's frequencies by one section, and no more than a head has.
    sections, total = config.rope_sections, sum(config.rope_sections)
    places = (frequency % total for frequency in range((config.rotary_dim or 0) // 2)) if total else [0]
    turns_all = not sections or (
        total <= config.head_dim and all(place < 3 * sections[place % 3] for place in places)
    )
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
        (
            not (config.shape.is_uniform or layout.per_layer_sizes),
            "one FFN width for all blocks (prune --set uniform_width=true; ONNX takes any widths)",
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
        (not layout.rope_factors and rope in _BY_FREQUENCY, f"no {rope} rope scaling"),
        (
            not turns_all,
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


def add_hyperparameters(writer: Any, chosen: ChosenLayout) -> None:
    """Give a gguf.GGUFWriter the keys under the architecture's name, and the model's own shape under phoneready.*."""
    config, layout, widths = chosen.config, chosen.layout, chosen.config.shape.ffn_widths
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(chosen.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(list(widths) if layout.per_layer_sizes else widths[0])
    # Blocks that read another block's keys need a number of heads all the same.
    kv_heads = tuple(
        n or (config.shape.most_kv_groups if config.sharing_blocks else 0) for n in config.kv_heads
    )
    heads = [n * config.heads_per_group for n in kv_heads]
    one = not layout.fused_qkv and len(set(kv_heads)) == 1
    if config.convolution_length:
        writer.add_shortconv_l_cache(config.convolution_length)
    if net := config.delta_net:
        writer.add_ssm_conv_kernel(net.length)
        writer.add_ssm_state_size(net.key_head_dim)
        writer.add_ssm_group_count(net.key_heads)
        writer.add_ssm_time_step_rank(net.value_heads)
        writer.add_ssm_inner_size(net.value_width)
        recurrent = [block.is_keyless for block in config.shape.blocks]
        step = recurrent.index(False) + 1
        writer.add_full_attention_interval(step)
        if recurrent != [(block + 1) % step != 0 for block in range(len(recurrent))]:
            writer.add_array(
                f"{writer.arch}.attention.recurrent_layers", recurrent
            )  # unknown to old releases
        one, kv_heads = True, (max(kv_heads),)
    # Where a short convolution takes attention's place, numbers of key-value heads say in which blocks.
    writer.add_head_count(max(heads) if one or config.convolution_length else heads)
    writer.add_head_count_kv(kv_heads[0] if one else list(kv_heads))
    writer.add_key_length(config.full_head_dim or config.head_dim)
    writer.add_value_length(config.full_head_dim or config.head_dim)
    if layout.own_heads:
        writer.add_key_length_swa(config.head_dim)
        writer.add_value_length_swa(config.head_dim)
    if layout.shares_keys:
        writer.add_shared_kv_layers(config.sharing_blocks)
    if layout.takes_inputs:
        writer.add_embedding_length_per_layer_input(config.block_inputs)
    if config.logit_cap:
        writer.add_final_logit_softcapping(config.logit_cap)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if layout.full_step and config.narrowest is not None:
        writer.add_sliding_window(config.narrowest)
        windowed = [window is not None for window in config.windows]
        if windowed != [(block + 1) % layout.full_step != 0 for block in range(len(windowed))]:
            writer.add_sliding_window_pattern(windowed)  # unknown to old releases
        if layout.window_base and config.window_rope_theta is not None:
            writer.add_rope_freq_base_swa(config.window_rope_theta)
    for key, value in rope_metadata(config).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{writer.arch}.{key}", value)
    if config.rope_sections:
        writer.add_rope_dimension_sections([*config.rope_sections, 0])
    writer.add_string("phoneready.model_type", config.model_type)
    writer.add_array("phoneready.intermediate_sizes", list(widths))


def rope_metadata(config: ModelConfig) -> dict[str, float | int | str]:
    """What a file says of the rotary embedding, without a prefix; InputError: llama.cpp cannot scale it so."""
    keys: dict[str, float | int | str] = {
        "rope.dimension_count": config.rotary_dim or config.full_head_dim or config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    if config.full_head_dim:
        keys["rope.dimension_count_swa"] = config.head_dim
    scaling = config.rope_scaling or {}
    match scaling.get("rope_type"):
        case None | "llama3" | "proportional":
            pass  # no key says it: see rope_tensors
        case "linear":
            keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
        case "longrope":
            keys |= {
                "rope.scaling.type": "longrope",
                "rope.scaling.original_context_length": config.steady_context,
                "rope.scaling.attn_factor": long_magnitude(scaling, config.max_position_embeddings),
            }
        case "yarn":
            # llama.cpp's constants, which most architectures do not read from the file.
            for key, fixed in {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}.items():
                if float(scaling.get(key, fixed)) != fixed:
                    raise InputError(
                        "llama.cpp has this built in", field=key, value=scaling[key], allowed=str(fixed)
                    )
            factor = float(scaling["factor"])
            context = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
            keys |= {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": factor,
                "rope.scaling.original_context_length": int(context),
            }
            # llama.cpp multiplies the magnitude that yarn derives from the factor.
            magnitude = yarn_magnitude(scaling) / (0.1 * math.log(factor) + 1.0)
            if not math.isclose(magnitude, 1.0):
                keys["rope.scaling.attn_factor"] = magnitude
        case kind:
            raise InputError(
                "llama.cpp does not compute this rope scaling for this architecture",
                field="rope_type",
                value=kind,
                allowed="default, linear, yarn, longrope, llama3, proportional",
            )
    return keys


def rope_tensors(config: ModelConfig) -> dict[str, npt.NDArray[np.float32]]:
    """Divisors of the frequencies, (head_dim / 2,) float32, by the tensor's name; none if the model needs none."""
    scaling = config.rope_scaling or {}
    kind, head_dim = scaling.get("rope_type"), config.full_head_dim or config.head_dim
    if kind == "llama3":
        return {ROPE_TENSORS[0]: llama3_divisors(config.rope_theta, config.head_dim, scaling)}
    if kind == "longrope":
        lists = (scaling["long_factor"], scaling["short_factor"])
        return {
            name: np.array(values, np.float32) for name, values in zip(ROPE_TENSORS[1:], lists, strict=True)
        }
    # Architectures whose blocks have heads of two sizes read divisors whatever the rope is.
    if kind == "proportional" or config.full_head_dim:
        turned = int(float(scaling.get("partial_rotary_factor") or 1.0) * head_dim // 2)
        return {ROPE_TENSORS[0]: np.array([1.0] * turned + [_STILL] * (head_dim // 2 - turned), np.float32)}
    return {}
