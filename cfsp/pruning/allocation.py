"""How many FFN channels each block keeps: from coarse importances to integer widths.

p is the pruned share of FFN channels over all blocks (not of all parameters).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from cfsp.errors import InputError
from cfsp.pruning.rows import Row

_PAPER_SCALE = 128 * 1024 / 1e4
"""The released code sums I_l over 128 x 1024 tokens and divides by 1e4; with the mean this factor remains."""


@dataclass(frozen=True)
class BlockEvidence:
    """What an allocation may look at.

    Attributes:
        importance: (num_hidden_layers,) I_l, averaged over tokens.
        dense_widths: intermediate_size of every block.
        loss_curves: (num_hidden_layers, n_points) predicted loss in nats a token when the block keeps 0, ...,
            all of its channels, at evenly spaced widths; None where it was not measured.
    """

    importance: torch.Tensor
    dense_widths: Sequence[int]
    loss_curves: torch.Tensor | None = None


def cfsp_keep_ratios(evidence: BlockEvidence, prune_ratio: float, strength: float) -> torch.Tensor:
    """CFSP's coarse allocation (method 1 and 2).

    s_l = sigmoid(a (128 * 1024 / 1e4) (I_l - mean I)),  keep_l = (1 - p) s_l / mean s. Where a block would keep
    all of its channels or more, all deviations from the mean are shrunk by one factor, as the released code does.

    Args:
        evidence: Importances.
        prune_ratio: p in [0, 1).
        strength: a; 1 is the paper's setting, 0 is uniform.

    Returns:
        (num_hidden_layers,) float64 with mean 1 - p, each below 1 unless p is 0.
    """
    centred = evidence.importance.double() - evidence.importance.double().mean()
    s = torch.sigmoid(strength * _PAPER_SCALE * centred)
    keep = 1 - prune_ratio
    relative = s / s.mean()
    if float(relative.max()) * keep >= 1 and float(relative.max()) > 1:
        shrink = (1 / keep - 1) / (float(relative.max()) - 1) / 1.05
        relative = 1 + (relative - 1) * shrink
    return keep * relative


def uniform_keep_ratios(evidence: BlockEvidence, prune_ratio: float, strength: float) -> torch.Tensor:
    """The same share of every block."""
    return torch.full((len(evidence.dense_widths),), 1 - prune_ratio, dtype=torch.float64)


def loss_keep_ratios(evidence: BlockEvidence, prune_ratio: float, strength: float) -> torch.Tensor:
    """The widths whose predicted losses have the least sum, as if blocks did not depend on each other.

    A loss curve that bends the right way is minimized by removing the cheapest channels of all blocks first, until
    the budget is met; where it does not, the cost of a channel counts as that of the dearest one that went before.

    Raises:
        InputError: No loss curves.
    """
    if evidence.loss_curves is None:
        raise InputError("this allocation needs loss curves, which come from gradients", field="allocation")
    curves = evidence.loss_curves.double()
    n_blocks, n_segments = curves.shape[0], curves.shape[1] - 1
    sizes = torch.tensor(evidence.dense_widths, dtype=torch.float64)[:, None] / n_segments
    # Ordered from the first channel to go to the last, so that costs rise along the row.
    costs = ((curves[:, :-1] - curves[:, 1:]) / sizes).flip(1).cummax(1).values
    order = costs.flatten().argsort(stable=True)
    removable = sizes.expand(n_blocks, n_segments).flatten()[order]
    budget = prune_ratio * float(removable.sum())
    taken = (budget - (removable.cumsum(0) - removable)).clamp(min=0).minimum(removable)
    removed = torch.zeros(n_blocks, dtype=torch.float64).index_add_(0, order // n_segments, taken)
    return 1 - removed / (sizes[:, 0] * n_segments)


def mixed_keep_ratios(evidence: BlockEvidence, prune_ratio: float, strength: float) -> torch.Tensor:
    """The mean of CFSP's keep ratios, which see how blocks act on the text, and of the predicted loss's."""
    pair = (cfsp_keep_ratios, loss_keep_ratios)
    return torch.stack([keep_ratios(evidence, prune_ratio, strength) for keep_ratios in pair]).mean(0)


ALLOCATIONS: Mapping[str, Row[Callable[[BlockEvidence, float, float], torch.Tensor]]] = MappingProxyType(
    {
        "cfsp": Row(cfsp_keep_ratios, reads_strength=True),
        "uniform": Row(uniform_keep_ratios),
        "loss": Row(loss_keep_ratios, needs_loss=True),
        "mixed": Row(mixed_keep_ratios, needs_loss=True, reads_strength=True),
    }
)
"""From evidence, prune ratio and strength to (num_hidden_layers,) shares of channels kept."""


def integer_widths(
    wanted: Sequence[float], dense_widths: Sequence[int], *, total: float, align: int
) -> tuple[int, ...]:
    """Round wanted widths to multiples of `align` whose sum is the nearest possible to `total`.

    Largest remainder: every block gets the whole units it asks for, the units left go one each to the blocks
    that were cut most. A block keeps at least one unit and never more than its dense width.

    Raises:
        InputError: The total cannot be met within half a unit.
    """
    units = round(total / align)
    floors = [width // align for width in dense_widths]
    if not len(floors) <= units <= sum(floors):
        low, high = len(floors) * align / sum(dense_widths), sum(floors) * align / sum(dense_widths)
        raise InputError(
            f"the prune ratio cannot be met with widths that are multiples of {align}",
            field="align",
            value=align,
            allowed=f"prune ratios from {1 - high:.4f} to {1 - low:.4f}, or a smaller alignment",
        )
    shares = [min(max(w / align, 1.0), float(f)) for w, f in zip(wanted, floors, strict=True)]
    counts = [int(share) for share in shares]
    while sum(counts) != units:
        step = 1 if sum(counts) < units else -1
        open_blocks = [i for i, c in enumerate(counts) if (c < floors[i] if step > 0 else c > 1)]
        chosen = max(open_blocks, key=lambda i: (step * (shares[i] - counts[i]), -i))
        counts[chosen] += step
    return tuple(count * align for count in counts)


def uniform_widths(dense_widths: Sequence[int], prune_ratio: float, align: int) -> tuple[int, ...]:
    """One width for all blocks, rounded to the nearest multiple of `align`; for targets that know no other.

    Raises:
        InputError: Blocks that differ, or an alignment that no width meets the ratio with.
    """
    if len(set(dense_widths)) != 1:
        raise InputError("one width for all blocks needs a model whose blocks are equally wide")
    dense = dense_widths[0]
    width = round((1 - prune_ratio) * dense / align) * align
    if not 0 < width <= dense:
        raise InputError("no uniform width meets the ratio with this alignment", field="align", value=align)
    return (width,) * len(dense_widths)
