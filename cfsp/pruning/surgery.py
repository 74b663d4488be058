"""Cutting FFN channels out of Linear layers, in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cfsp.models.architectures import FeedForward, model_shape
from cfsp.progress import Progress, no_progress
from cfsp.pruning.statistics import BlockStatistics


@dataclass(frozen=True)
class Cut:
    """What to cut, and what a reconstruction may draw on.

    Attributes:
        model: The dense model; changed in place.
        kept: Per block the channels that stay, (n_kept,) int64, ascending; all of a block that goes.
        ridge: Of the least-squares solutions.
        correction: Share of earlier blocks' error that a block takes back.
        statistics: Of the dense model on the calibration windows.
        input_ids: The calibration windows, (nsamples, seqlen) int64.
        progress: Told after each block.
        gone: Blocks that will be removed whole.
        silent: Blocks that will lose their attention.
    """

    model: Any
    kept: Sequence[torch.Tensor]
    ridge: float
    correction: float
    statistics: BlockStatistics | None = None
    input_ids: torch.Tensor | None = None
    progress: Progress = no_progress
    gone: frozenset[int] = frozenset()
    silent: frozenset[int] = frozenset()


def cut_channels(ffn: FeedForward, kept: torch.Tensor, down_weight: torch.Tensor | None = None) -> None:
    """Keep only some channels of a gated MLP; the Linear layers stay the same objects.

    Args:
        ffn: The block's MLP.
        kept: (n_kept,) int64 channel indices, ascending.
        down_weight: (hidden_size, n_kept) to use instead of the kept columns.
    """
    for linear in (ffn.gate, ffn.up):
        linear.weight = _parameter(linear.weight, linear.weight[kept])
        if linear.bias is not None:
            linear.bias = _parameter(linear.bias, linear.bias[kept])
        linear.out_features = len(kept)
    columns = ffn.down.weight[:, kept] if down_weight is None else down_weight
    ffn.down.weight = _parameter(ffn.down.weight, columns)
    ffn.down.in_features = len(kept)
    if hasattr(ffn.module, "intermediate_size"):
        ffn.module.intermediate_size = len(kept)  # type: ignore[assignment]


def set_config_shape(model: Any) -> None:
    """Record a uniform shape in the model's config; blocks that differ are the checkpoint's to describe."""
    shape = model_shape(model)
    if shape.blocks and shape.is_uniform:
        model.config.intermediate_size = shape.ffn_widths[0]


def _parameter(old: torch.Tensor, values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone().contiguous().to(old.dtype), requires_grad=old.requires_grad)
