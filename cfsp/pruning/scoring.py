"""Scores of FFN channels inside one block: tensors in, one tensor out.

Channel i is row i of gate_proj (G) and up_proj (U), both (m, d), together with column i of down_proj (D), (d, m).
X (T x m) is down_proj's input; ||X_i|| is taken as the root mean square over tokens, which orders channels as the
norm does and does not depend on the number of tokens. A higher score means: keep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from cfsp.devices import exact
from cfsp.errors import InputError, look_up
from cfsp.models.architectures import FeedForward
from cfsp.pruning.statistics import ChannelStatistics


def activation_norm(ffn: FeedForward, x: ChannelStatistics) -> torch.Tensor:
    """||X_i||: what the released CFSP code computes once its weight terms cancel (method 3)."""
    return x.norm


def cfsp(ffn: FeedForward, x: ChannelStatistics) -> torch.Tensor:
    """Relative weights times activations, CFSP eq. 8, each weight relative to its peers ACROSS channels.

    S_i = (mean_j |D_ji| / sum_k |D_jk| + mean_j |G_ij| / sum_k |G_kj| + mean_j |U_ij| / sum_k |U_kj|) ||X_i||
    """
    down, gate, up = (exact(w.weight.abs()) for w in (ffn.down, ffn.gate, ffn.up))
    tiny = torch.finfo(down.dtype).tiny
    relative = (down / down.sum(1, keepdim=True).clamp_min(tiny)).mean(0)
    for matrix in (gate, up):
        relative = relative + (matrix / matrix.sum(0, keepdim=True).clamp_min(tiny)).mean(1)
    return relative * x.norm


def wanda_sp(ffn: FeedForward, x: ChannelStatistics) -> torch.Tensor:
    """sum_j |D_ji| ||X_i||: Wanda's metric summed over a channel (Wanda-sp, An et al., FLAP, AAAI 2024)."""
    return exact(ffn.down.weight.abs().sum(0)) * x.norm


def flap(ffn: FeedForward, x: ChannelStatistics) -> torch.Tensor:
    """var(X_i) ||D_:i||^2: FLAP's weighted fluctuation (An et al., AAAI 2024, eq. 6)."""
    return x.variance * exact(ffn.down.weight).square().sum(0)


def magnitude(ffn: FeedForward, x: ChannelStatistics) -> torch.Tensor:
    """||G_i:||^2 + ||U_i:||^2 + ||D_:i||^2: no activations at all."""
    gate, up, down = (exact(w.weight).square() for w in (ffn.gate, ffn.up, ffn.down))
    return gate.sum(1) + up.sum(1) + down.sum(0)


SCORES: Mapping[str, Callable[[FeedForward, ChannelStatistics], torch.Tensor]] = MappingProxyType(
    {
        "activation_norm": activation_norm,
        "cfsp": cfsp,
        "wanda_sp": wanda_sp,
        "flap": flap,
        "magnitude": magnitude,
    }
)
"""From a block's weights and moments to (intermediate_size,) scores; higher means keep."""


def score_channels(name: str, ffn: FeedForward, x: ChannelStatistics) -> torch.Tensor:
    """Scores (intermediate_size,) float64 of one block's channels.

    Raises:
        InputError: Unknown score, or scores that are not finite.
    """
    score = look_up(SCORES, name, "unknown score", field="score")
    with torch.no_grad():
        scores = exact(score(ffn, x))
    if not bool(torch.isfinite(scores).all()):
        raise InputError(f"score {name} is not finite; weights or activations hold NaN or infinity")
    return scores
