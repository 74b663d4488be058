"""Scores of FFN channels inside one block: tensors in, one tensor out.

Channel i is row i of gate_proj (G) and up_proj (U), both (m, d), together with column i of down_proj (D), (d, m).
X (T x m) is down_proj's input; ||X_i|| is taken as the root mean square over tokens, which orders channels as the
norm does and does not depend on the number of tokens. A higher score means: keep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import torch

from cfsp.devices import exact
from cfsp.errors import InputError, look_up
from cfsp.models.architectures import FeedForward
from cfsp.pruning.elimination import Elimination, eliminate_channels
from cfsp.pruning.gradients import ChannelGradients
from cfsp.pruning.rows import Row
from cfsp.pruning.statistics import BlockStatistics, ChannelStatistics


@dataclass(frozen=True)
class ChannelEvidence:
    """What is known about one block's channels; each score says what it reads.

    Attributes:
        ffn: The block's weights.
        statistics: Of all blocks.
        block: Which one of them.
    """

    ffn: FeedForward
    statistics: BlockStatistics
    block: int

    @property
    def channels(self) -> ChannelStatistics:
        """Moments of X."""
        return self.statistics.channels[self.block]

    @cached_property
    def gram(self) -> torch.Tensor:
        """H = X^T X / T, (m, m) float64; raises InputError where it was not collected."""
        if self.statistics.grams is None:
            raise InputError("this score needs Gram matrices, which were not collected")
        return self.statistics.grams.get(self.block, self.ffn.down.weight.device)

    @property
    def gradients(self) -> ChannelGradients:
        """Of the loss; raises InputError where they were not collected."""
        if self.statistics.gradients is None:
            raise InputError("this score needs gradients, which were not collected")
        return self.statistics.gradients[self.block]

    @cached_property
    def loss_elimination(self) -> Elimination:
        """The order in which channels go when an error counts as much as it changes the loss."""
        return eliminate_channels(self.gram, self.ffn.down.weight, self.gradients.output)


def activation_norm(evidence: ChannelEvidence) -> torch.Tensor:
    """||X_i||: what the released CFSP code computes once its weight terms cancel (method 3)."""
    return evidence.channels.norm


def cfsp(evidence: ChannelEvidence) -> torch.Tensor:
    """Relative weights times activations, CFSP eq. 8, each weight relative to its peers ACROSS channels.

    S_i = (mean_j |D_ji| / sum_k |D_jk| + mean_j |G_ij| / sum_k |G_kj| + mean_j |U_ij| / sum_k |U_kj|) ||X_i||
    """
    ffn = evidence.ffn
    down, gate, up = (exact(w.weight.abs()) for w in (ffn.down, ffn.gate, ffn.up))
    relative = (down / _nonzero(down.sum(1, keepdim=True))).mean(0)
    for matrix in (gate, up):
        relative = relative + (matrix / _nonzero(matrix.sum(0, keepdim=True))).mean(1)
    return relative * evidence.channels.norm


def wanda_sp(evidence: ChannelEvidence) -> torch.Tensor:
    """sum_j |D_ji| ||X_i||: Wanda's metric summed over a channel (Wanda-sp, An et al., FLAP, AAAI 2024)."""
    return exact(evidence.ffn.down.weight.abs().sum(0)) * evidence.channels.norm


def flap(evidence: ChannelEvidence) -> torch.Tensor:
    """var(X_i) ||D_:i||^2: FLAP's weighted fluctuation (An et al., AAAI 2024, eq. 6)."""
    return evidence.channels.variance * exact(evidence.ffn.down.weight).square().sum(0)


def magnitude(evidence: ChannelEvidence) -> torch.Tensor:
    """||G_i:||^2 + ||U_i:||^2 + ||D_:i||^2: no activations at all."""
    ffn = evidence.ffn
    gate, up, down = (exact(w.weight).square() for w in (ffn.gate, ffn.up, ffn.down))
    return gate.sum(1) + up.sum(1) + down.sum(0)


def taylor(evidence: ChannelEvidence) -> torch.Tensor:
    """mean_t |X_ti (D^T g_t)_i|: first-order change of the loss without the channel (Molchanov et al., ICLR 2017)."""
    return evidence.gradients.taylor


def fisher(evidence: ChannelEvidence) -> torch.Tensor:
    """mean_t (X_ti (D^T g_t)_i)^2 / 2: second-order change of the loss without the channel (Theis et al., 2018)."""
    return evidence.gradients.fisher / 2


def obs(evidence: ChannelEvidence) -> torch.Tensor:
    """Error of the block's solved output once the channel and all cheaper ones have gone (cfsp.pruning.elimination)."""
    return _when_gone(eliminate_channels(evidence.gram, evidence.ffn.down.weight))


def obs_loss(evidence: ChannelEvidence) -> torch.Tensor:
    """As `obs`, an error of the output counting as much as it changes the loss: G = E[g g^T] (K-FAC's factor)."""
    return _when_gone(evidence.loss_elimination)


SCORES: Mapping[str, Row[Callable[[ChannelEvidence], torch.Tensor]]] = MappingProxyType(
    {
        "activation_norm": Row(activation_norm),
        "cfsp": Row(cfsp),
        "wanda_sp": Row(wanda_sp),
        "flap": Row(flap),
        "magnitude": Row(magnitude),
        "taylor": Row(taylor, needs_gradients=True),
        "fisher": Row(fisher, needs_gradients=True),
        "obs": Row(obs, needs_gram=True),
        "obs_loss": Row(obs_loss, needs_gram=True, needs_gradients=True),
    }
)
"""From a block's evidence to (intermediate_size,) scores; higher means keep."""


def score_channels(name: str, evidence: ChannelEvidence) -> torch.Tensor:
    """Scores (intermediate_size,) float64 of one block's channels.

    Raises:
        InputError: Unknown score, evidence it needs is missing, or scores that are not finite.
    """
    row = look_up(SCORES, name, "unknown score", field="score")
    with torch.no_grad():
        scores = exact(row.function(evidence))
    if not bool(torch.isfinite(scores).all()):
        raise InputError(f"score {name} is not finite; weights or activations hold NaN or infinity")
    return scores


def _when_gone(elimination: Elimination) -> torch.Tensor:
    """By channel: the error once it has gone, which grows in the order of elimination."""
    total = elimination.cost.flip(0).cumsum(0).flip(0)
    return torch.empty_like(total).index_copy_(0, elimination.ranking, total)


def _nonzero(total: torch.Tensor) -> torch.Tensor:
    return total.clamp_min(torch.finfo(total.dtype).tiny)
