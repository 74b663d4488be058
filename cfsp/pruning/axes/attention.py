"""Whole attentions as an axis of pruning: blocks that do without keep their FFN, which makes up for what is gone.

A block without attention has no norm before it either, no query, key, value and output matrices, and no place in the
cache: it is x + ffn(norm(x)). Its down_proj is solved anew for what attention gave the block's output
(cfsp/pruning/block_by_block.py). Half of a large model's attentions add little (LLM-Drop, arXiv 2406.15786).

The first block of the model, and the first of each kind where some attend to a window alone, keep theirs: runtimes
read how long the text is from the first block's keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from cfsp.errors import InputError
from cfsp.models.architectures import ArchitectureSpec, attention_of, decoder_layers, spec_for
from cfsp.progress import Progress, no_progress
from cfsp.pruning.axes.removal import Probe, Removal, attention_left_out

ATTENTIONS_STAY = (
    "few blocks attend, as something else takes the place of attention in the others, and these stay"
)
_KEYS_ARE_SHARED = "blocks read keys and values of other blocks, and all attentions stay as they are"


def attentions_stay(spec: ArchitectureSpec) -> str | None:
    """Why no attention of a model type can go, nor a part of one; None where some can."""
    if spec.mixer:
        return ATTENTIONS_STAY
    return _KEYS_ARE_SHARED if spec.shared_keys else None


def plan_attentions(
    model: Any,
    input_ids: torch.Tensor,
    count: int,
    gone: frozenset[int] = frozenset(),
    *,
    progress: Progress = no_progress,
) -> Removal:
    """Choose the blocks that lose their attention.

    Args:
        model: The dense model, in eval mode; unchanged.
        input_ids: Windows (n_windows, seqlen) int64.
        count: Attentions to remove.
        gone: Blocks that go whole.
        progress: Told after each attention that is chosen.

    Raises:
        InputError: More attentions than can go.
    """
    candidates = removable_attentions(model, gone)
    check_attentions(candidates, count)
    probe = Probe(model, input_ids, attention_left_out, gone)
    return probe.choose(candidates, count, progress=progress, what="attentions")


def check_attentions(candidates: Sequence[int], count: int) -> None:
    """Raise InputError where not so many of the candidates can go."""
    if not 0 < count <= len(candidates):
        raise InputError(
            "the first block's attention stays",
            field="attentions",
            value=count,
            allowed=f"at most {len(candidates)}",
        )


def removable_attentions(model: Any, gone: frozenset[int]) -> list[int]:
    """Blocks that can do without their attention: all that stay and have one, but the first of each kind.

    Where most blocks do without already, as something else takes its place, none can, nor where others read its keys.
    """
    if attentions_stay(spec_for(model.config)):
        return []
    layers = enumerate(decoder_layers(model))
    stay = [index for index, layer in layers if index not in gone and attention_of(model, layer)]
    kinds = getattr(model.config, "layer_types", None) or [""] * (max(stay) + 1)
    firsts = {kinds[index]: index for index in reversed(stay)}
    return [index for index in stay if index not in firsts.values()]


def remove_attention(model: nn.Module, layer: nn.Module) -> None:
    """Take the attention of one of `model`'s blocks out, in place."""
    from cfsp.models.remote_code.modeling_pruned import leave_out_attention

    leave_out_attention(layer, spec_for(model.config).attention_norms)
