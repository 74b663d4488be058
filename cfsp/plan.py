"""What to prune, decided once and written down: the PruningPlan.

`make_plan` decides, `apply_plan` changes the model. A plan ranks all channels of every block, so that it can be
re-allocated to another ratio without another calibration (`at_ratio`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from cfsp.allocation import allocate_widths, check_allocation
from cfsp.architectures import decoder_layers, feed_forward, ffn_widths, spec_for
from cfsp.errors import InputError
from cfsp.progress import Progress, no_progress
from cfsp.reconstruction import reconstruct_down
from cfsp.scoring import SCORES, score_channels
from cfsp.statistics import COARSE_METRICS, BlockStatistics, GramStore
from cfsp.surgery import cut_channels, set_config_widths

__all__ = ["BlockPlan", "PruneSettings", "PruningPlan", "ScoreSummary", "apply_plan", "make_plan"]


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
        reconstruct: Whether down_proj is solved anew for the kept channels.
        ridge: Ridge of that solution, relative to the mean of the Gram matrix's diagonal.
    """

    prune_ratio: float = 0.2
    coarse_metric: str = "angular"
    allocation: str = "cfsp"
    strength: float = 1.0
    score: str = "activation_norm"
    align: int = 32
    uniform_width: bool = False
    reconstruct: bool = True
    ridge: float = 1e-3


@dataclass(frozen=True)
class ScoreSummary:
    """Scores of one block: extremes, median, and the share of their sum that the kept channels hold."""

    minimum: float
    median: float
    maximum: float
    kept_share: float


@dataclass(frozen=True)
class BlockPlan:
    """One block's part of a plan.

    Attributes:
        width: Number of channels kept.
        importance: Coarse importance of the block.
        ranking: All channel indices, best first; the first `width` are kept.
        scores: Summary of the scores behind the ranking.
    """

    width: int
    importance: float
    ranking: tuple[int, ...]
    scores: ScoreSummary

    @property
    def kept(self) -> tuple[int, ...]:
        """Indices of the kept channels, ascending."""
        return tuple(sorted(self.ranking[: self.width]))


@dataclass(frozen=True)
class PruningPlan:
    """Which channels of which model are kept, and why.

    Attributes:
        model_type: Row of the architecture table.
        source: Model reference the plan was made for.
        source_sha256: Hash of that model, where known.
        calibration: References of the calibration text.
        calibration_sha256: Hash of the calibration token ids.
        calibration_tokens: Their number.
        seed: Seed of calibration.
        settings: How the plan was made.
        dense_widths: intermediate_size of each block before pruning.
        blocks: One entry a block.
    """

    KIND: ClassVar[str] = "pruning_plan"
    SCHEMA_VERSION: ClassVar[int] = 1

    model_type: str
    source: str
    source_sha256: str | None
    calibration: tuple[str, ...]
    calibration_sha256: str
    calibration_tokens: int
    seed: int
    settings: PruneSettings
    dense_widths: tuple[int, ...]
    blocks: tuple[BlockPlan, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Kept width of each block."""
        return tuple(block.width for block in self.blocks)

    @property
    def keep_ratio(self) -> float:
        """Realized share of FFN channels kept."""
        return sum(self.widths) / sum(self.dense_widths)

    def at_ratio(self, prune_ratio: float) -> PruningPlan:
        """The same importances and rankings at another ratio; score summaries keep their first `kept_share`."""
        settings = replace(self.settings, prune_ratio=prune_ratio)
        importance = torch.tensor([block.importance for block in self.blocks], dtype=torch.float64)
        widths = _widths(importance, self.dense_widths, settings)
        blocks = tuple(replace(b, width=w) for b, w in zip(self.blocks, widths, strict=True))
        return replace(self, settings=settings, blocks=blocks)


def make_plan(
    model: Any,
    statistics: BlockStatistics,
    settings: PruneSettings,
    *,
    source: str,
    source_sha256: str | None,
    calibration: Sequence[str],
    calibration_sha256: str,
    seed: int,
) -> PruningPlan:
    """Decide which channels every block keeps; the model is not changed.

    Args:
        model: The dense model the statistics belong to.
        statistics: Of one pass over the calibration text.
        settings: How to prune.
        source: Model reference, for the record.
        source_sha256: Hash of the model, for the record.
        calibration: Text references, for the record.
        calibration_sha256: Hash of the calibration tokens, for the record.
        seed: Calibration's seed, for the record.

    Raises:
        InputError: An unknown name or a value out of range in the settings.
    """
    check_settings(settings)
    importance = statistics.importance[settings.coarse_metric]
    dense_widths = ffn_widths(model)
    widths = _widths(importance, dense_widths, settings)
    blocks = []
    for index, layer in enumerate(decoder_layers(model)):
        scores = score_channels(settings.score, feed_forward(model, layer), statistics.channels[index])
        blocks.append(_block_plan(scores, widths[index], float(importance[index])))
    return PruningPlan(
        model_type=spec_for(model.config).model_type,
        source=source,
        source_sha256=source_sha256,
        calibration=tuple(calibration),
        calibration_sha256=calibration_sha256,
        calibration_tokens=statistics.n_tokens,
        seed=seed,
        settings=settings,
        dense_widths=dense_widths,
        blocks=tuple(blocks),
    )


def apply_plan(
    model: Any, plan: PruningPlan, *, grams: GramStore | None = None, progress: Progress = no_progress
) -> None:
    """Cut the model to the plan, in place.

    Blocks that keep all of their channels are left untouched, so a ratio of 0 changes nothing.

    Args:
        model: The dense model the plan was made for.
        plan: What to keep.
        grams: Gram matrices for reconstruction; needed when the plan's settings ask for it.
        progress: Told after each block.

    Raises:
        InputError: The plan belongs to another model, or reconstruction is asked for without Gram matrices.
    """
    check_plan_fits(model, plan)
    pruned = plan.widths != plan.dense_widths
    if pruned and plan.settings.reconstruct and grams is None:
        raise InputError("the plan asks for reconstruction, which needs calibration statistics")
    with torch.no_grad():
        for index, (layer, block) in enumerate(zip(decoder_layers(model), plan.blocks, strict=True)):
            ffn = feed_forward(model, layer)
            if block.width < ffn.width:
                kept = torch.tensor(block.kept)
                down = None
                if plan.settings.reconstruct and grams is not None:
                    down = reconstruct_down(ffn.down.weight, grams.get(index), kept, plan.settings.ridge)
                cut_channels(ffn, kept, down)
            progress("pruning", index + 1, len(plan.blocks))
    set_config_widths(model)


def check_settings(settings: PruneSettings) -> None:
    """Raise InputError for an unknown name or a value out of range; needs no model."""
    tables = {"score": SCORES, "coarse_metric": COARSE_METRICS}
    for name, table in tables.items():
        value = getattr(settings, name)
        if value not in table:
            raise InputError(f"unknown {name}", field=name, value=value, allowed=", ".join(table))
    if not settings.ridge > 0:
        raise InputError("out of range", field="ridge", value=settings.ridge, allowed="above 0")
    check_allocation(settings.prune_ratio, settings.allocation, settings.align)


def check_plan_fits(model: Any, plan: PruningPlan) -> None:
    """Raise InputError unless the plan was made for a model of this type and these widths."""
    model_type = spec_for(model.config).model_type
    if model_type != plan.model_type or ffn_widths(model) != plan.dense_widths:
        raise InputError(
            f"the plan was made for another model ({plan.source}, {plan.model_type}, "
            f"{len(plan.dense_widths)} blocks), not for this {model_type} of {len(ffn_widths(model))} blocks"
        )
    for index, (block, dense) in enumerate(zip(plan.blocks, plan.dense_widths, strict=True)):
        if sorted(block.ranking) != list(range(dense)) or not 0 < block.width <= dense:
            raise InputError(f"the plan's block {index} does not rank its {dense} channels once each")


def _widths(
    importance: torch.Tensor, dense_widths: Sequence[int], settings: PruneSettings
) -> tuple[int, ...]:
    return allocate_widths(
        importance,
        dense_widths,
        prune_ratio=settings.prune_ratio,
        allocation=settings.allocation,
        strength=settings.strength,
        align=settings.align,
        uniform_width=settings.uniform_width,
    )


def _block_plan(scores: torch.Tensor, width: int, importance: float) -> BlockPlan:
    order = torch.argsort(scores, descending=True, stable=True)
    total = float(scores.sum())
    share = float(scores[order[:width]].sum()) / total if total > 0 else 1.0
    summary = ScoreSummary(float(scores.min()), float(scores.median()), float(scores.max()), share)
    return BlockPlan(width, importance, tuple(order.tolist()), summary)
