"""From a checkpoint's modules to the tables of layers that a decoder graph is built from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
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
from cfsp.models.families.row import FULL, WINDOWED, Family
from cfsp.models.offload import at_hand
from cfsp.models.rope import steady_context
from exporters.checkpoint_reader import ACTIVATIONS, rope_of
from exporters.onnx.decoder_graph import Attention, Block, Decoder, Rope
from exporters.onnx.layers import Embedding, FloatEmbedding, FloatLinear, Layer
from exporters.onnx.mixers import DeltaNet, Kernels, ShortConvolution, TextMixer
from exporters.onnx.variants import HEAD

_PACKED, _PARTS = "qkv_proj", ("q_proj", "k_proj", "v_proj")
HEAD_PARTS = (f"{HEAD}.frequent", f"{HEAD}.rest")
"""The output matrix's first rows and all others: tokenizers number tokens as they learn them, common ones first."""
_FREQUENT_SHARE, _ROWS_ALIGN = 16, 32
_ROPE_NAMES = {FULL: "", WINDOWED: "window_"}


def head_parts(vocab_size: int) -> dict[str, slice]:
    """Rows of the output matrix by the part's name: the first sixteenth of the tokens, and the rest."""
    rows = _ROWS_ALIGN * -(-vocab_size // (_FREQUENT_SHARE * _ROWS_ALIGN))
    return dict(zip(HEAD_PARTS, (slice(0, rows), slice(rows, vocab_size)), strict=True))


def group_of(name: str) -> tuple[str, ...]:
    """What can be stored in one layer with a module, itself included: q, k and v; the output matrix's parts."""
    if name in HEAD_PARTS:
        return HEAD_PARTS
    prefix, _, last = name.rpartition(".")
    return tuple(f"{prefix}.{part}" for part in _PARTS) if last in _PARTS else (name,)


def weight_of(model: Any, name: str) -> torch.Tensor:
    """A module's weight, or the rows of a part of the output matrix: (rows, in_features), a view."""
    if name not in HEAD_PARTS:
        weight: torch.Tensor = model.get_submodule(name).weight.detach()
        return weight
    head: torch.Tensor = model.get_output_embeddings().weight.detach()
    return head[head_parts(len(head))[name]]


def read_weight(model: Any, name: str) -> torch.Tensor:
    """`weight_of` as float32, wherever the model keeps it."""
    with at_hand(model.get_output_embeddings() if name in HEAD_PARTS else model.get_submodule(name)):
        return weight_of(model, name).float()


def is_tied(model: Any) -> bool:
    """Whether the token embedding is the output matrix."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return embedding.weight is head.weight


def packed_names(name: str) -> tuple[str, ...]:
    """The modules whose rows a layer holds: itself, or q, k and v of a packed one, or the output matrix's parts."""
    if name == HEAD:
        return HEAD_PARTS
    prefix, _, last = name.rpartition(".")
    return group_of(f"{prefix}.{_PARTS[0]}") if last == _PACKED else (name,)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How a model's weights are stored: as the checkpoint has them, unless a variant overrides it."""

    dtype: torch.dtype = torch.float32  # of norms, rotary tables, what is computed, and here of all
    # Parameter name -> the weight of a norm that is not the checkpoint's.
    norms: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def layer(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Layer:
        """A Linear.

        Args:
            name: The module's; `...qkv_proj` for q, k and v in one.
            weight: W (out_features, in_features) float32.
            bias: b (out_features,), or None.
        """
        return FloatLinear(self.stored(weight), None if bias is None else self.stored(bias))

    def embedding(self, table: torch.Tensor, *, tied: bool) -> Embedding:
        """The token embedding (vocab_size, hidden_size) float32; a tied one is the output matrix, too."""
        return FloatEmbedding(self.stored(table))

    def packs(self, names: Sequence[str]) -> bool:
        """Whether q, k and v, or the output matrix's parts, are one layer, which is faster."""
        return True

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """It in the dtype of what is computed."""
        return tensor.detach().to(self.dtype)


def decoder_of(model: Any, weights: Weights) -> Decoder:
    """The weights of a causal LM, layer by layer.

    Args:
        model: A causal LM of the architecture table, float32.
        weights: How they are stored.

    Raises:
        InputError: A rope, or blocks, that the graph cannot compute.
    """
    spec, tied = spec_for(model.config), is_tied(model)
    with at_hand(*([] if tied else [model.get_input_embeddings()])):
        embedding = weights.embedding(model.get_input_embeddings().weight.detach(), tied=tied)
    head = embedding.as_head() if tied else _linear(HEAD, model.get_output_embeddings(), weights)
    return _decoder(
        model,
        weights,
        range(len(decoder_layers(model))),
        embedding=embedding,
        final_norm=_norm(model, f"{spec.layers.rpartition('.')[0]}.{spec.last_norm}", weights),
        head=head,
        embedding_scale=model.config.hidden_size**0.5 if spec.scaled_embedding else 1.0,
    )


def slice_of(model: Any, block: int, entering: torch.Tensor, gain: torch.Tensor) -> Decoder:
    """A block of a causal LM as a decoder of its own, float32: see `exporters.proof`.

    Args:
        model: A causal LM of the architecture table.
        block: Its number.
        entering: Hidden states before it, (tokens, hidden_size).
        gain: Of the norm behind it, (hidden_size,).
    """
    table = FloatEmbedding(entering)
    blocks = range(block, block + 1)
    return _decoder(model, Weights(), blocks, embedding=table, final_norm=gain, head=table.as_head())


def _decoder(model: Any, weights: Weights, blocks: range, **ends: Any) -> Decoder:
    """Some blocks, between an embedding, a norm and an output matrix."""
    config, layers, spec = model.config, decoder_layers(model), spec_for(model.config)
    check_blocks(spec)
    positions = list(_positions(model))
    made = []
    for index in blocks:
        with at_hand(layers[index]):
            made.append(_block(model, layers[index], f"{spec.layers}.{index}", weights, *positions[index]))
    return Decoder(
        heads_per_group=config.num_attention_heads // config.num_key_value_heads,
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads),
        rms_norm_eps=norm_epsilon(config),
        blocks=tuple(made),
        activation=ACTIVATIONS[getattr(config, spec.activation_setting, "silu")],
        dtype=ir.DataType.FLOAT16 if weights.dtype == torch.float16 else ir.DataType.FLOAT,
        **ends,
    )


def _positions(model: Any) -> Iterator[tuple[Rope | None, int | None]]:
    """Of every block the rope, None for none, and the window, None for all; those with a window may have own ropes."""
    config, decoder = model.config, model.get_decoder()
    settings = config.to_dict()
    positions = steady_context(rope_of(settings, FULL), int(config.max_position_embeddings))
    made: dict[str, Rope] = {}
    own = spec_for(config).has_window_rope
    for rotated, window in zip(rotated_blocks(config), windows_of_blocks(config), strict=True):
        kind = WINDOWED if own and window is not None else FULL
        if rotated and kind not in made:
            check_rope(rope_of(settings, kind)["rope_type"])
            frequencies, scale = _rotary(decoder, kind)
            made[kind] = Rope(_ROPE_NAMES[kind], frequencies, scale, positions)
        yield made[kind] if rotated else None, window


def _block(
    model: Any, layer: nn.Module, name: str, weights: Weights, rope: Rope | None, window: int | None
) -> Block:
    spec, ffn, mlp = (
        spec_for(model.config),
        feed_forward(model, layer),
        f"{name}.{spec_for(model.config).mlp}",
    )

    def norm(part: str) -> torch.Tensor | None:
        """None without one: what is read, or added, stays as it is."""
        return _norm(model, f"{name}.{part}", weights) if part else None

    behind_attention, behind_ffn = spec.added_norms or ("", "")
    attention, module = attention_of(model, layer), mixer_of(model, layer)
    mixer: Attention | TextMixer | None = None
    if attention:
        prefix = f"{name}.{spec.attention}"
        norms = (
            [f"{spec.attention}.{one}" for one in (spec.head_norms.query, spec.head_norms.key)]
            if spec.head_norms
            else ["", ""]
        )
        mixer = Attention(
            num_key_value_heads=attention.k_proj.out_features // attention.head_dim,
            input_norm=norm(spec.attention_norm),
            qkv=_qkv(attention, prefix, weights, normed=spec.head_norms is not None),
            q_norm=norm(norms[0]),
            k_norm=norm(norms[1]),
            o_proj=_linear(f"{prefix}.{spec.output}", getattr(attention, spec.output), weights),
            normed_after_rope=spec.head_norms is not None and spec.head_norms.after_rope,
            gated=spec.gated,
            output_norm=norm(behind_attention),
            scale=float(attention.scaling),
            rope=rope,
            window=window,
        )
    elif spec.mixer and module is not None:
        of_kind = _MIXERS[spec.mixer.kind]
        mixer = of_kind(module, f"{name}.{spec.mixer.module}", norm(spec.attention_norm), weights)
    return Block(
        mixer=mixer,
        ffn_norm=norm(spec.ffn_norm),
        gate_proj=_linear(f"{mlp}.{spec.gate}", ffn.gate, weights),
        up_proj=_linear(f"{mlp}.{spec.up}", ffn.up, weights),
        down_proj=_linear(f"{mlp}.{spec.down}", ffn.down, weights),
        output_norm=norm(behind_ffn),
    )


def _qkv(attention: Any, prefix: str, weights: Weights, *, normed: bool) -> tuple[Layer, ...]:
    """Queries, keys and values in one layer, or in three."""
    parts = {f"{prefix}.{part}": getattr(attention, part) for part in _PARTS}
    if normed or not weights.packs(list(parts)):
        return tuple(_linear(part, module, weights) for part, module in parts.items())
    weight = torch.cat([part.weight.detach() for part in parts.values()])
    biases = [part.bias.detach() for part in parts.values() if part.bias is not None]
    return (weights.layer(f"{prefix}.{_PACKED}", weight, torch.cat(biases) if biases else None),)


def _convolution(
    convolution: Any, prefix: str, input_norm: torch.Tensor | None, weights: Weights
) -> ShortConvolution:
    return ShortConvolution(
        input_norm=input_norm,
        in_proj=_linear(f"{prefix}.in_proj", convolution.in_proj, weights),
        kernels=_kernels(convolution.conv, weights),
        out_proj=_linear(f"{prefix}.out_proj", convolution.out_proj, weights),
    )


def _delta_net(net: Any, prefix: str, input_norm: torch.Tensor | None, weights: Weights) -> DeltaNet:
    names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
    norm = weights.norms.get(f"{prefix}.norm.weight", net.norm.weight)
    return DeltaNet(
        input_norm=input_norm,
        kernels=_kernels(net.conv1d, weights),
        rates=-net.A_log.detach().float().exp(),
        bias=net.dt_bias.detach().float(),
        norm=weights.stored(norm),
        key_heads=net.num_k_heads,
        rms_norm_eps=net.layer_norm_epsilon,
        activation=ACTIVATIONS[net.activation],
        **{name: _linear(f"{prefix}.{name}", getattr(net, name), weights) for name in names},
    )


def _kernels(convolution: nn.Conv1d, weights: Weights) -> Kernels:
    bias = convolution.bias
    return Kernels(
        weights.stored(convolution.weight.squeeze(1).T), None if bias is None else weights.stored(bias)
    )


_MIXERS: Mapping[str, Callable[[Any, str, torch.Tensor | None, Weights], TextMixer]] = MappingProxyType(
    {"conv": _convolution, "linear_attention": _delta_net}
)
"""Of what takes attention's place in some blocks, by what `layer_types` calls these: how its weights are found."""


def _linear(name: str, linear: Any, weights: Weights) -> Layer:
    return weights.layer(name, linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


def _norm(model: Any, name: str, weights: Weights) -> torch.Tensor:
    parameter, offset = f"{name}.weight", spec_for(model.config).norm_offset
    weight = weights.norms.get(parameter, model.get_parameter(parameter))
    return weights.stored(weight + offset if offset else weight)


def check_blocks(spec: Family) -> None:
    """Raise InputError for a model type whose blocks no graph computes."""
    if reason := spec.not_in_graphs:
        raise InputError(
            f"no graph is written yet of blocks {reason}",
            field="model_type",
            value=spec.model_type,
            allowed="GGUF",
        )


def check_rope(rope_type: str) -> None:
    """Raise InputError for a rope that the graph cannot compute."""
    if rope_type == "dynamic":
        raise InputError(
            "a rope whose frequencies change with the text's length is not supported by the fused graph",
            field="rope_type",
            value=rope_type,
            allowed="default, linear, llama3, longrope, yarn",
        )


def _rotary(decoder: Any, kind: str) -> tuple[npt.NDArray[np.float32], float]:
    """The model's own frequencies (head_dim / 2,), and its scale of cos and sin; of a longrope those of short texts.

    Where kinds of blocks have their own, transformers 5 has them in one module, and transformers 4 in two, which are
    called in one of two ways.

    Args:
        decoder: The model's.
        kind: Of the blocks.
    """
    local = getattr(decoder, "rotary_emb_local", None)
    if hasattr(decoder, "rotary_embs"):
        rotary = decoder.rotary_embs[kind]
    else:
        rotary = local if local is not None and kind == WINDOWED else decoder.rotary_emb
    apart = isinstance(rotary.rope_type, dict)
    prefix = f"{kind}_" if apart else ""
    # The others are those of the longest text that the model has read.
    names = ("original_inv_freq", "attention_scaling")
    frequencies, scale = (getattr(rotary, f"{prefix}{name}") for name in names)
    return frequencies.float().numpy(), float(scale)
