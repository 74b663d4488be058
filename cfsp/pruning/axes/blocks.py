"""Whole blocks as an axis of pruning: those go that the model misses least, and the block before takes their work over.

The first block stays, as nothing before it could make up for it.

What the removed blocks added to the residual stream is fitted by down_proj of the block before them, solved anew
(cfsp/pruning/block_by_block.py). ReplaceMe (arXiv 2505.02819) folds a linear map T of the FFN's output into it, which
changes down_proj to T down_proj; solved for down_proj itself the change may be any matrix, in closed form as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cfsp.errors import InputError
from cfsp.models.architectures import ArchitectureSpec, attention_of, decoder_layers, spec_for
from cfsp.models.config_file import PER_BLOCK_LISTS
from cfsp.progress import Progress, no_progress
from cfsp.pruning.axes.removal import Probe, Removal, block_left_out

_BLOCKS_ARE_NUMBERED = (
    "every block has a part of its own in what is read of a token, or reads a certain block's keys"
)


def blocks_stay(spec: ArchitectureSpec) -> str | None:
    """Why no block of a model type can go; None where some can."""
    return _BLOCKS_ARE_NUMBERED if spec.block_inputs or spec.shared_keys else None


def plan_blocks(
    model: Any, input_ids: torch.Tensor, count: int, *, progress: Progress = no_progress
) -> Removal:
    """Choose the blocks to remove.

    Args:
        model: The dense model, in eval mode; unchanged.
        input_ids: Windows (n_windows, seqlen) int64.
        count: Blocks to remove.
        progress: Told after each block that is chosen.

    Raises:
        InputError: More blocks than can go.
    """
    candidates = removable_blocks(model, count)
    return Probe(model, input_ids, block_left_out).choose(candidates, count, progress=progress, what="blocks")


def candidate_blocks(model: Any) -> list[int]:
    """Blocks that may go: all but the first, and the first that attends, from which libraries tell a text's length.

    None where each depends on its number.
    """
    if blocks_stay(spec_for(model.config)):
        return []
    attending = [bool(attention_of(model, layer)) for layer in decoder_layers(model)]
    return [index for index in range(1, len(attending)) if index != attending.index(True)]


def removable_blocks(model: Any, count: int) -> list[int]:
    """Those of which so many may go, or InputError where there are not so many."""
    candidates = candidate_blocks(model)
    if reason := blocks_stay(spec_for(model.config)):
        raise InputError(reason, field="blocks", value=count, allowed="0")
    if not 0 < count <= len(candidates):
        raise InputError(
            "the first block stays", field="blocks", value=count, allowed=f"at most {len(candidates)}"
        )
    return candidates


def remove_blocks(model: Any, gone: frozenset[int]) -> None:
    """Take blocks out of the model, in place; its configuration then says how many are left."""
    if not gone:
        return
    decoder, config = model.get_decoder(), model.config
    stay = [index for index in range(len(decoder.layers)) if index not in gone]
    decoder.layers = nn.ModuleList([decoder.layers[index] for index in stay])
    for index, layer in enumerate(decoder.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    for key in PER_BLOCK_LISTS:
        if each := getattr(config, key, None):
            setattr(config, key, [each[index] for index in stay])
    config.num_hidden_layers = len(stay)
