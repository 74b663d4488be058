"""Parameters of models that are not made."""

from __future__ import annotations

from typing import Any

from cfsp.models.architectures import (
    FeedForward,
    attention_of,
    decoder_layers,
    feed_forward,
    model_shape,
    spec_for,
    token_tables,
)
from cfsp.models.shape import BlockShape, ModelShape
from cfsp.pruning.budget import Cost


def count_parameters(model: Any) -> Cost:
    """Parameters of what is left of a dense model; an output matrix that is the embedding counts once."""
    layers = decoder_layers(model)
    ffns = [feed_forward(model, layer) for layer in layers]
    channel = [_of_channel(ffn) for ffn in ffns]
    rest = [_count(layer) - each * ffn.width for layer, each, ffn in zip(layers, channel, ffns, strict=True)]
    parts = (spec_for(model.config).attention, *spec_for(model.config).attention_norms)
    attention = [
        sum(_count(layer.get_submodule(part)) for part in parts) if attention_of(model, layer) else 0
        for layer in layers
    ]
    group = [_of_group(attention_of(model, layer), spec_for(model.config).output) for layer in layers]
    dense = model_shape(model)
    ends = (*token_tables(model), model.get_output_embeddings())
    rows = len(ends[0].weight)
    row = sum(weight.shape[1] for weight in {id(end.weight): end.weight for end in ends}.values())
    outside = _count(model) - sum(map(_count, layers)) - row * rows

    def cost(shape: ModelShape, tokenizer: Any) -> float:
        def removed(block: BlockShape) -> int:
            if not block.has_attention:
                return attention[block.origin]
            whole = dense.blocks[block.origin].kv_groups or 0
            return group[block.origin] * (0 if block.kv_groups is None else whole - block.kv_groups)

        blocks = sum(
            rest[block.origin] + channel[block.origin] * block.ffn_width - removed(block)
            for block in shape.blocks
        )
        return float(outside + row * (shape.vocab_size or rows) + blocks)

    return cost


def _of_channel(ffn: FeedForward) -> int:
    biases = sum(linear.bias is not None for linear in (ffn.gate, ffn.up))
    return 2 * ffn.gate.in_features + ffn.down.out_features + biases


def _of_group(attention: Any, output: str) -> int:
    """A key-value head's rows, its query heads' rows, and their columns of the output matrix."""
    if attention is None:
        return 0
    rows = sum(_count(linear) for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
    groups: int = attention.k_proj.out_features // attention.head_dim
    return (rows + int(attention.get_submodule(output).weight.numel())) // groups


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
