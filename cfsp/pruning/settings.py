"""How to prune: one frozen set of settings, checked against the tables it names rows of."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from cfsp.errors import InputError
from cfsp.precision import DTYPES
from cfsp.pruning.allocation import ALLOCATIONS, check_allocation
from cfsp.pruning.cutting import RECONSTRUCTIONS
from cfsp.pruning.scoring import SCORES
from cfsp.pruning.statistics import COARSE_METRICS


@dataclass(frozen=True)
class PruneSettings:
    """How to prune; the defaults are what phoneready recommends.

    Attributes:
        prune_ratio: Share of FFN channels to remove over all blocks, in [0, 1).
        coarse_metric: Importance between blocks, a name in COARSE_METRICS.
        allocation: Widths from importances, a name in ALLOCATIONS.
        strength: CFSP's a.
        score: Importance inside a block, a name in SCORES.
        align: Every width is a multiple of this; set it from what will be exported.
        uniform_width: Give every block the same width.
        reconstruct: How down_proj is solved anew for the kept channels, a name in RECONSTRUCTIONS.
        ridge: Ridge of that solution, relative to the mean of the Gram matrix's diagonal.
        correction: Share of earlier blocks' error that a block takes back (block-by-block only), in [0, 1].
        dtype: Of the matrix products over calibration text, a name in `cfsp.precision.DTYPES`.
    """

    prune_ratio: float = 0.2
    coarse_metric: str = "angular"
    allocation: str = "cfsp"
    strength: float = 1.0
    score: str = "cfsp"
    align: int = 32
    uniform_width: bool = False
    reconstruct: str = "block-by-block"
    ridge: float = 1e-2
    correction: float = 0.4
    dtype: str = "auto"

    @property
    def plan_needs_gram(self) -> bool:
        """Whether the plan reads Gram matrices of the dense model."""
        return SCORES[self.score].needs_gram or self.needs_loss

    @property
    def needs_gram(self) -> bool:
        """Whether the plan or the reconstruction reads them."""
        return self.plan_needs_gram or RECONSTRUCTIONS[self.reconstruct].needs_gram

    @property
    def needs_gradients(self) -> bool:
        """Whether the plan reads gradients of the loss."""
        return SCORES[self.score].needs_gradients or self.needs_loss

    @property
    def needs_loss(self) -> bool:
        """Whether the loss at every width is predicted."""
        return ALLOCATIONS[self.allocation].needs_loss


def check_settings(settings: PruneSettings) -> None:
    """Raise InputError for an unknown name or a value out of range; needs no model."""
    tables: dict[str, Collection[str]] = {
        "score": SCORES,
        "coarse_metric": COARSE_METRICS,
        "allocation": ALLOCATIONS,
        "reconstruct": RECONSTRUCTIONS,
        "dtype": DTYPES,
    }
    for name, table in tables.items():
        value = getattr(settings, name)
        if value not in table:
            raise InputError(f"unknown {name}", field=name, value=value, allowed=", ".join(table))
    if not 0 <= settings.strength < math.inf:
        raise InputError("out of range", field="strength", value=settings.strength, allowed="0 or more")
    if not settings.ridge > 0:
        raise InputError("out of range", field="ridge", value=settings.ridge, allowed="above 0")
    if not 0 <= settings.correction <= 1:
        raise InputError("out of range", field="correction", value=settings.correction, allowed="0 to 1")
    check_allocation(settings.prune_ratio, settings.align)
