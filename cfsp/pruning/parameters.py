"""Parameters of models that are not made."""

from __future__ import annotations

from typing import Any

from cfsp.models.architectures import FeedForward, decoder_layers, feed_forward
from cfsp.models.shape import ModelShape
from cfsp.pruning.budget import Cost


def count_parameters(model: Any) -> Cost:
    """Parameters of what is left of a dense model; an output matrix that is the embedding counts once."""
    layers = decoder_layers(model)
    ffns = [feed_forward(model, layer) for layer in layers]
    channel = [_of_channel(ffn) for ffn in ffns]
    rest = [_count(layer) - each * ffn.width for layer, each, ffn in zip(layers, channel, ffns, strict=True)]
    attention = [_count(layer.self_attn) + _count(layer.input_layernorm) for layer in layers]
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    rows = len(ends[0].weight)
    row = sum(weight.shape[1] for weight in {id(end.weight): end.weight for end in ends}.values())
    outside = _count(model) - sum(map(_count, layers)) - row * rows

    def cost(shape: ModelShape, tokenizer: Any) -> float:
        blocks = sum(
            rest[block.origin]
            + channel[block.origin] * block.ffn_width
            - (0 if block.has_attention else attention[block.origin])
            for block in shape.blocks
        )
        return float(outside + row * (shape.vocab_size or rows) + blocks)

    return cost


def _of_channel(ffn: FeedForward) -> int:
    biases = sum(linear.bias is not None for linear in (ffn.gate, ffn.up))
    return 2 * ffn.gate.in_features + ffn.down.out_features + biases


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
