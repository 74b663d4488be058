"""From a checkpoint's modules to the tables of layers that a decoder graph is built from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import nn

from cfsp.errors import InputError
from cfsp.models.architectures import decoder_layers, feed_forward, spec_for
from exporters.onnx.decoder_graph import Block, Decoder, DecoderShape
from exporters.onnx.layers import Embedding, FloatEmbedding, FloatLinear, Layer
from exporters.onnx.variants import HEAD

FloatArray = npt.NDArray[np.floating]
MakeLayer = Callable[[str, torch.Tensor, torch.Tensor | None], Layer]
"""(name, W (out_features, in_features) float32, bias (out_features,) or None) -> how it is stored."""
MakeNorm = Callable[[str], FloatArray]
"""Parameter name of a norm's weight -> the vector."""
MakeEmbedding = Callable[[torch.Tensor], Embedding]
"""Table (vocab_size, hidden_size) float32 -> how it is stored."""
MayPack = Callable[[Sequence[str]], bool]
"""Names of a block's q, k and v, or of the output matrix's two parts -> whether they are stored as one layer."""


_PACKED, _PARTS = "qkv_proj", ("q_proj", "k_proj", "v_proj")
HEAD_PARTS = (f"{HEAD}.frequent", f"{HEAD}.rest")
"""The output matrix's first rows and all others: tokenizers number tokens as they learn them, common ones first."""
_FREQUENT_SHARE, _ROWS_ALIGN = 16, 32


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


def is_tied(model: Any) -> bool:
    """Whether the token embedding is the output matrix."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return bool(embedding.weight.data_ptr() == head.weight.data_ptr())


def packed_names(name: str) -> tuple[str, ...]:
    """The modules whose rows a layer holds: itself, or q, k and v of a packed one, or the output matrix's parts."""
    if name == HEAD:
        return HEAD_PARTS
    prefix, _, last = name.rpartition(".")
    return group_of(f"{prefix}.{_PARTS[0]}") if last == _PACKED else (name,)


def float_weights(dtype: torch.dtype) -> tuple[MakeLayer, MakeEmbedding]:
    """Layers and embedding as the checkpoint has them, in a float type."""

    def layer(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> FloatLinear:
        return FloatLinear(_array(weight, dtype), None if bias is None else _array(bias, dtype))

    return layer, lambda table: FloatEmbedding(_array(table, dtype))


def decoder_of(
    model: Any,
    *,
    make_layer: MakeLayer,
    make_embedding: MakeEmbedding,
    may_pack: MayPack = lambda names: True,
    norms: Mapping[str, torch.Tensor] = MappingProxyType({}),
    dtype: torch.dtype = torch.float32,
) -> Decoder:
    """The weights of a causal LM, layer by layer.

    Args:
        model: A causal LM of the architecture table, float32.
        make_layer: How a Linear is stored; its name is the module's, `...qkv_proj` for q, k and v in one.
        make_embedding: How the token embedding is stored.
        may_pack: Whether q, k and v can be one layer, which is faster; where the model norms heads, they are not.
        norms: Parameter name -> a norm's weight, in place of the model's.
        dtype: Of norms, rotary tables and what is computed.

    Raises:
        InputError: A rope that the graph cannot compute.
    """
    config, decoder = model.config, model.get_decoder()
    layers, spec = decoder_layers(model), spec_for(config)

    def norm(name: str) -> FloatArray:
        return _array(norms.get(name, model.get_parameter(name)), dtype)

    table = model.get_input_embeddings().weight.detach()
    head = model.get_output_embeddings()
    embedding = make_embedding(table)
    cos, sin = _rotary(decoder.rotary_emb, int(config.max_position_embeddings))
    return Decoder(
        shape=_shape(config, layers[0].get_submodule(spec.attention)),
        embedding=embedding,
        blocks=tuple(
            _block(model, layer, f"{spec.layers}.{index}", make_layer, norm, may_pack)
            for index, layer in enumerate(layers)
        ),
        final_norm=norm(f"{spec.layers.rpartition('.')[0]}.norm.weight"),
        head=embedding.as_head() if is_tied(model) else make_layer(HEAD, head.weight.detach(), _bias(head)),
        cos=_array(cos, dtype),
        sin=_array(sin, dtype),
        dtype=ir.DataType.FLOAT16 if dtype == torch.float16 else ir.DataType.FLOAT,
    )


def _shape(config: Any, attention: Any) -> DecoderShape:
    return DecoderShape(
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=int(attention.head_dim),
        rms_norm_eps=float(config.rms_norm_eps),
    )


def _block(
    model: Any,
    layer: nn.Module,
    name: str,
    make_layer: MakeLayer,
    norm: MakeNorm,
    may_pack: MayPack,
) -> Block:
    spec, ffn = spec_for(model.config), feed_forward(model, layer)
    attention: Any = layer.get_submodule(spec.attention)

    def linear(path: str, module: nn.Linear) -> Layer:
        return make_layer(f"{name}.{path}", module.weight.detach(), _bias(module))

    parts = {part: getattr(attention, part) for part in _PARTS}
    q_norm, k_norm = (
        norm(f"{name}.{spec.attention}.{part}.weight") if spec.head_norms else None
        for part in ("q_norm", "k_norm")
    )
    if q_norm is None and may_pack([f"{name}.{spec.attention}.{part}" for part in _PARTS]):
        weight = torch.cat([part.weight.detach() for part in parts.values()])
        biases = [part.bias.detach() for part in parts.values() if part.bias is not None]
        bias = torch.cat(biases) if biases else None
        qkv: tuple[Layer, ...] = (make_layer(f"{name}.{spec.attention}.{_PACKED}", weight, bias),)
    else:
        qkv = tuple(linear(f"{spec.attention}.{part}", module) for part, module in parts.items())
    return Block(
        input_norm=norm(f"{name}.input_layernorm.weight"),
        qkv=qkv,
        q_norm=q_norm,
        k_norm=k_norm,
        o_proj=linear(f"{spec.attention}.o_proj", attention.o_proj),
        post_norm=norm(f"{name}.post_attention_layernorm.weight"),
        gate_proj=linear(f"{spec.mlp}.{spec.gate}", ffn.gate),
        up_proj=linear(f"{spec.mlp}.{spec.up}", ffn.up),
        down_proj=linear(f"{spec.mlp}.{spec.down}", ffn.down),
    )


def _rotary(rotary: Any, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (positions, head_dim / 2), from the model's own frequencies and scale.

    Raises:
        InputError: Frequencies that change with the length of the text.
    """
    if rotary.rope_type in ("dynamic", "longrope"):
        raise InputError(
            "a rope whose frequencies change with the text's length is not supported by the fused graph",
            field="rope_type",
            value=rotary.rope_type,
            allowed="default, linear, llama3, yarn",
        )
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * rotary.inv_freq.float()[None]
    return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling


def _bias(linear: Any) -> torch.Tensor | None:
    return None if linear.bias is None else linear.bias.detach()


def _array(tensor: torch.Tensor, dtype: torch.dtype) -> FloatArray:
    values: FloatArray = tensor.detach().to(dtype).numpy()
    return values
