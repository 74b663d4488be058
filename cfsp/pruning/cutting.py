"""Cutting a model to the channels that stay, and the ways to make up for those that go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from cfsp.errors import InputError
from cfsp.models.architectures import attention_of, decoder_layers, feed_forward
from cfsp.models.paging import at_hand
from cfsp.pruning.block_by_block import prune_block_by_block
from cfsp.pruning.reconstruction import reconstruct_down, reconstruct_mean
from cfsp.pruning.rows import Row
from cfsp.pruning.surgery import Cut, cut_channels, cut_groups

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
    _cut_blocks(
        cut,
        lambda index, weight, kept: reconstruct_down(
            weight, grams.get(index, weight.device), kept, cut.ridge
        ),
    )


def _cut_blocks(cut: Cut, solve: _Solve) -> None:
    with torch.no_grad():
        for index, layer in enumerate(decoder_layers(cut.model)):
            ffn, kept = feed_forward(cut.model, layer), cut.kept[index]
            with at_hand(layer):
                if index in cut.groups:
                    cut_groups(attention_of(cut.model, layer), cut.groups[index])
                if len(kept) < ffn.width:
                    cut_channels(ffn, kept, solve(index, ffn.down.weight, kept))
            cut.progress("pruning", index + 1, len(cut.kept))


RECONSTRUCTIONS: Mapping[str, Row[Callable[[Cut], None]]] = MappingProxyType(
    {
        "none": Row(_only_cut),
        "mean": Row(_keep_means, needs_statistics=True),
        "one-pass": Row(_from_one_pass, needs_statistics=True, needs_gram=True),
        "block-by-block": Row(prune_block_by_block, reads_stream=True),
    }
)
"""Cut the model and make up for what is gone."""
