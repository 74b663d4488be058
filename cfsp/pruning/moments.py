"""Activation moments, which quantizers use: what llama.cpp calls an importance matrix."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from cfsp.devices import exact
from cfsp.models.architectures import block_linears, decoder_layers
from cfsp.models.block_pass import enter_blocks, run_windows
from cfsp.models.offload import at_hand
from cfsp.processes import mine, number_summed, summed
from cfsp.progress import Progress, no_progress
from cfsp.pruning.streaming import input_hook

MOMENT_WINDOWS = 16
"""Windows behind the activation moments that quantizers use; more does not change what they choose."""


def moment_windows(input_ids: torch.Tensor) -> torch.Tensor:
    """The calibration windows that activation moments are measured on."""
    return spread_windows(input_ids, MOMENT_WINDOWS)


def spread_windows(input_ids: torch.Tensor, count: int | None) -> torch.Tensor:
    """At most `count` of the windows, spread so that every source is among them; all where there is no count."""
    if count is None:
        return input_ids
    step = max(1, len(input_ids) // count)
    return input_ids[::step][:count]


def collect_input_moments(
    model: Any, input_ids: torch.Tensor, *, progress: Progress = no_progress
) -> dict[str, torch.Tensor]:
    """Mean squared input of every Linear inside the blocks.

    Args:
        model: A causal LM of the architecture table.
        input_ids: (nsamples, seqlen) int64.
        progress: Told after each block.

    Returns:
        Module name -> (in_features,) float32; what llama.cpp calls an importance matrix.
    """
    sums: dict[str, torch.Tensor] = {}
    windows = mine(input_ids)

    def add(name: str, x: torch.Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1]).float()
        total = sums_of_squares(x)
        sums[name] = sums[name] + total if name in sums else total

    layers, linears = decoder_layers(model), block_linears(model)
    with torch.inference_mode():
        hidden, calls = enter_blocks(model, layers, windows)
        for index, layer in enumerate(layers):
            with at_hand(layer), ExitStack() as stack:
                for name, linear in linears[index].items():
                    stack.enter_context(input_hook(linear, partial(add, name)))
                hidden = run_windows(layer, index, hidden, calls)
            progress("measuring activations", index + 1, len(layers))
    n_tokens = number_summed(windows.numel())
    return {name: (summed(total) / n_tokens).float().cpu() for name, total in sums.items()}


def sums_of_squares(x: torch.Tensor) -> torch.Tensor:
    """Of (tokens, channels) float32 each channel's sum over the tokens, (channels,) float64."""
    channels = x.T.contiguous()
    return exact(torch.bmm(channels[:, None, :], channels[:, :, None]).flatten())
