"""Quantizing a model's layers for a variant, block after block, on text.

The model is run as far as it is quantized already: every layer is rounded for the inputs that it will really get.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from cfsp.architectures import block_linears, decoder_layers
from cfsp.precision import products_in
from cfsp.progress import Progress, no_progress
from cfsp.streaming import GramSum, enter_blocks, input_hook, run_layer
from exporters.onnx.block_quantize import Rounded, gptq, joined, pack, round_to_nearest
from exporters.onnx.layers import NBitsEmbedding, NBitsLinear
from exporters.onnx.variants import BlockFormat, FormatOf
from exporters.onnx.weights import MakeLayer, packed_names

__all__ = ["quantize_linears", "quantized_embedding", "quantized_layers"]


def quantize_linears(
    model: Any,
    format_of: FormatOf,
    input_ids: torch.Tensor | None,
    *,
    progress: Progress = no_progress,
) -> dict[str, Rounded]:
    """Quantize every Linear of the blocks; the model's weights become what the runtime will compute with.

    Args:
        model: A causal LM of the architecture table, float32; changed in place.
        format_of: How each Linear is stored.
        input_ids: Text to quantize for, (nsamples, seqlen): GPTQ; None rounds to nearest.
        progress: Told after each block.

    Returns:
        Module name -> its weight.
    """
    layers, linears = decoder_layers(model), block_linears(model)
    result: dict[str, Rounded] = {}
    with torch.no_grad():
        hidden, calls = (
            ([], []) if input_ids is None else enter_blocks(model, layers, torch.split(input_ids, 1))
        )
        for index, layer in enumerate(layers):
            with products_in("auto"):
                grams = _input_grams(linears[index], layer, hidden, calls[index]) if hidden else {}
            for name, linear in linears[index].items():
                form = format_of(name, index, len(layers))
                rounded = _rounded(linear.weight, form, grams.get(name))
                linear.weight.copy_(rounded.dequantized())
                result[name] = rounded
            with products_in("auto"):
                hidden = [run_layer(layer, h, calls[index][i]) for i, h in enumerate(hidden)]
            progress("quantizing", index + 1, len(layers))
    return result


def quantized_layers(rounded: Mapping[str, Rounded], head: BlockFormat) -> MakeLayer:
    """Layers from quantized weights; one that is not among them, an untied head, is rounded to `head`."""

    def make(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> NBitsLinear:
        found = [rounded[part] for part in packed_names(name) if part in rounded]
        parts = found or [round_to_nearest(weight, head)]
        return NBitsLinear(pack(joined(parts)), None if bias is None else bias.numpy())

    return make


def quantized_embedding(form: BlockFormat) -> Callable[[torch.Tensor], NBitsEmbedding]:
    """The embedding rounded to nearest: its rows are looked up one by one, so there is no input to weigh by."""
    return lambda table: NBitsEmbedding(pack(round_to_nearest(table, form)))


def _input_grams(
    linears: Mapping[str, nn.Linear],
    layer: nn.Module,
    hidden: list[torch.Tensor],
    calls: list[dict[str, Any]],
) -> dict[str, torch.Tensor]:
    """Module name -> X^T X / T of its input."""
    sums: dict[str, GramSum] = {}
    seen: dict[int, tuple[str, torch.Tensor]] = {}  # holds the tensor, or its id could belong to another one
    same_as: dict[str, str] = {}
    n_tokens = sum(h.shape[0] * h.shape[1] for h in hidden)

    def add(name: str, x: torch.Tensor) -> None:
        # q, k and v read the same tensor, as gate and up do: it is multiplied once.
        first, _ = seen.setdefault(id(x), (name, x))
        same_as[name] = first
        if first == name:
            sums.setdefault(name, GramSum(x.shape[-1])).add(x.reshape(-1, x.shape[-1]).float())

    with ExitStack() as stack:
        for name, linear in linears.items():
            stack.enter_context(input_hook(linear, partial(add, name)))
        for h, arguments in zip(hidden, calls, strict=True):
            seen.clear()
            run_layer(layer, h, arguments)
    totals = {name: total.total() / n_tokens for name, total in sums.items()}
    return {name: totals[first] for name, first in same_as.items()}


def _rounded(weight: torch.Tensor, form: BlockFormat, gram: torch.Tensor | None) -> Rounded:
    # Eight bits lose nothing that compensation could win back.
    return round_to_nearest(weight, form) if gram is None or form.bits == 8 else gptq(weight, gram, form)
