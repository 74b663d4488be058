"""Four or eight bits for each Linear of the blocks and the output matrix, by what four cost, under a budget in bytes.

Rounding a layer to four bits costs a divergence that one backward pass over calibration text predicts
(`cfsp.gradients.predict_divergence`); rounding it to eight costs 1/256 of that, as its steps are 1/16. So each layer
has a gain and a price, and those with the most gain for a byte get eight bits until the budget is spent: either the
bytes of a file, or what may be lost of its speed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cfsp.architectures import block_linears
from cfsp.errors import InputError
from cfsp.gradients import predict_divergence
from cfsp.progress import Progress, no_progress
from exporters.onnx.block_quantize import Rounded, round_to_nearest
from exporters.onnx.variants import BlockFormat
from exporters.onnx.weights import has_company

__all__ = [
    "Mixture",
    "choose_eight_bits",
    "choose_few",
    "choose_mixture",
    "default_budget",
    "stored_bytes",
]

FOUR, EIGHT = BlockFormat(4, 32), BlockFormat(8, 32)
GRADIENT_WINDOWS = 4
"""Windows of the calibration text to predict losses from: what counts is the layers' order."""
_Q4_0_RATIO = 1.1
_FEW = 0.05
"""Of the bytes that a token reads. On SmolLM2-135M, a fifth less is lost than without such layers."""
_APART_BYTES = 180_000
"""Two products more: 22 microseconds of one core that reads 8 GB/s, measured on SmolLM2-135M in ONNX Runtime 1.32."""
OFFSET_DIGITS = 8
"""A longer tensor's place in the file may take more digits, which the graph holds."""


@dataclass(frozen=True)
class Mixture:
    """Which layers are stored in eight bits.

    Attributes:
        eight_bits: Their module names, first block to last.
        budget_bytes: What the file was allowed to take; None where time was what counted.
    """

    eight_bits: tuple[str, ...]
    budget_bytes: int | None = None

    def applied(self, model: Any, small: Mapping[str, Rounded]) -> dict[str, Rounded]:
        """`small` with the nearest of eight bits for these layers; the others make up for no more than before."""
        return {
            name: round_to_nearest(model.get_submodule(name).weight.detach(), EIGHT)
            if name in self.eight_bits
            else stored
            for name, stored in small.items()
        }


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
        small: Every layer in four bits, by `quantize_linears`.
        input_ids: Calibration text, (nsamples, seqlen).
        size_bytes: Of the file that has all of them in four bits.
        budget_bytes: Of the file with the mixture; `default_budget` where None.
        progress: Told about the backward pass.

    Raises:
        InputError: Not even four bits fit the budget.
    """
    budget = default_budget(model) if budget_bytes is None else budget_bytes
    left = budget - size_bytes - OFFSET_DIGITS * len(small)
    if left < 0:
        raise InputError(
            "four bits for every layer take more",
            field="mixed_bytes",
            value=budget,
            allowed=f"{budget - left} or more",
        )

    losses = _losses(model, small, input_ids, progress)
    prices = {name: _price(stored) for name, stored in small.items()}
    return Mixture(choose_eight_bits(losses, prices, left), budget)


def choose_few(
    model: Any, small: Mapping[str, Rounded], input_ids: torch.Tensor, *, progress: Progress = no_progress
) -> Mixture:
    """The few layers that gain most from eight bits for the time that they cost, until a token takes 5 % longer.

    A token takes the time to read the weights, so the price is in bytes, too; q, k and v of one format are one layer,
    and where they are not, the two products more cost what reading `_APART_BYTES` does.

    Args:
        model: A causal LM of the architecture table, float32; unchanged.
        small: Every layer in few bits, by `quantize_linears`.
        input_ids: Calibration text, (nsamples, seqlen).
        progress: Told about the backward pass.
    """
    losses = _losses(model, small, input_ids, progress)
    # Where heads are normed, they are apart already.
    apart = 0 if any(name.endswith("q_norm") for name, _ in model.named_modules()) else _APART_BYTES
    prices = {name: _price(stored) + (apart if has_company(name) else 0) for name, stored in small.items()}
    left = int(_FEW * sum(map(stored_bytes, small.values())))
    return Mixture(choose_eight_bits(losses, prices, left))


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


def stored_bytes(stored: Rounded) -> int:
    """What a matrix takes: its numbers, and a float16 scale a block."""
    return _bytes_of((len(stored.q), stored.columns), stored.form)


def default_budget(model: Any) -> int:
    """1.1 times what GGUF's Q4_0 takes: 4.5 bits for the blocks' matrices, 8.5 for the embedding and an untied head.

    Args:
        model: A causal LM of the architecture table.
    """
    blocks = sum(
        _bytes_of(linear.weight.shape, FOUR) for block in block_linears(model) for linear in block.values()
    )
    ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    tables = {table.data_ptr(): table for table in ends}  # a tied head is the embedding
    tables_bytes = sum(_bytes_of(table.shape, EIGHT) for table in tables.values())
    vectors = sum(4 * parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    return int(_Q4_0_RATIO * (blocks + tables_bytes + vectors))


def _losses(
    model: Any, small: Mapping[str, Rounded], input_ids: torch.Tensor, progress: Progress
) -> dict[str, float]:
    """Layer -> the divergence that its few bits cost, alone."""

    def change(name: str) -> torch.Tensor:
        weight: torch.Tensor = model.get_submodule(name).weight.detach()
        return small[name].dequantized() - weight

    changes = {name: partial(change, name) for name in small}
    return predict_divergence(model, changes, input_ids[:GRADIENT_WINDOWS], progress=progress)


def _price(stored: Rounded) -> int:
    return _bytes_of((len(stored.q), stored.columns), EIGHT) - stored_bytes(stored)


def _bytes_of(shape: Sequence[int], form: BlockFormat) -> int:
    rows, columns = shape
    return rows * -(-columns // form.block_size) * (form.block_size * form.bits // 8 + 2)
