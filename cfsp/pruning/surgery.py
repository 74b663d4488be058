"""Cutting channels, key-value groups, attentions and blocks out of a model, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from cfsp.models.architectures import (
    FeedForward,
    attention_of,
    decoder_layers,
    feed_forward,
    model_shape,
    stated_widths,
    width_settings,
)
from cfsp.models.config_file import PER_BLOCK_LISTS
from cfsp.models.shape import ModelShape
from cfsp.pruning.vocabulary import cut_rows


def cut_channels(ffn: FeedForward, kept: torch.Tensor, down_weight: torch.Tensor | None = None) -> None:
    """Keep some channels of a gated MLP, (n_kept,) ascending, with `down_weight` (hidden_size, n_kept) if given."""
    for linear in (ffn.gate, ffn.up):
        _keep_outputs(linear, kept)
    _keep_inputs(ffn.down, kept, down_weight)
    if hasattr(ffn.module, "intermediate_size"):
        ffn.module.intermediate_size = len(kept)  # type: ignore[assignment]


def cut_groups(attention: Any, groups: Sequence[int], o_weight: torch.Tensor | None = None) -> None:
    """Keep some key-value heads, ascending, and their query heads, with `o_weight` (hidden_size, n_kept) if given."""
    inputs = group_channels(attention, attention.o_proj.in_features, groups)
    rows = group_channels(attention, attention.k_proj.out_features, groups)
    _keep_inputs(attention.o_proj, inputs, o_weight)
    _keep_outputs(attention.q_proj, inputs)
    for linear in (attention.k_proj, attention.v_proj):
        _keep_outputs(linear, rows)


def group_channels(attention: Any, size: int, groups: Sequence[int]) -> torch.Tensor:
    """Which of the `size` channels of all groups, one after another, are those of some groups: (n,) int64."""
    count = attention.k_proj.out_features // attention.head_dim
    every = torch.arange(size, device=attention.k_proj.weight.device)
    return every.view(count, -1)[list(groups)].flatten()


def remove_attention(layer: nn.Module) -> None:
    """Take a block's attention out."""
    from cfsp.models.remote_code.modeling_pruned import leave_out_attention

    leave_out_attention(layer)


def remove_blocks(model: Any, gone: frozenset[int]) -> None:
    """Take blocks out of the model; its configuration then says how many are left."""
    if not gone:
        return
    decoder, config = model.get_decoder(), model.config
    stay = [index for index in range(len(decoder.layers)) if index not in gone]
    decoder.layers = nn.ModuleList([decoder.layers[index] for index in stay])
    for index, layer in enumerate(decoder.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    for key in PER_BLOCK_LISTS:
        if each := getattr(config, key, None):
            setattr(config, key, [each[index] for index in stay])
    config.num_hidden_layers = len(stay)


def set_config_shape(model: Any) -> None:
    """Record widths in the model's config, if it can state them; the checkpoint describes blocks that differ."""
    settings, widths = model.config.to_dict(), model_shape(model).ffn_widths
    stated = width_settings(settings, widths) if widths else {}
    if stated_widths(settings | stated) == widths:
        for key, value in stated.items():
            setattr(model.config, key, value)


def _keep_outputs(linear: nn.Linear, kept: torch.Tensor) -> None:
    linear.weight = _parameter(linear.weight, linear.weight[kept])
    if linear.bias is not None:
        linear.bias = _parameter(linear.bias, linear.bias[kept])
    linear.out_features = len(kept)


def _keep_inputs(linear: nn.Linear, kept: torch.Tensor, weight: torch.Tensor | None) -> None:
    columns = linear.weight[:, kept] if weight is None else weight
    linear.weight = _parameter(linear.weight, columns)
    linear.in_features = len(kept)


def _parameter(old: torch.Tensor, values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone().contiguous().to(old.dtype), requires_grad=old.requires_grad)


def cut_to_shape(model: Any, shape: ModelShape) -> None:
    """Give a model a smaller shape in place: the first of everything is kept, and what the shape leaves open.

    The origin of each block of the shape says which of the model's it is.
    """
    known, layers = model_shape(model), decoder_layers(model)
    with torch.no_grad():
        if shape.vocab_size not in (None, known.vocab_size):
            cut_rows(model, torch.arange(shape.vocab_size))
        for block in shape.blocks:
            layer, was = layers[block.origin], known.blocks[block.origin]
            if block.ffn_width != was.ffn_width:
                cut_channels(feed_forward(model, layer), torch.arange(block.ffn_width))
            if was.has_attention and not block.has_attention:
                remove_attention(layer)
            elif block.kv_groups not in (None, was.kv_groups):
                cut_groups(attention_of(model, layer), range(block.kv_groups))
    remove_blocks(model, frozenset(range(len(layers))) - {block.origin for block in shape.blocks})
    set_config_shape(model)
