"""Fine scores: how much each FFN channel of one block counts. Tensors in, one tensor out; a higher score means: keep.

Channel i is row i of gate_proj (G) and up_proj (U), both (m, d), together with column i of down_proj (D), (d, m).
X (T x m) is down_proj's input; ||X_i|| is taken as the root mean square over tokens, which orders channels as the
norm does and does not depend on the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from cfsp.devices import exact
from cfsp.errors import InputError, look_up
from cfsp.models.architectures import FeedForward


def activation_norm(ffn: FeedForward, norm: torch.Tensor) -> torch.Tensor:
    """||X_i||: what the released CFSP code computes once its weight terms cancel (method 3)."""
    return norm


def cfsp(ffn: FeedForward, norm: torch.Tensor) -> torch.Tensor:
    """Relative weights times activations, CFSP eq. 8, each weight relative to its peers ACROSS channels.

    S_i = (mean_j |D_ji| / sum_k |D_jk| + mean_j |G_ij| / sum_k |G_kj| + mean_j |U_ij| / sum_k |U_kj|) ||X_i||
    """
    down, gate, up = (exact(w.weight.abs()) for w in (ffn.down, ffn.gate, ffn.up))
    tiny = torch.finfo(down.dtype).tiny
    relative = (down / down.sum(1, keepdim=True).clamp_min(tiny)).mean(0)
    for matrix in (gate, up):
        relative = relative + (matrix / matrix.sum(0, keepdim=True).clamp_min(tiny)).mean(1)
    return relative * norm


SCORES: Mapping[str, Callable[[FeedForward, torch.Tensor], torch.Tensor]] = MappingProxyType(
    {"activation_norm": activation_norm, "cfsp": cfsp}
)
"""From a block's weights and ||X_i||, (m,) float64, to scores (m,)."""


def score_channels(name: str, ffn: FeedForward, norm: torch.Tensor) -> torch.Tensor:
    """Scores (m,) float64 of one block's channels.

    Raises:
        InputError: Unknown score, or scores that are not finite.
    """
    score = look_up(SCORES, name, "unknown score", field="score")
    with torch.no_grad():
        scores = exact(score(ffn, norm))
    if not bool(torch.isfinite(scores).all()):
        raise InputError(f"score {name} is not finite; weights or activations hold NaN or infinity")
    return scores
