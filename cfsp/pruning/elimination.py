"""Which channels to remove when what is left is solved anew: the optimal brain surgeon, channel by channel.

Removing channel i and solving down_proj for the others raises the mean squared error of the block's output by
||W_i||_G^2 / [H^-1]_ii (Hassibi and Stork, NIPS 1992, for a column of weights at once), where H is the Gram matrix of
down_proj's input, W_i the channel's column as solved so far, and G how much an error of the output matters: the
identity, or K-FAC's gradient factor, with which the increase is one of the loss in nats a token.
Removing the cheapest again and again ranks all channels and predicts the error at every width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cfsp.devices import exact
from cfsp.pruning.reconstruction import damped_cholesky

_STEPS = 512


@dataclass(frozen=True)
class Elimination:
    """The order in which a block's channels go.

    Attributes:
        ranking: (intermediate_size,) channel indices, the last to go first.
        cost: (intermediate_size,) float64, the error that removing that channel adds when all behind it in the
            ranking have gone before; in the units of `metric` (half the squared error).
    """

    ranking: torch.Tensor
    cost: torch.Tensor

    def error_curve(self, n_segments: int) -> torch.Tensor:
        """(n_segments + 1,) error when 0, ..., all channels are kept, at evenly spaced widths."""
        left = torch.cat([self.cost.flip(0).cumsum(0).flip(0), self.cost.new_zeros(1)])
        width = torch.linspace(
            0, len(self.cost), n_segments + 1, dtype=self.cost.dtype, device=self.cost.device
        )
        below = width.floor().long()
        above = (below + 1).clamp(max=len(self.cost))
        return left[below] + (left[above] - left[below]) * (width - below)


def eliminate_channels(
    gram: torch.Tensor, weight: torch.Tensor, metric: torch.Tensor | None = None, *, ridge: float = 1e-3
) -> Elimination:
    """Remove all channels of a block, cheapest first, each time solving down_proj for those that are left.

    Channels go in about 512 steps of equal size; inside a step their interaction counts for the solution and for the
    step's total cost, not for the choice.

    Args:
        gram: H = X^T X / T, (intermediate_size, intermediate_size) float64.
        weight: W, (hidden_size, intermediate_size) of down_proj.
        metric: G, (hidden_size, hidden_size) positive semidefinite, or None for the identity.
        ridge: Relative to the mean of H's diagonal.

    Raises:
        InputError: H is not finite or cannot be inverted.
    """
    width = gram.shape[0]
    columns = exact(weight.detach())
    if metric is not None:
        columns = _square_root(exact(metric)) @ columns
    inverse = torch.cholesky_inverse(damped_cholesky(exact(gram).clone(), ridge))
    left = torch.arange(width, device=columns.device)
    order, cost = [], []
    per_step = max(1, width // _STEPS)
    while len(left):
        score = columns.square().sum(0) / inverse.diagonal()
        # Stable, so that equal scores go in the order of their indices on every machine.
        chosen, rest = score.argsort(stable=True).tensor_split([min(per_step, len(left))])
        rest = rest.sort().values
        going = torch.linalg.cholesky(inverse[chosen][:, chosen])
        order.append(left[chosen])
        cost.append(_shared(score[chosen], columns[:, chosen], going))
        across = torch.cholesky_solve(inverse[chosen][:, rest], going)
        columns = columns[:, rest] - columns[:, chosen] @ across
        inverse = inverse[rest][:, rest] - inverse[rest][:, chosen] @ across
        left = left[rest]
    return Elimination(torch.cat(order).flip(0), torch.cat(cost).flip(0))


def _shared(score: torch.Tensor, columns: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Half of tr(W_Q [H^-1]_QQ^-1 W_Q^T), what removing Q costs, shared out by the scores."""
    total = (columns.T * torch.cholesky_solve(columns.T, factor)).sum() / 2
    weights = score / score.sum() if float(score.sum()) > 0 else torch.full_like(score, 1 / len(score))
    return total * weights


def _square_root(metric: torch.Tensor) -> torch.Tensor:
    """A with A^T A = metric; gradients that never occur make the metric singular, so by eigenvalues."""
    values, vectors = torch.linalg.eigh(metric)
    root: torch.Tensor = values.clamp_min(0).sqrt()[:, None] * vectors.T
    return root
