"""Models of another shape, for what follows from the shape alone: the first of everything is kept."""

from __future__ import annotations

from typing import Any

import torch

from cfsp.models.architectures import attention_of, decoder_layers, feed_forward, model_shape
from cfsp.models.shape import ModelShape
from cfsp.pruning.axes.vocabulary import cut_rows
from cfsp.pruning.surgery import cut_channels, cut_groups, remove_attention, remove_blocks, set_config_shape


def cut_to_shape(model: Any, shape: ModelShape) -> None:
    """Give a model a shape, in place.

    Args:
        model: A causal LM of the architecture table.
        shape: Of it with less of anything; of each block its origin says which of the model's it is, and what the shape
            does not say stays.
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
