"""What to prune, decided once and written down: the PruningPlan.

`make_plan` decides, `apply_plan` (block_by_block.py) changes the model. A plan ranks all channels of every block, so
that it can be re-allocated to another ratio without another calibration (`at_ratio`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch

from cfsp.devices import CPU
from cfsp.errors import InputError
from cfsp.models.architectures import decoder_layers, feed_forward, model_shape, spec_for
from cfsp.models.families.row import MAX_SIZE
from cfsp.models.offload import at_hand
from cfsp.models.shape import ModelShape
from cfsp.models.source import LoadedModel
from cfsp.precision import rounding_dtype
from cfsp.pruning.allocation import allocate_widths
from cfsp.pruning.parts import GroupRemoval, Removal, removable_attentions
from cfsp.pruning.scoring import score_channels
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.statistics import BlockStatistics
from cfsp.pruning.vocabulary import VocabularyPlan
from cfsp.settings import check_settings
from cfsp.text.calibration import Calibration
from cfsp.validation import Seed, WhereSet


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
        width: Number of channels kept; 0 in a block that goes.
        importance: Coarse importance of the block.
        ranking: All channel indices, best first; the first `width` are kept.
        scores: Summary of the scores behind the ranking.
        loss_curve: Empty; a predicted loss in plans of earlier versions.
    """

    width: int
    importance: float
    ranking: tuple[int, ...]
    scores: ScoreSummary
    loss_curve: tuple[float, ...] = ()

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
        vocabulary: Which tokens are kept; None where all are.
        depth: Which whole blocks go; None where all stay.
        attention: Which blocks lose their attention; None where none does.
        kv_groups: Which key-value groups are kept; None where all of an attention that stays are.
        silent_before: Blocks of the model it was made for that did not attend.
        device: Kind of device that computed it; None for the CPU.
        warnings: What was asked for and has had no effect.
    """

    KIND: ClassVar[str] = "pruning_plan"
    SCHEMA_VERSION: ClassVar[int] = 3

    model_type: str
    source: str
    source_sha256: str | None
    calibration: tuple[str, ...]
    calibration_sha256: str
    calibration_tokens: int
    seed: Seed
    settings: PruneSettings
    dense_widths: tuple[int, ...]
    blocks: tuple[BlockPlan, ...]
    vocabulary: Annotated[VocabularyPlan | None, WhereSet] = None
    depth: Annotated[Removal | None, WhereSet] = None
    attention: Annotated[Removal | None, WhereSet] = None
    kv_groups: Annotated[GroupRemoval | None, WhereSet] = None
    silent_before: Annotated[tuple[int, ...], WhereSet] = ()
    device: Annotated[str | None, WhereSet] = None
    warnings: Annotated[tuple[str, ...], WhereSet] = ()

    def __post_init__(self) -> None:
        if not self.blocks or len(self.blocks) != len(self.dense_widths):
            raise InputError(
                "not one for each block",
                field="blocks",
                value=len(self.blocks),
                allowed=str(len(self.dense_widths)),
            )
        if not all(0 <= width <= MAX_SIZE for width in self.dense_widths):
            raise InputError("no width", field="dense_widths", value=max(self.dense_widths, key=abs))
        if self.kv_groups and len(self.kv_groups.kept) != len(self.blocks):
            raise InputError("not one for each block", field="kv_groups", value=len(self.kv_groups.kept))

    @property
    def dense_shape(self) -> ModelShape:
        """What the plan says of the model it was made for; of what it leaves alone, nothing."""
        shape = ModelShape.of_ffn_widths(self.dense_widths).without(attentions=self.silent_before)
        return shape.with_kv_groups(list(map(len, self.kv_groups.losses))) if self.kv_groups else shape

    @property
    def shape(self) -> ModelShape:
        """What the plan makes of it."""
        shape = self.dense_shape.with_ffn_widths([block.width for block in self.blocks])
        if self.kv_groups:
            shape = shape.with_kv_groups(list(map(len, self.kv_groups.kept)))
        kept = len(self.vocabulary.kept) if self.vocabulary else None
        return replace(shape.without(self.gone, self.silent), vocab_size=kept)

    @property
    def gone(self) -> frozenset[int]:
        """Blocks that go."""
        return frozenset(self.depth.removed if self.depth else ())

    @property
    def silent(self) -> frozenset[int]:
        """Blocks that lose their attention."""
        return frozenset(self.attention.removed if self.attention else ())

    @property
    def narrowed(self) -> dict[int, tuple[int, ...]]:
        """Blocks that lose some of their key-value groups -> those that stay."""
        return self.kv_groups.narrowed if self.kv_groups else {}

    @property
    def keep_ratio(self) -> float:
        """Realized share of FFN channels kept, of the blocks that stay."""
        blocks = self.shape.blocks
        return sum(block.ffn_width for block in blocks) / sum(self.dense_widths[b.origin] for b in blocks)

    @property
    def keeps_blocks(self) -> bool:
        """Whether every block stays as it is."""
        return self.keep_ratio == 1 and not self.gone and not self.silent and not self.narrowed

    @property
    def removed(self) -> str:
        """What goes, in words."""
        words = [f"{1 - self.keep_ratio:.1%} of the FFN channels removed"] if self.keep_ratio < 1 else []
        if self.depth:
            gone = ", ".join(map(str, self.depth.removed))
            words.append(f"{len(self.gone)} of {len(self.blocks)} blocks removed ({gone})")
        if self.attention:
            silent = ", ".join(map(str, self.attention.removed))
            words.append(f"{len(self.silent)} attentions removed ({silent})")
        if self.kv_groups:
            words.append("{} of {} key-value groups removed".format(*self.kv_groups.removed))
        if self.vocabulary:
            words.append(f"{len(self.vocabulary.kept)} of {self.vocabulary.dense_size} tokens kept")
        return ", ".join(words) or "nothing removed"

    def at_ratio(self, prune_ratio: float) -> PruningPlan:
        """The same importances and rankings at another ratio; score summaries keep their first `kept_share`.

        What was to be met does not hold any more. A plan that keeps every block has importances and rankings of few
        windows (`cfsp.pruning.prune.TOLD_WINDOWS`).
        """
        settings = replace(self.settings, prune_ratio=prune_ratio)
        check_settings(settings)
        importance = torch.tensor([block.importance for block in self.blocks], dtype=torch.float64)
        widths = allocate_widths(importance, self.dense_widths, settings, self.gone)
        blocks = tuple(replace(b, width=w) for b, w in zip(self.blocks, widths, strict=True))
        return replace(self, settings=settings, blocks=blocks)


def make_plan(
    loaded: LoadedModel,
    statistics: BlockStatistics,
    calibration: Calibration,
    settings: PruneSettings,
    depth: Removal | None = None,
    attention: Removal | None = None,
    kv_groups: GroupRemoval | None = None,
) -> PruningPlan:
    """Decide which channels every block keeps, beside blocks, attentions and groups that go; the model is not changed.

    Raises:
        InputError: An unknown name or a value out of range in the settings.
    """
    check_settings(settings)
    model = loaded.model
    importance = statistics.importance
    dense_widths, gone = model_shape(model).ffn_widths, frozenset(depth.removed if depth else ())
    widths = allocate_widths(importance, dense_widths, settings, gone)
    blocks = []
    for index, (layer, width) in enumerate(zip(decoder_layers(model), widths, strict=True)):
        with at_hand(layer):
            scores = score_channels(settings.score, feed_forward(model, layer), statistics.norms[index])
        order = torch.argsort(scores, descending=True, stable=True)
        total = float(scores.sum())
        share = float(scores[order[:width]].sum()) / total if total > 0 else 1.0
        summary = ScoreSummary(float(scores.min()), float(scores.median()), float(scores.max()), share)
        blocks.append(BlockPlan(width, float(importance[index]), tuple(order.tolist()), summary))
    rounding = rounding_dtype(settings.dtype, model.device.type)
    return PruningPlan(
        model_type=spec_for(model.config).model_type,
        source=loaded.source.reference,
        source_sha256=loaded.source.sha256,
        calibration=calibration.sources,
        calibration_sha256=calibration.sha256,
        calibration_tokens=statistics.n_tokens,
        seed=calibration.seed,
        settings=replace(settings, dtype=str(rounding).removeprefix("torch.")),
        dense_widths=dense_widths,
        blocks=tuple(blocks),
        depth=depth,
        attention=attention,
        kv_groups=kv_groups,
        silent_before=model_shape(model).without_attention,
        device=None if model.device == CPU else model.device.type,
    )


def check_plan_fits(model: Any, plan: PruningPlan) -> None:
    """Raise InputError unless the plan was made for a model of this type and shape."""
    model_type = spec_for(model.config).model_type
    shape = model_shape(model)
    if model_type != plan.model_type or not plan.dense_shape.agrees_with(shape):
        raise InputError(
            f"the plan was made for another model ({plan.source}, {plan.model_type}, "
            f"{len(plan.dense_widths)} blocks), not for this {model_type} of {len(shape.blocks)} blocks"
        )
    if plan.depth and not plan.gone <= set(range(1, len(plan.blocks))):
        raise InputError("the plan removes blocks that cannot go", field="depth", value=plan.depth.removed)
    if plan.attention and not plan.silent <= set(removable_attentions(model, plan.gone)):
        removed = plan.attention.removed
        raise InputError("the plan removes attentions that cannot go", field="attention", value=removed)
    for index, kept in enumerate(plan.kv_groups.kept if plan.kv_groups else ()):
        if bool(kept) != (shape.blocks[index].has_attention and index not in plan.gone | plan.silent):
            raise InputError(f"the plan's block {index} keeps no group", field="kv_groups", value=kept)
    for index, (block, dense) in enumerate(zip(plan.blocks, plan.dense_widths, strict=True)):
        sound = block.width == 0 if index in plan.gone else 0 < block.width <= dense
        if sorted(block.ranking) != list(range(dense)) or not sound:
            raise InputError(f"the plan's block {index} does not rank its {dense} channels once each")
