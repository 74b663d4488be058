"""One forward pass over the calibration windows, block by block.

A block is run over all windows before the next one is touched, so that memory holds the hidden states of one
depth (nsamples x seqlen x hidden_size) and the sums of one block, never all blocks' activations. Everything
collected is a sum over tokens divided by their number.

Notation: block l, tokens t = 1..T, h_in and h_out the block's input and output (T x hidden_size),
X (T x intermediate_size) the input of down_proj.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F

from cfsp.devices import CPU, exact_sum, exact_zeros
from cfsp.errors import InputError
from cfsp.models.architectures import decoder_layers, feed_forward
from cfsp.models.block_pass import Calls, StoredStates, enter_blocks, run_layer
from cfsp.models.offload import at_hand, may_keep_states
from cfsp.processes import mine, number_summed, summed
from cfsp.progress import Progress, no_progress
from cfsp.pruning.moments import sums_of_squares
from cfsp.pruning.streaming import input_hook


@dataclass(frozen=True)
class ChannelStatistics:
    """Moments of down_proj's input.

    Attributes:
        mean: (intermediate_size,) mean of X_ti over tokens.
        mean_square: (intermediate_size,) mean of X_ti^2 over tokens.
    """

    mean: torch.Tensor
    mean_square: torch.Tensor

    @property
    def norm(self) -> torch.Tensor:
        """Root mean square, ||X_i|| / sqrt(T)."""
        return self.mean_square.sqrt()

    @property
    def variance(self) -> torch.Tensor:
        """Fluctuation of each channel around its mean."""
        return (self.mean_square - self.mean.square()).clamp_min(0)


@dataclass(frozen=True)
class DenseStream:
    """What every block gives, kept for whoever would run the model over the same windows once more.

    Attributes:
        windows: (nsamples, seqlen) int64, those of this process.
        states: Of every depth but 0.
    """

    windows: torch.Tensor
    states: StoredStates


@dataclass(frozen=True)
class BlockStatistics:
    """What one pass knows about every block.

    Attributes:
        importance: Coarse metric name -> (num_hidden_layers,) float64, one value a block.
        channels: Moments of down_proj's input, one entry a block.
        n_tokens: Number of tokens summed over.
        stream: What every block gives, where that was asked for and could be kept.
    """

    importance: dict[str, torch.Tensor]
    channels: tuple[ChannelStatistics, ...]
    n_tokens: int
    stream: DenseStream | None = None

    def stream_of(self, windows: torch.Tensor) -> StoredStates | None:
        """What every block gives for some windows, those of this process; None where that was not kept."""
        stream = self.stream
        return stream.states if stream is not None and torch.equal(windows, stream.windows) else None


COARSE_METRICS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = MappingProxyType(
    {
        # Rounding can push the cosine past 1, where arccos is NaN.
        "angular": lambda h_in, h_out: (
            F.cosine_similarity(h_in, h_out, dim=-1).clamp(-1, 1).arccos() / torch.pi
        ),
        "cosine": lambda h_in, h_out: 1 - F.cosine_similarity(h_in, h_out, dim=-1),
        "mse": lambda h_in, h_out: (h_out - h_in).square().mean(-1),
        "mae": lambda h_in, h_out: (h_out - h_in).abs().mean(-1),
    }
)
"""Importance of a block from its input and output, per token; `angular` is the paper's (method 1)."""


class _BlockSums:
    """Running sums of one block over windows."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.importance = dict.fromkeys(COARSE_METRICS, 0.0)
        self.x_sum, self.x_square = (exact_zeros(width, device=device) for _ in range(2))

    def add_channels(self, x: torch.Tensor) -> None:
        """Add X of one window; `x` is (..., intermediate_size)."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        self.x_sum += exact_sum(x, 0)
        self.x_square += sums_of_squares(x)

    def add_block(self, h_in: torch.Tensor, h_out: torch.Tensor) -> None:
        """Add one window's coarse importances, of several hidden states their mean; (..., 1, seqlen, hidden_size)."""
        for name, metric in COARSE_METRICS.items():
            of_tokens = metric(h_in.float(), h_out.float()).flatten(0, -2).mean(0)
            self.importance[name] += float(exact_sum(of_tokens))

    def sum_up(self) -> None:
        """Let sums over this process's windows become those over all processes'."""
        self.importance = {name: number_summed(total) for name, total in self.importance.items()}
        for total in (self.x_sum, self.x_square):
            summed(total)


def collect_statistics(
    model: Any,
    input_ids: torch.Tensor,
    *,
    with_stream: bool = False,
    progress: Progress = no_progress,
) -> BlockStatistics:
    """Run the calibration windows through every block once.

    Args:
        model: A causal LM of the architecture table, in eval mode; unchanged.
        input_ids: (nsamples, seqlen) int64.
        with_stream: Whether to keep what every block gives, in files, where these leave room for others.
        progress: Told after each block.

    Raises:
        InputError: An activation is not finite.
    """
    importance: dict[str, list[float]] = {name: [] for name in COARSE_METRICS}
    channels = []
    windows = mine(input_ids)
    n_tokens = round(number_summed(windows.numel()))
    layers = decoder_layers(model)
    with torch.inference_mode():
        hidden, calls = enter_blocks(model, layers, windows)
        stream = _stream(model, windows, hidden, calls) if with_stream else None
        for index, layer in enumerate(layers):
            ffn = feed_forward(model, layer)
            sums = _BlockSums(ffn.width, model.device)
            with at_hand(layer), input_hook(ffn.down, sums.add_channels):
                for window, h_in in enumerate(hidden):
                    hidden[window] = run_layer(layer, h_in, calls.of(index, window))
                    sums.add_block(h_in, hidden[window])
            sums.sum_up()
            for name, total in sums.importance.items():
                importance[name].append(total / n_tokens)
            if not bool(torch.isfinite(sums.x_square).all()):
                raise InputError(
                    f"activations of block {index} are not finite; check the weights and their dtype"
                )
            channels.append(ChannelStatistics(sums.x_sum / n_tokens, sums.x_square / n_tokens))
            stream = _put(stream, index + 1, hidden)
            progress("calibrating", index + 1, len(layers))
    values = {name: torch.tensor(v, dtype=torch.float64) for name, v in importance.items()}
    return BlockStatistics(values, tuple(channels), input_ids.numel(), stream=stream)


def _stream(
    model: Any, windows: torch.Tensor, hidden: Sequence[torch.Tensor], calls: Calls
) -> DenseStream | None:
    """To keep what blocks give in; None where computing it again is as good, or needed.

    A GPU computes it sooner than a disk holds it. What blocks leave for later ones is not in hidden states.
    """
    n_bytes = len(decoder_layers(model)) * sum(state.nbytes for state in hidden)
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    if model.device == CPU and not calls.shared and may_keep_states(n_bytes, n_weights):
        with suppress(InputError):
            return DenseStream(windows, StoredStates())
    return None


def _put(stream: DenseStream | None, depth: int, hidden: Sequence[torch.Tensor]) -> DenseStream | None:
    """The stream with one depth more; None where the disk has become full: it is computed again then."""
    if stream is not None:
        with suppress(InputError):
            stream.states.put(depth, hidden)
            return stream
    return None
