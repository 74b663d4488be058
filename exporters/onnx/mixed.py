"""Four or eight bits for each Linear of the blocks and the output matrix, by what four cost, under a budget in bytes.

Rounding a layer to the nearest of four bits costs a divergence that one backward pass over calibration text predicts
(`predict_divergence`); rounding it to eight costs 1/256 of that, as its steps are 1/16. So each
layer has a gain and a price, and those with the most gain for a byte get eight bits until the budget is spent: either
the bytes of a file, or what may be lost of its speed. Then all are rounded for the text, each in its bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import torch

from cfsp.devices import CPU, moved
from cfsp.errors import InputError
from cfsp.models.architectures import block_linears, spec_for
from cfsp.progress import Progress, no_progress
from exporters.onnx.block_quantize import Rounded, round_nowhere, round_to_nearest
from exporters.onnx.quantize import QuantizedModel, quantize_linears
from exporters.onnx.variants import HEAD, INT4, INT8, BlockFormat
from exporters.onnx.weights import HEAD_PARTS, group_of, head_parts, is_tied, weight_of
from exporters.quantize.gradients import WeightChange, predict_divergence

GRADIENT_WINDOWS = 4
"""Windows of the calibration text to predict losses from: what counts is the layers' order."""
_Q4_0_RATIO = 1.1
_FEW = 0.03
"""Of the bytes that a token reads. On SmolLM2-135M, a fifth less is lost than without such layers."""
_APART_BYTES = 180_000
"""Two products more: 22 microseconds of one core that reads 8 GB/s, measured on SmolLM2-135M in ONNX Runtime 1.32."""
OFFSET_DIGITS = 8
"""A longer tensor's place in the file may take more digits, which the graph holds."""


def measured_model(
    model: Any,
    form: BlockFormat,
    input_ids: torch.Tensor,
    *,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> QuantizedModel:
    """Round all layers to the nearest, and predict what each loses.

    Args:
        model: A causal LM of the architecture table, float32, on the CPU; unchanged.
        form: Of all layers.
        input_ids: Calibration text, (nsamples, seqlen).
        device: Where to compute.
        progress: Told about the prediction.
    """
    rows = head_parts(model.config.vocab_size)

    def change(name: str) -> WeightChange:
        def matrix(some: slice) -> torch.Tensor:
            return layers[name].rows(some).dequantized() - weight_of(model, name)[some]

        return WeightChange(HEAD, matrix, rows[name]) if name in rows else WeightChange(name, matrix)

    with moved(model, device):
        layers = quantize_linears(model, lambda *_: form, None)
        changes = {name: change(name) for name in layers}
        losses = predict_divergence(model, changes, input_ids[:GRADIENT_WINDOWS], progress=progress)
    return QuantizedModel({name: rounded.to(CPU) for name, rounded in layers.items()}, losses)


def without_numbers(quantized: QuantizedModel) -> QuantizedModel:
    """What it loses, and how large it is: its numbers are nowhere."""
    nowhere = torch.device("meta")
    layers = {name: rounded.to(nowhere) for name, rounded in quantized.layers.items()}
    return replace(quantized, layers=layers, nearest=round_nowhere)


def rounded_model(
    model: Any,
    form: BlockFormat,
    eight_bits: Collection[str],
    input_ids: torch.Tensor,
    *,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> QuantizedModel:
    """Round all layers for a text.

    Args:
        model: A causal LM of the architecture table, float32, on the CPU; unchanged.
        form: Of all layers but some.
        eight_bits: Those that get the nearest of eight bits.
        input_ids: Calibration text, (nsamples, seqlen).
        device: Where to compute.
        progress: Told after each block.
    """
    with moved(model, device):
        layers = quantize_linears(
            model, lambda name, *_: INT8 if name in eight_bits else form, input_ids, progress=progress
        )
    parts = [name for name in HEAD_PARTS if name in eight_bits]
    nearest = {name: round_to_nearest(weight_of(model, name), INT8) for name in parts}
    return QuantizedModel({name: rounded.to(CPU) for name, rounded in layers.items()} | nearest)


def choose_mixture(quantized: QuantizedModel, size_bytes: int, budget_bytes: int) -> tuple[str, ...]:
    """The layers to store in eight bits so that a file has a size.

    Args:
        quantized: A model in few bits.
        size_bytes: Of the file that has all of it in few bits.
        budget_bytes: Of the file with the mixture.

    Raises:
        InputError: Not even few bits fit the budget.
    """
    left = budget_bytes - size_bytes - OFFSET_DIGITS * len(quantized.layers)
    if left < 0:
        raise InputError(
            "four bits for every layer take more",
            field="mixed_bytes",
            value=budget_bytes,
            allowed=f"{budget_bytes - left} or more",
        )
    return choose_eight_bits(quantized.losses, lambda name, _: _price(quantized.layers[name]), left)


def choose_few(model: Any, quantized: QuantizedModel) -> tuple[str, ...]:
    """The few layers that gain most from eight bits for the time that they cost, until a token takes 3 % longer.

    A token takes the time to read the weights, so the price is in bytes, too. What can be one layer is one as long as
    it has one format; two products more cost what reading `_APART_BYTES` does.

    Args:
        model: A causal LM of the architecture table.
        quantized: It in few bits.
    """
    # Where heads are normed, they are apart already.
    normed = spec_for(model.config).head_norms is not None

    def price(name: str, chosen: AbstractSet[str]) -> int:
        together = group_of(name)
        apart = len(together) == 1 or bool(chosen & set(together)) or (normed and name not in HEAD_PARTS)
        return _price(quantized.layers[name]) + (0 if apart else _APART_BYTES)

    return choose_eight_bits(quantized.losses, price, left_for_few(quantized))


def left_for_few(quantized: QuantizedModel) -> int:
    """What the few layers may cost, in bytes."""
    return int(_FEW * sum(map(stored_bytes, quantized.layers.values())))


def with_room_for_few(quantized: QuantizedModel) -> tuple[QuantizedModel, int]:
    """The model that takes most before its few layers are chosen, and the bytes that these can take more."""
    left = left_for_few(quantized)
    digits = OFFSET_DIGITS * len(quantized.layers)
    return replace(quantized, apart=left >= _APART_BYTES), left + digits


def choose_eight_bits(
    losses: Mapping[str, float], price: Callable[[str, AbstractSet[str]], int], left_bytes: int
) -> tuple[str, ...]:
    """The most loss avoided for a byte first, as long as it fits.

    Args:
        losses: Layer -> what few bits cost it.
        price: Bytes that eight bits take more for a layer, beside those that are chosen already.
        left_bytes: For all of them together.

    Returns:
        Those that get eight bits, in the order of `losses`.
    """
    chosen: set[str] = set()
    while prices := {
        name: cost for name in losses if name not in chosen and (cost := price(name, chosen)) <= left_bytes
    }:
        best = max(prices, key=lambda name: losses[name] / prices[name])
        chosen.add(best)
        left_bytes -= prices[best]
    return tuple(name for name in losses if name in chosen)


def stored_bytes(stored: Rounded) -> int:
    """What a matrix takes: its numbers, and a float16 scale a block."""
    return _bytes_of((len(stored.q), stored.columns), stored.form)


def default_budget(model: Any) -> int:
    """1.1 times what weights take in GGUF's Q4_0: 4.5 bits in the blocks' matrices, 8.5 in the embedding and a head.

    Args:
        model: A causal LM of the architecture table.
    """
    blocks = sum(
        _bytes_of(linear.weight.shape, INT4) for block in block_linears(model) for linear in block.values()
    )
    embedding = _bytes_of(model.get_input_embeddings().weight.shape, INT8)
    tables = embedding * (1 if is_tied(model) else 2)
    vectors = sum(4 * parameter.numel() for parameter in model.parameters() if parameter.ndim != 2)
    return int(_Q4_0_RATIO * (blocks + tables + vectors))


def _price(stored: Rounded) -> int:
    return _bytes_of((len(stored.q), stored.columns), INT8) - stored_bytes(stored)


def _bytes_of(shape: Sequence[int], form: BlockFormat) -> int:
    rows, columns = shape
    return rows * -(-columns // form.block_size) * (form.block_size * form.bits // 8 + 2)
