"""Cutting a model to the channels that stay, and the ways to make up for those that go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from cfsp.errors import InputError
from cfsp.models.architectures import decoder_layers, feed_forward
from cfsp.pruning.block_by_block import prune_block_by_block
from cfsp.pruning.reconstruction import reconstruct_down, reconstruct_mean
from cfsp.pruning.surgery import Cut, cut_channels

_Solve = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None]
"""From block, down_proj's weight and kept channels to the weights of these channels; None keeps them."""


def _only_cut(cut: Cut) -> None:
    _cut_blocks(cut, lambda index, weight, kept: None)


def _keep_means(cut: Cut) -> None:
    if cut.statistics is None:
        raise InputError("keeping the mean output needs calibration statistics")
    channels = cut.statistics.channels
    _cut_blocks(cut, lambda index, weight, kept: reconstruct_mean(weight, channels[index].mean, kept))


def _from_one_pass(cut: Cut) -> None:
    if cut.statistics is None or cut.statistics.grams is None:
        raise InputError("reconstruction from one pass needs calibration statistics with Gram matrices")
    grams = cut.statistics.grams
    _cut_blocks(cut, lambda index, weight, kept: reconstruct_down(weight, grams.get(index), kept, cut.ridge))


def _cut_blocks(cut: Cut, solve: _Solve) -> None:
    with torch.no_grad():
        for index, layer in enumerate(decoder_layers(cut.model)):
            ffn, kept = feed_forward(cut.model, layer), cut.kept[index]
            if len(kept) < ffn.width:
                cut_channels(ffn, kept, solve(index, ffn.down.weight, kept))
            cut.progress("pruning", index + 1, len(cut.kept))


@dataclass(frozen=True)
class Reconstruction:
    """A row of RECONSTRUCTIONS.

    Attributes:
        carry_out: Cuts the model and makes up for what is gone.
        needs_statistics: Whether it reads the dense model's statistics.
        needs_gram: Whether it reads the Gram matrices in them.
    """

    carry_out: Callable[[Cut], None]
    needs_statistics: bool = False
    needs_gram: bool = False


RECONSTRUCTIONS: Mapping[str, Reconstruction] = MappingProxyType(
    {
        "none": Reconstruction(_only_cut),
        "mean": Reconstruction(_keep_means, needs_statistics=True),
        "one-pass": Reconstruction(_from_one_pass, needs_statistics=True, needs_gram=True),
        "block-by-block": Reconstruction(prune_block_by_block),
    }
)
