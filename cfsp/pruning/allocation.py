"""How many FFN channels each block keeps: from coarse importances to integer widths.

p is the pruned share of FFN channels over all blocks (not of all parameters).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

from cfsp.errors import InputError
from cfsp.pruning.settings import PruneSettings

_PAPER_SCALE = 128 * 1024 / 1e4
"""The released code sums I_l over 128 x 1024 tokens and divides by 1e4; with the mean this factor remains."""


def cfsp_keep_ratios(importance: torch.Tensor, prune_ratio: float, strength: float) -> torch.Tensor:
    """CFSP's coarse allocation (method 1 and 2).

    s_l = sigmoid(a (128 * 1024 / 1e4) (I_l - mean I)),  keep_l = (1 - p) s_l / mean s. Where a block would keep
    all of its channels or more, all deviations from the mean are shrunk by one factor, as the released code does.

    Args:
        importance: (num_hidden_layers,) I_l, averaged over tokens.
        prune_ratio: p in [0, 1).
        strength: a; 1 is the paper's setting, 0 is uniform.

    Returns:
        (num_hidden_layers,) float64 with mean 1 - p, each below 1 unless p is 0.
    """
    centred = importance.double() - importance.double().mean()
    s = torch.sigmoid(strength * _PAPER_SCALE * centred)
    keep = 1 - prune_ratio
    relative = s / s.mean()
    if float(relative.max()) * keep >= 1 and float(relative.max()) > 1:
        shrink = (1 / keep - 1) / (float(relative.max()) - 1) / 1.05
        relative = 1 + (relative - 1) * shrink
    return keep * relative


def uniform_keep_ratios(importance: torch.Tensor, prune_ratio: float, strength: float) -> torch.Tensor:
    """The same share of every block."""
    return torch.full((len(importance),), 1 - prune_ratio, dtype=torch.float64)


ALLOCATIONS: Mapping[str, Callable[[torch.Tensor, float, float], torch.Tensor]] = MappingProxyType(
    {"cfsp": cfsp_keep_ratios, "uniform": uniform_keep_ratios}
)
"""From importances, prune ratio and strength to (num_hidden_layers,) shares of channels kept."""


def allocate_widths(
    importance: torch.Tensor,
    dense_widths: Sequence[int],
    settings: PruneSettings,
    gone: frozenset[int] = frozenset(),
) -> tuple[int, ...]:
    """Integer widths of all blocks, each a multiple of `align`; pruning nothing gives the dense widths.

    Blocks that go whole have width 0, and the others meet the ratio among them.

    Raises:
        InputError: An alignment that cannot meet the ratio, or blocks that differ where all get one width.
    """
    if gone:
        stay = [index for index in range(len(dense_widths)) if index not in gone]
        found = allocate_widths(importance[stay], [dense_widths[index] for index in stay], settings)
        widths = dict(zip(stay, found, strict=True))
        return tuple(widths.get(index, 0) for index in range(len(dense_widths)))
    ratio, align = settings.prune_ratio, settings.align
    if ratio == 0:
        return tuple(dense_widths)
    if settings.uniform_width:
        if len(set(dense_widths)) != 1:
            raise InputError("one width for all blocks needs a model whose blocks are equally wide")
        width = round((1 - ratio) * dense_widths[0] / align) * align
        if not 0 < width <= dense_widths[0]:
            raise InputError(
                "no uniform width meets the ratio with this alignment", field="align", value=align
            )
        return (width,) * len(dense_widths)
    keep = ALLOCATIONS[settings.allocation](importance, ratio, settings.strength)
    wanted = keep * torch.tensor(dense_widths, dtype=torch.float64)
    return integer_widths(wanted.tolist(), dense_widths, total=(1 - ratio) * sum(dense_widths), align=align)


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
