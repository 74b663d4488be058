"""What to prune, decided once and written down: fine scores, widths of the blocks, the PruningPlan.

A plan ranks all channels of every block, so that it can be moved to another ratio without another calibration
(`at_ratio`). `apply_plan` (block_by_block.py) changes the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch

from cfsp.devices import CPU, exact
from cfsp.errors import InputError
from cfsp.models.architectures import FeedForward, decoder_layers, feed_forward, model_shape, spec_for
from cfsp.models.families.row import MAX_SIZE
from cfsp.models.offload import at_hand
from cfsp.models.shape import ModelShape
from cfsp.models.source import LoadedModel
from cfsp.precision import rounding_dtype
from cfsp.pruning.parts import Forecast, GroupRemoval, Removal, removable_attentions
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.statistics import BlockStatistics
from cfsp.pruning.vocabulary import VocabularyPlan
from cfsp.settings import check_settings
from cfsp.text.calibration import Calibration
from cfsp.validation import Seed, WhereSet

_PAPER_SCALE = 128 * 1024 / 1e4
"""The released code sums I_l over 128 x 1024 tokens and divides by 1e4; with the mean this factor remains."""


def channel_scores(name: str, ffn: FeedForward, norm: torch.Tensor) -> torch.Tensor:
    """How much each FFN channel of a block counts, (m,) float64; the highest are kept.

    Channel i is row i of gate_proj (G) and up_proj (U), both (m, d), and column i of down_proj (D), (d, m).

    - `cfsp` (eq. 8): S_i = (mean_j |D_ji| / sum_k |D_jk| + mean_j |G_ij| / sum_k |G_kj| + mean_j |U_ij| / sum_k |U_kj|)
      ||X_i||, each weight relative to its peers across channels.
    - `activation_norm`: ||X_i||, what the released code computes once its weight terms cancel (method 3).

    Args:
        name: One of them.
        ffn: The block's.
        norm: (m,) float64, root mean square over tokens of down_proj's input: it orders channels as ||X_i|| does.

    Raises:
        InputError: Scores are not finite.
    """
    scores = norm
    if name == "cfsp":
        with torch.no_grad():
            down, gate, up = (exact(linear.weight.abs()) for linear in (ffn.down, ffn.gate, ffn.up))
        tiny = torch.finfo(down.dtype).tiny
        relative = (down / down.sum(1, keepdim=True).clamp_min(tiny)).mean(0)
        for matrix in (gate, up):
            relative = relative + (matrix / matrix.sum(0, keepdim=True).clamp_min(tiny)).mean(1)
        scores = relative * norm
    scores = exact(scores)
    if not bool(torch.isfinite(scores).all()):
        raise InputError(f"score {name} is not finite; weights or activations hold NaN or infinity")
    return scores


def cfsp_keep_ratios(importance: torch.Tensor, prune_ratio: float, strength: float) -> torch.Tensor:
    """CFSP's coarse allocation (methods 1 and 2): each block's share of FFN channels, (num_hidden_layers,) float64.

    s_l = sigmoid(a (128 * 1024 / 1e4) (I_l - mean I)),  keep_l = (1 - p) s_l / mean s, with I_l the mean over tokens, p
    the `prune_ratio` and a the `strength`; a = 0 is uniform. If a block would keep all of its channels or more, all
    deviations from the mean are shrunk by one factor, as in the released code.
    """
    centred = importance.double() - importance.double().mean()
    s = torch.sigmoid(strength * _PAPER_SCALE * centred)
    keep = 1 - prune_ratio
    relative = s / s.mean()
    if float(relative.max()) * keep >= 1 and float(relative.max()) > 1:
        shrink = (1 / keep - 1) / (float(relative.max()) - 1) / 1.05
        relative = 1 + (relative - 1) * shrink
    return keep * relative


def allocate_widths(
    importance: torch.Tensor,
    dense_widths: Sequence[int],
    settings: PruneSettings,
    gone: frozenset[int] = frozenset(),
) -> tuple[int, ...]:
    """Integer widths of all blocks, multiples of `align` whose sum is the nearest to the ratio; 0 in blocks that go.

    Largest remainder: every block gets the whole units of `align` that it asks for, and the units left go one each to
    the blocks that were cut most. A block keeps at least one unit and at most its dense width. The ratio is of the
    blocks that stay; a ratio of 0 gives the dense widths. Raises InputError: the alignment cannot meet the ratio, or
    `uniform_width` with blocks that differ.
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
    keep = cfsp_keep_ratios(importance, ratio, settings.strength)
    wanted = (keep * torch.tensor(dense_widths, dtype=torch.float64)).tolist()
    units = round((1 - ratio) * sum(dense_widths) / align)
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
        free = [i for i, c in enumerate(counts) if (c < floors[i] if step > 0 else c > 1)]
        counts[max(free, key=lambda i: (step * (shares[i] - counts[i]), -i))] += step
    return tuple(count * align for count in counts)


@dataclass(frozen=True)
class BlockPlan:
    """One block's part of a plan."""

    width: int  # number of channels kept; 0 in a block that goes
    importance: float  # coarse importance of the block
    ranking: tuple[int, ...]  # all channel indices, best first; the first `width` are kept

    @property
    def kept(self) -> tuple[int, ...]:
        """Indices of the kept channels, ascending."""
        return tuple(sorted(self.ranking[: self.width]))


@dataclass(frozen=True)
class PruningPlan:
    """What of which model is kept, and why."""

    KIND: ClassVar[str] = "pruning_plan"
    SCHEMA_VERSION: ClassVar[int] = 5

    model_type: str  # row of the architecture table
    source: str  # model reference the plan was made for, and if known its hash
    source_sha256: str | None
    # names of the calibration text; then the hash and number of its token ids, and the seed.
    calibration: tuple[str, ...]
    calibration_sha256: str
    calibration_tokens: int
    seed: Seed
    settings: PruneSettings  # how the plan was made
    dense_widths: tuple[int, ...]  # intermediate_size of each block before pruning
    blocks: tuple[BlockPlan, ...]  # one entry a block
    vocabulary: Annotated[VocabularyPlan | None, WhereSet] = None  # which tokens are kept; None if all are
    depth: Annotated[Removal | None, WhereSet] = None  # which whole blocks go
    attention: Annotated[Removal | None, WhereSet] = None  # which blocks lose their attention
    kv_groups: Annotated[GroupRemoval | None, WhereSet] = None  # which key-value groups are kept
    silent_before: Annotated[tuple[int, ...], WhereSet] = ()  # blocks that had no attention before
    device: Annotated[str | None, WhereSet] = None  # kind of device that computed it; None for the CPU
    warnings: Annotated[tuple[str, ...], WhereSet] = ()  # settings that had no effect
    forecast: Annotated[Forecast | None, WhereSet] = None  # what channels cost at other ratios

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
        """The same importances and rankings at another ratio."""
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
    removals: tuple[Removal | None, Removal | None, GroupRemoval | None] = (None, None, None),
) -> PruningPlan:
    """Decide which channels every block keeps, beside what `choose_removals` found; the model is not changed.

    Raises InputError: settings that cannot be used, or an alignment that cannot meet the ratio.
    """
    check_settings(settings)
    model, importance, (depth, attention, kv_groups) = loaded.model, statistics.importance, removals
    dense_widths, gone = model_shape(model).ffn_widths, frozenset(depth.removed if depth else ())
    widths = allocate_widths(importance, dense_widths, settings, gone)
    blocks = []
    for index, (layer, width) in enumerate(zip(decoder_layers(model), widths, strict=True)):
        with at_hand(layer):
            scores = channel_scores(settings.score, feed_forward(model, layer), statistics.norms[index])
        ranking = torch.argsort(scores, descending=True, stable=True)
        blocks.append(BlockPlan(width, float(importance[index]), tuple(ranking.tolist())))
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
