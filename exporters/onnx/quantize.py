"""Quantizing a model's layers for a variant, block after block, on text.

The model is run as far as it is quantized already: every layer is rounded for the inputs that it will really get.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cfsp.models.architectures import block_linears, decoder_layers
from cfsp.models.offload import at_hand
from cfsp.progress import Progress, no_progress
from exporters.onnx.block_quantize import Rounded, gptq, joined, refine, round_to_nearest
from exporters.onnx.layers import (
    TABLE,
    Embedding,
    Layer,
    NBitsEmbedding,
    NBitsLinear,
    StackedEmbedding,
    StackedLinear,
)
from exporters.onnx.variants import HEAD, INT8, BlockFormat, FormatOf
from exporters.onnx.weights import HEAD_PARTS, Weights, head_parts, is_tied, packed_names, read_weight
from exporters.quantize.scale_tuning import tune_scales
from exporters.quantize.walk import CORRECTION, Readings, alike, round_blocks

Nearest = Callable[[torch.Tensor, BlockFormat], Rounded]
_AT_ONCE = 2**24
"""Numbers that are rounded together: rows do not depend on each other, and each number takes 20 bytes meanwhile."""
_LEARNING_RATE = 1e-3
"""Of scales and norms."""


@dataclass(frozen=True)
class QuantizedModel(Weights):
    """A model in few bits.

    Attributes:
        layers: Every Linear of the blocks and the output matrix's parts, by `quantize_linears`.
        losses: The divergence that the few bits of each cost, alone; empty where text did not tell.
        apart: What could be one layer is several all the same.
        nearest: Rounds what is no layer.
    """

    layers: Mapping[str, Rounded]
    losses: Mapping[str, float] = field(default_factory=dict)
    apart: bool = False
    nearest: Nearest = round_to_nearest

    def layer(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Layer:
        """See `Weights`; the output matrix in one or in two."""
        names = packed_names(name)
        parts = [self.layers[part] for part in names]
        if len(parts) == 1 or self.packs(names):
            return NBitsLinear(joined(parts), bias)
        sizes = [len(part.q) for part in parts]
        biases = [None] * len(parts) if bias is None else torch.split(bias, sizes)
        return StackedLinear(tuple(map(NBitsLinear, parts, biases)))

    def embedding(self, table: torch.Tensor, *, tied: bool) -> Embedding:
        """See `Weights`; the output matrix where they are one, else the nearest of eight bits.

        Rows of a table that does not multiply are looked up one by one: no input weighs more, and its size costs no
        time.
        """
        if not tied:
            return NBitsEmbedding(self.nearest(table, INT8))
        parts = [self.layers[name] for name in HEAD_PARTS]
        if self.packs(HEAD_PARTS):
            return NBitsEmbedding(joined(parts))
        prefix, _, last = TABLE.rpartition(".")
        return StackedEmbedding(
            *(NBitsEmbedding(part, f"{prefix}.{index}.{last}") for index, part in enumerate(parts))
        )

    def packs(self, names: Sequence[str]) -> bool:
        """See `Weights`; layers of unlike formats cannot."""
        return not self.apart and len({self.layers[name].form for name in names}) == 1


def quantize_linears(
    model: Any,
    format_of: FormatOf,
    input_ids: torch.Tensor | None,
    *,
    nearest: Nearest = round_to_nearest,
    correction: float = CORRECTION,
    progress: Progress = no_progress,
) -> dict[str, Rounded]:
    """Quantize every Linear of the blocks, and the output matrix.

    Args:
        model: A causal LM of the architecture table, float32; unchanged.
        format_of: How each is stored.
        input_ids: Text to quantize for, (nsamples, seqlen): GPTQ; None rounds to nearest.
        nearest: Rounds what is not rounded for the text.
        correction: See `round_blocks`.
        progress: Told after each block, and after the output matrix.

    Returns:
        Module name -> its weight; the output matrix's is in the two parts of `HEAD_PARTS`. A tied embedding is that
        matrix, and rounded for what it multiplies.
    """
    linears = block_linears(model)
    result: dict[str, Rounded] = {}

    def store(index: int, readings: Readings) -> dict[str, Rounded]:
        forms = {name: format_of(name, index, len(linears)) for name in readings or linears[index]}
        weights = {
            name: readings[name].weight if readings else linears[index][name].weight.detach()
            for name in forms
        }
        block = _rounded_layers(weights, forms, readings, nearest)
        result.update(block)
        return block

    def visit(index: int, readings: Readings) -> dict[str, torch.Tensor]:
        return {name: rounded.dequantized() for name, rounded in store(index, readings).items()}

    gram = None
    if input_ids is not None:
        gram = round_blocks(model, input_ids, visit, correction=correction, progress=progress)
    else:
        for index, layer in enumerate(decoder_layers(model)):
            with at_hand(layer):
                store(index, {})
            progress("quantizing", index + 1, len(linears) + 1)
    head = format_of(HEAD, len(linears), len(linears))
    output = model.get_output_embeddings()
    with at_hand(output):
        stored = _rounded(output.weight.detach(), head, gram, nearest)
    result |= {name: stored.rows(rows) for name, rows in head_parts(len(stored.q)).items()}
    progress("quantizing", len(linears) + 1, len(linears) + 1)
    return result


def tune(
    model: Any, quantized: QuantizedModel, input_ids: torch.Tensor, *, progress: Progress = no_progress
) -> QuantizedModel:
    """It with the scales and norms that `exporters.quantize.scale_tuning` finds on a text; arguments as there."""
    stored = {name: rounded.dequantized().to(model.device) for name, rounded in quantized.layers.items()}
    head = torch.cat([stored.pop(part) for part in HEAD_PARTS])
    table = head if is_tied(model) else model.get_input_embeddings().weight.detach()
    tuned = tune_scales(model, stored, head, table, input_ids, _LEARNING_RATE, progress=progress)
    scaled = {name: quantized.layers[name].scaled(rows[:, None]) for name, rows in tuned.rows.items()}
    return replace(quantized, layers={**quantized.layers, **scaled}, norms=tuned.norms)


def with_nearest(model: Any, quantized: QuantizedModel) -> QuantizedModel:
    """A model with the nearest numbers of its formats, and the norms of the model that it was made from."""
    layers = {
        name: _rounded(read_weight(model, name), layer.form, None, quantized.nearest)
        for name, layer in quantized.layers.items()
    }
    return replace(quantized, layers=layers, norms={})


def _rounded_layers(
    weights: Mapping[str, torch.Tensor],
    forms: Mapping[str, BlockFormat],
    readings: Readings,
    nearest: Nearest,
) -> dict[str, Rounded]:
    """Linears of a block; those of one format that read the same are rounded as one matrix."""
    layers = {}
    for names in alike(forms, readings):
        each = [weights[name] for name in names]
        gram = readings[names[0]].gram if readings else None
        whole, start = _rounded(torch.cat(each), forms[names[0]], gram, nearest), 0
        for name, weight in zip(names, each, strict=True):
            layers[name] = whole.rows(slice(start, start := start + len(weight)))
    return {name: layers[name] for name in weights}


def _rounded(weight: torch.Tensor, form: BlockFormat, gram: torch.Tensor | None, nearest: Nearest) -> Rounded:
    parts = torch.split(weight, max(1, _AT_ONCE // weight.shape[1]))
    # Eight bits lose nothing that compensation could win back.
    if gram is None or form.bits == 8:
        return joined([nearest(part, form) for part in parts])
    moved = (part.to(gram.device) for part in parts)
    return joined([refine(part, gram, gptq(part, gram, form)) for part in moved]).to(weight.device)
