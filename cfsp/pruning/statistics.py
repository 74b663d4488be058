"""What calibration reads of a model: coarse scores of blocks, norms of channels, squares of every Linear's inputs.

A block is run over all windows before the next one, so that memory holds the hidden states of one depth
(nsamples x seqlen x hidden_size) and the sums of one block. Notation: block l, tokens t = 1..T, h_in and h_out the
block's input and output (T x hidden_size), X (T x intermediate_size) the input of down_proj.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

from cfsp.devices import CPU, exact_sum, exact_zeros
from cfsp.errors import InputError
from cfsp.models.architectures import block_linears, decoder_layers, feed_forward
from cfsp.models.offload import StoredStates, at_hand, enter_blocks, may_keep_states, run_layer, run_windows
from cfsp.precision import bulk_products
from cfsp.progress import Progress, no_progress

MOMENT_WINDOWS = 16
"""Windows behind the activation moments that quantizers use; more does not change what they choose."""


class BlockStatistics(NamedTuple):
    """What one pass knows about every block."""

    importance: torch.Tensor  # I_l, (num_hidden_layers,) float64
    norms: tuple[torch.Tensor, ...]  # ||X_i|| / sqrt(T) of every block, (intermediate_size,) float64 each
    n_tokens: int  # T
    states: StoredStates | None = None  # what every block gives, if that was asked for and could be kept


def collect_statistics(
    model: Any, input_ids: torch.Tensor, *, keep_states: bool = False, progress: Progress = no_progress
) -> BlockStatistics:
    """Run calibration windows (nsamples, seqlen) int64 through every block once.

    I_l is the mean over tokens of arccos(cos(h_in, h_out)) / pi (method 1). The model is in eval mode, and unchanged.
    `keep_states` spares the repair a pass: what every block gives is kept in files, if these leave room for others.
    Raises InputError: an activation is not finite, or the disk is full.
    """
    importance, norms = [], []
    n_tokens = input_ids.numel()
    layers = decoder_layers(model)
    with torch.inference_mode():
        hidden, calls = enter_blocks(model, layers, input_ids)
        states = None
        # A GPU computes states sooner than a disk gives them. What blocks leave for later ones is not in them.
        if keep_states and model.device == CPU and not calls.shared:
            n_bytes = len(layers) * sum(state.nbytes for state in hidden)
            n_weights = sum(parameter.numel() for parameter in model.parameters())
            states = StoredStates() if may_keep_states(n_bytes, n_weights) else None
        for index, layer in enumerate(layers):
            ffn, distance = feed_forward(model, layer), 0.0
            squares = exact_zeros(ffn.width, device=model.device)

            def add(x: torch.Tensor, squares: torch.Tensor = squares) -> None:
                squares += sums_of_squares(x.detach().reshape(-1, x.shape[-1]).float())

            with at_hand(layer), input_hook(ffn.down, add):
                for window, h_in in enumerate(hidden):
                    hidden[window] = run_layer(layer, h_in, calls.of(index, window))
                    cosine = F.cosine_similarity(h_in.float(), hidden[window].float(), dim=-1)
                    # Rounding can push a cosine past 1. Of several hidden states of a token the mean counts.
                    angles = cosine.clamp(-1, 1).arccos() / torch.pi
                    distance += float(exact_sum(angles.flatten(0, -2).mean(0)))
            importance.append(distance / n_tokens)
            if not bool(torch.isfinite(squares).all()):
                raise InputError(
                    f"activations of block {index} are not finite; check the weights and their dtype"
                )
            norms.append((squares / n_tokens).sqrt())
            if states is not None:
                states.put(index + 1, hidden)
            progress("calibrating", index + 1, len(layers))
    found = torch.tensor(importance, dtype=torch.float64)
    return BlockStatistics(found, tuple(norms), n_tokens, states)


def moment_windows(input_ids: torch.Tensor) -> torch.Tensor:
    """The calibration windows that activation moments are measured on."""
    return spread_windows(input_ids, MOMENT_WINDOWS)


def spread_windows(input_ids: torch.Tensor, count: int | None) -> torch.Tensor:
    """At most `count` of the windows (None: all), evenly spaced, so that each source keeps its share."""
    total = len(input_ids)
    if count is None or count >= total:
        return input_ids
    return input_ids[[index * total // count for index in range(count)]]


def collect_input_moments(
    model: Any, input_ids: torch.Tensor, *, progress: Progress = no_progress
) -> dict[str, torch.Tensor]:
    """Mean squared input of every Linear in the blocks: module name -> (in_features,) float32.

    llama.cpp calls it an importance matrix; `input_ids` are (nsamples, seqlen) int64.
    """
    sums: dict[str, torch.Tensor] = {}
    read = squares = torch.empty(0)

    def add(name: str, x: torch.Tensor) -> None:
        nonlocal read, squares
        if x is not read:  # q, k and v read one tensor, gate and up another
            read, squares = x, sums_of_squares(x.detach().reshape(-1, x.shape[-1]).float())
        sums[name] = sums[name] + squares if name in sums else squares

    layers, linears = decoder_layers(model), block_linears(model)
    with torch.inference_mode(), bulk_products(model.device.type):
        hidden, calls = enter_blocks(model, layers, input_ids)
        for index, layer in enumerate(layers):
            with at_hand(layer), ExitStack() as stack:
                for name, linear in linears[index].items():
                    stack.enter_context(input_hook(linear, partial(add, name)))
                hidden = run_windows(layer, index, hidden, calls)
            progress("measuring activations", index + 1, len(layers))
    return {name: (total / input_ids.numel()).float().cpu() for name, total in sums.items()}


def sums_of_squares(x: torch.Tensor) -> torch.Tensor:
    """Each channel's sum over the tokens of (tokens, channels) float32, (channels,) float64."""
    return exact_sum(x.square(), 0)


def output_hook(linear: nn.Linear, receive: Callable[[torch.Tensor, torch.Tensor], None]) -> RemovableHandle:
    """Hand a Linear's input and output to `receive` each time it has run."""
    return linear.register_forward_hook(lambda _, args, output: receive(args[0], output))


def input_hook(module: nn.Module, receive: Callable[[torch.Tensor], None]) -> RemovableHandle:
    """Hand a module's input to `receive` each time it runs."""
    return module.register_forward_pre_hook(lambda _, args: receive(args[0]))


def gradient_hook(
    linear: nn.Linear, receive: Callable[[torch.Tensor, torch.Tensor], None]
) -> RemovableHandle:
    """Hand a Linear's input and the gradient at its output, (tokens, features) float32, to `receive`."""

    def watch(x: torch.Tensor, output: torch.Tensor) -> None:
        if not output.requires_grad:
            return
        kept = x.detach()

        def add(gradient: torch.Tensor) -> None:
            g = gradient.detach().reshape(-1, gradient.shape[-1]).float()
            receive(kept.reshape(len(g), -1).float(), g)

        output.register_hook(add)  # type: ignore[no-untyped-call]

    return output_hook(linear, watch)
