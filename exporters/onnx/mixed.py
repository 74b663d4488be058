"""Four or eight bits for each Linear of the blocks, by what four bits cost, under a budget in bytes.

Rounding a layer to four bits costs a divergence that one backward pass over calibration text predicts
(`cfsp.gradients.predict_divergence`); rounding it to eight costs 1/256 of that, as its steps are 1/16. So each layer
has a gain and a price, and those with the most gain for a byte get eight bits until the budget is spent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cfsp.architectures import block_linears
from cfsp.errors import InputError
from cfsp.gradients import predict_divergence
from cfsp.progress import Progress, no_progress
from exporters.onnx.block_quantize import Rounded
from exporters.onnx.quantize import quantize_linears
from exporters.onnx.variants import BlockFormat

__all__ = ["Mixture", "choose_eight_bits", "choose_mixture", "default_budget", "round_small", "stored_bytes"]

FOUR, EIGHT = BlockFormat(4, 32), BlockFormat(8, 32)
GRADIENT_WINDOWS = 4
"""Windows of the calibration text to predict losses from: what counts is the layers' order."""
_Q4_0_RATIO = 1.1
OFFSET_DIGITS = 8
"""A longer tensor's place in the file may take more digits, which the graph holds."""


@dataclass(frozen=True)
class Mixture:
    """Which layers are stored in eight bits.

    Attributes:
        eight_bits: Their module names, first block to last.
        budget_bytes: What the file was allowed to take.
    """

    eight_bits: tuple[str, ...]
    budget_bytes: int

    def format_of(self, name: str, block: int, blocks: int) -> BlockFormat:
        """See `exporters.onnx.variants.FormatOf`."""
        return EIGHT if name in self.eight_bits else FOUR


def round_small(
    model: Any, input_ids: torch.Tensor, *, progress: Progress = no_progress
) -> dict[str, Rounded]:
    """Every Linear of the blocks in four bits, as `quantize_linears` gives them."""
    return quantize_linears(model, lambda *_: FOUR, input_ids, progress=progress)


def choose_mixture(
    model: Any,
    small: Mapping[str, Rounded],
    input_ids: torch.Tensor,
    size_bytes: int,
    *,
    budget_bytes: int | None = None,
    progress: Progress = no_progress,
) -> Mixture:
    """The layers to store in eight bits.

    Args:
        model: A causal LM of the architecture table, float32; unchanged.
        small: `round_small`'s.
        input_ids: Calibration text, (nsamples, seqlen).
        size_bytes: Of the file that has all of them in four bits.
        budget_bytes: Of the file with the mixture; `default_budget` where None.
        progress: Told about the backward pass.

    Raises:
        InputError: Not even four bits fit the budget.
    """
    budget = default_budget(model) if budget_bytes is None else budget_bytes
    linears = {name: linear for block in block_linears(model) for name, linear in block.items()}
    left = budget - size_bytes - OFFSET_DIGITS * len(linears)
    if left < 0:
        raise InputError(
            "four bits for every layer take more",
            field="mixed_bytes",
            value=budget,
            allowed=f"{budget - left} or more",
        )

    def change(name: str) -> torch.Tensor:
        return small[name].dequantized() - linears[name].weight.detach()

    changes = {name: partial(change, name) for name in linears}
    losses = predict_divergence(model, changes, input_ids[:GRADIENT_WINDOWS], progress=progress)
    prices = {name: _price(linear.weight) for name, linear in linears.items()}
    return Mixture(choose_eight_bits(losses, prices, left), budget)


def choose_eight_bits(
    losses: Mapping[str, float], prices: Mapping[str, int], left_bytes: int
) -> tuple[str, ...]:
    """The most loss avoided for a byte first, as long as it fits.

    Args:
        losses: Layer -> what four bits cost it.
        prices: Layer -> bytes that eight bits take more.
        left_bytes: For all of them together.

    Returns:
        Those that get eight bits, in the order of `losses`.
    """
    chosen = set()
    for name in sorted(losses, key=lambda n: losses[n] / prices[n], reverse=True):
        if prices[name] <= left_bytes:
            chosen.add(name)
            left_bytes -= prices[name]
    return tuple(name for name in losses if name in chosen)


def stored_bytes(matrix: torch.Tensor, form: BlockFormat) -> int:
    """What a matrix (rows, columns) takes: its numbers, and a float16 scale a block."""
    rows, columns = matrix.shape
    return rows * -(-columns // form.block_size) * (form.block_size * form.bits // 8 + 2)


def default_budget(model: Any) -> int:
    """1.1 times what GGUF's Q4_0 takes: 4.5 bits for the blocks' matrices, 8.5 for the embedding and an untied head.

    Args:
        model: A causal LM of the architecture table.
    """
    blocks = sum(
        stored_bytes(linear.weight, FOUR) for block in block_linears(model) for linear in block.values()
    )
    ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    tables = {table.data_ptr(): table for table in ends}  # a tied head is the embedding
    tables_bytes = sum(stored_bytes(table, EIGHT) for table in tables.values())
    vectors = sum(4 * parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    return int(_Q4_0_RATIO * (blocks + tables_bytes + vectors))


def _price(matrix: torch.Tensor) -> int:
    return stored_bytes(matrix, EIGHT) - stored_bytes(matrix, FOUR)
