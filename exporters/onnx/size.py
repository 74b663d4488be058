"""The size of a variant's files of any shape: what is exported of a model of that shape whose weights are nowhere."""

from __future__ import annotations

from typing import Any

from cfsp.models.architectures import spec_for
from exporters.onnx.block_quantize import round_nowhere
from exporters.onnx.graph_file import Labels, size_of
from exporters.onnx.mixed import with_room_for_few
from exporters.onnx.quantize import QuantizedModel, quantize_linears
from exporters.onnx.variants import FormatOf, Variant, find_variant, formats_without_text
from exporters.onnx.weights import Weights, decoder_of
from exporters.onnx.writer import weights_without_blocks
from exporters.provenance import SOME_HASH, Provenance


def largest_size(model: Any, variant: str, origin: Provenance) -> int:
    """Most bytes that the graph with all logits and its weights take, which is what `ExportRecord.file_bytes` says.

    It is the size to the byte, but where text chooses which layers get eight bits: then as much is added as these may
    take.

    Args:
        model: Outline of a causal LM of the architecture table (`cfsp.pruning.outline`), which has no numbers.
        variant: One whose size follows from the shape.
        origin: As the checkpoint will say.

    Raises:
        InputError: Unknown variant, or a model that the graph cannot compute.
    """
    row = find_variant(variant)
    weights, room = _weights(model, row)
    labels = Labels.of(row, origin, SOME_HASH if row.calibrated else None)
    return size_of(decoder_of(model, weights), labels) + room


def _weights(model: Any, variant: Variant) -> tuple[Weights, int]:
    """How they are stored before text chooses, and what its choice may add, in bytes."""
    form = variant.form
    if form is None:
        return weights_without_blocks(variant), 0
    if variant.calibrated:
        return with_room_for_few(_quantized(model, lambda *_: form))
    return _quantized(model, formats_without_text(form, spec_for(model.config).down)), 0


def _quantized(model: Any, format_of: FormatOf) -> QuantizedModel:
    layers = quantize_linears(model, format_of, None, nearest=round_nowhere)
    return QuantizedModel(layers, nearest=round_nowhere)
