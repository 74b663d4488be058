"""Scores of FFN channels inside one block: tensors in, one tensor out.

Channel i is row i of gate_proj (G) and up_proj (U), both (m, d), together with column i of down_proj (D), (d, m).
X (T x m) is down_proj's input; ||X_i|| is taken as the root mean square over tokens, which orders channels as the
norm does and does not depend on the number of tokens. A higher score means: keep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from cfsp.architectures import FeedForward
from cfsp.errors import InputError
from cfsp.statistics import ChannelStatistics

__all__ = ["SCORES", "score_channels"]


def activation_norm(ffn: FeedForward, channels: ChannelStatistics) -> torch.Tensor:
    """||X_i||: what the released CFSP code computes once its weight terms cancel (method 3)."""
    return channels.norm


def cfsp(ffn: FeedForward, channels: ChannelStatistics) -> torch.Tensor:
    """Relative weights times activations, CFSP eq. 8, each weight relative to its peers ACROSS channels.

    S_i = (mean_j |D_ji| / sum_k |D_jk| + mean_j |G_ij| / sum_k |G_kj| + mean_j |U_ij| / sum_k |U_kj|) ||X_i||
    """
    down, gate, up = (w.weight.abs().double() for w in (ffn.down, ffn.gate, ffn.up))
    relative = (down / _nonzero(down.sum(1, keepdim=True))).mean(0)
    for matrix in (gate, up):
        relative = relative + (matrix / _nonzero(matrix.sum(0, keepdim=True))).mean(1)
    return relative * channels.norm


def wanda_sp(ffn: FeedForward, channels: ChannelStatistics) -> torch.Tensor:
    """sum_j |D_ji| ||X_i||: Wanda's metric summed over a channel (Wanda-sp, An et al., FLAP, AAAI 2024)."""
    return ffn.down.weight.abs().sum(0).double() * channels.norm


def flap(ffn: FeedForward, channels: ChannelStatistics) -> torch.Tensor:
    """var(X_i) ||D_:i||^2: FLAP's weighted fluctuation (An et al., AAAI 2024, eq. 6)."""
    return channels.variance * ffn.down.weight.double().square().sum(0)


def magnitude(ffn: FeedForward, channels: ChannelStatistics) -> torch.Tensor:
    """||G_i:||^2 + ||U_i:||^2 + ||D_:i||^2: no activations at all."""
    gate, up, down = (w.weight.double().square() for w in (ffn.gate, ffn.up, ffn.down))
    return gate.sum(1) + up.sum(1) + down.sum(0)


SCORES: Mapping[str, Callable[[FeedForward, ChannelStatistics], torch.Tensor]] = MappingProxyType(
    {f.__name__: f for f in (activation_norm, cfsp, wanda_sp, flap, magnitude)}
)


def score_channels(name: str, ffn: FeedForward, channels: ChannelStatistics) -> torch.Tensor:
    """Scores (intermediate_size,) float64 of one block's channels.

    Raises:
        InputError: Unknown score, or scores that are not finite.
    """
    if name not in SCORES:
        raise InputError("unknown score", field="score", value=name, allowed=", ".join(SCORES))
    with torch.no_grad():
        scores = SCORES[name](ffn, channels).double()
    if not bool(torch.isfinite(scores).all()):
        raise InputError(f"score {name} is not finite; weights or activations hold NaN or infinity")
    return scores


def _nonzero(total: torch.Tensor) -> torch.Tensor:
    return total.clamp_min(torch.finfo(total.dtype).tiny)
