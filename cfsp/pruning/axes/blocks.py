"""Whole blocks as an axis of pruning: those go that the model misses least, and the block before takes their work over.

What a block is worth is measured: the divergence in nats a token between the logits of the model and those it gives
without the block, on a few calibration windows. Blocks are taken one at a time, each the cheapest beside those that are
gone already. The first block stays, as nothing before it could make up for it.

What the removed blocks added to the residual stream is then fitted by down_proj of the block before them, solved anew
(cfsp/pruning/block_by_block.py). ReplaceMe (arXiv 2505.02819) folds a linear map T of the FFN's output into it, which
changes down_proj to T down_proj; solved for down_proj itself the change may be any matrix, in closed form as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cfsp.errors import InputError
from cfsp.models.architectures import decoder_layers
from cfsp.progress import Progress, no_progress
from cfsp.pruning.streaming import enter_blocks, run_layer

_EVERY = 4
"""Logits are compared at every fourth position: the output matrix costs as much as many blocks."""
_TRIED = 12
"""Blocks that are tried again once some are gone: the cheapest of the first round."""


@dataclass(frozen=True)
class DepthPlan:
    """Which whole blocks go, and what they are worth.

    Attributes:
        removed: Indices in the dense model, ascending.
        losses: Per block of the dense model the divergence where it alone is left out, nats a token; 0 of the first,
            which is not tried.
        loss: The same where all of `removed` are left out and nothing makes up for them.
        tokens: Tokens of the windows that this was measured on.
    """

    removed: tuple[int, ...]
    losses: tuple[float, ...]
    loss: float
    tokens: int


def plan_blocks(
    model: Any, input_ids: torch.Tensor, count: int, *, progress: Progress = no_progress
) -> DepthPlan:
    """Choose the blocks to remove.

    Args:
        model: The dense model, in eval mode; unchanged.
        input_ids: Windows (n_windows, seqlen) int64.
        count: Blocks to remove.
        progress: Told after each block that is chosen.

    Raises:
        InputError: More blocks than can go.
    """
    layers = decoder_layers(model)
    if not 0 < count < len(layers):
        raise InputError(
            "the first block stays", field="blocks", value=count, allowed=f"at most {len(layers) - 1}"
        )
    alone = losses = _losses_without(model, input_ids, range(1, len(layers)), ())
    removed: list[int] = []
    while True:
        removed.append(min(losses, key=lambda index: (losses[index], index)))
        progress("choosing blocks", len(removed), count)
        if len(removed) == count:
            every = tuple(alone.get(index, 0.0) for index in range(len(layers)))
            return DepthPlan(tuple(sorted(removed)), every, losses[removed[-1]], input_ids.numel())
        left = sorted(alone.keys() - set(removed), key=lambda index: alone[index])[:_TRIED]
        losses = _losses_without(model, input_ids, left, removed)


def remove_blocks(model: Any, gone: frozenset[int]) -> None:
    """Take blocks out of the model, in place; its configuration then says how many are left."""
    if not gone:
        return
    decoder, config = model.get_decoder(), model.config
    stay = [index for index in range(len(decoder.layers)) if index not in gone]
    decoder.layers = nn.ModuleList([decoder.layers[index] for index in stay])
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = index
    kinds = getattr(config, "layer_types", None)
    if kinds:
        config.layer_types = [kinds[index] for index in stay]
    config.num_hidden_layers = len(stay)


def _losses_without(
    model: Any, input_ids: torch.Tensor, candidates: Sequence[int], removed: Sequence[int]
) -> dict[int, float]:
    """KL(dense || without), mean nats a token, for every candidate left out beside `removed`."""
    layers = decoder_layers(model)
    sums = dict.fromkeys(candidates, 0.0)
    with torch.inference_mode():
        for window in torch.split(input_ids, 1):
            (hidden,), calls = enter_blocks(model, layers, window)
            expected = _log_probabilities(model, _run(layers, calls, 0, hidden))
            with _left_out([layers[index] for index in removed]):
                for index, layer in enumerate(layers):
                    if index in sums:
                        actual = _log_probabilities(model, _run(layers, calls, index + 1, hidden))
                        sums[index] += float((expected.exp() * (expected - actual)).sum(-1).mean())
                    hidden = run_layer(layer, hidden, calls[index])
    return {index: max(total / len(input_ids), 0.0) for index, total in sums.items()}


def _run(
    layers: Sequence[nn.Module], calls: Sequence[dict[str, Any]], start: int, hidden: torch.Tensor
) -> torch.Tensor:
    for layer, arguments in zip(layers[start:], calls[start:], strict=True):
        hidden = run_layer(layer, hidden, arguments)
    return hidden


def _log_probabilities(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    normed = model.get_decoder().norm(hidden[:, ::_EVERY])
    logits: torch.Tensor = model.get_output_embeddings()(normed).float()
    return logits.log_softmax(-1)


@contextmanager
def _left_out(layers: Sequence[Any]) -> Iterator[None]:
    """Blocks hand on what they get while the context is open."""
    for layer in layers:
        layer.forward = lambda hidden_states, **arguments: hidden_states
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
