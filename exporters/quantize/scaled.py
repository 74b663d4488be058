"""Weights whose stored numbers stay while what their blocks are proportional to is trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

_TOLERANCE = 2.0**-7
"""Of a row's largest number: weights of 16 bits are not quite what their numbers stand for."""


class ScaledBlocks(nn.Module):
    """A weight (rows, columns) whose blocks of neighbouring columns are each multiplied by a factor of its own.

    Args:
        rows: Of the weight.
        columns: Of the weight; the last block may reach beyond them.
        block_size: Columns of a block.
    """

    def __init__(self, rows: int, columns: int, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size
        # By how much factors differ from 1: what weight decay draws to zero.
        self.changes = nn.Parameter(torch.zeros(rows, -(-columns // block_size)))

    @property
    def factors(self) -> torch.Tensor:
        """Of every block, (rows, blocks)."""
        return 1 + self.changes

    def forward(self, stored: torch.Tensor) -> torch.Tensor:
        """The weight as it is then."""
        spread = self.factors.repeat_interleave(self.block_size, 1)[:, : stored.shape[1]]
        return stored * spread


def train_norms(model: Any) -> None:
    """Let the norms of a causal LM's decoder be trained, and nothing else."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, parameter in model.get_decoder().named_parameters():
        if name.endswith("norm.weight"):
            parameter.requires_grad_(True)


def train_blocks(linear: nn.Module, block_size: int) -> None:
    """Let a Linear compute with a weight of scaled blocks; its own numbers stay."""
    weight: Any = linear.weight
    weight.requires_grad_(False)
    rows, columns = weight.shape
    parametrize.register_parametrization(linear, "weight", ScaledBlocks(rows, columns, block_size))


def factors_of(linear: nn.Module) -> torch.Tensor | None:
    """The factors of a Linear's blocks, (rows, blocks) float32 on the CPU; None where it has none."""
    if not parametrize.is_parametrized(linear, "weight"):
        return None
    parametrizations: Any = linear.parametrizations
    factors: torch.Tensor = parametrizations.weight[0].factors
    return factors.detach().float().cpu()


def make_plain(modules: Iterable[nn.Module]) -> None:
    """Put an end to what `train_blocks` has begun; weights are what they stand for."""
    for module in modules:
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def stands_for(values: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether numbers of few bits, as a runtime computes with them, are a checkpoint's weight; both (rows, columns)."""
    bound = _TOLERANCE * weight.abs().amax(1) + torch.finfo(torch.float32).tiny
    return bool(((values - weight).abs().amax(1) <= bound).all())
