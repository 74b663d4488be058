"""Settings that meet a budget: what every axis costs is measured or predicted, and a combination is chosen.

- Tokens: nats on the counted text, as they are put in order (axes/token_order.py). No forward pass.
- FFN channels: copies of the model are pruned at some ratios and made up for as the settings say; the divergence from
  the dense model is measured on calibration windows that the repair has not seen.
- Attentions, key-value groups and blocks: the divergence without them (axes/removal.py), times what of it is left in
  one copy from which some are removed and made up for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cfsp.errors import InputError
from cfsp.models.architectures import model_shape
from cfsp.models.shape import ModelShape
from cfsp.models.source import LoadedModel
from cfsp.models.token_trees import trimmed_tokenizer
from cfsp.pruning.axes.removal import Removal
from cfsp.pruning.axes.token_order import TokenOrder
from cfsp.pruning.axes.vocabulary import check_vocabulary, kept_tokens
from cfsp.pruning.budget import Budget, BudgetShares, ChannelCurve, Choice, Evidence, Levels, unreachable
from cfsp.pruning.plan import PruningPlan
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.trials import PARTS, Trials

RATIOS = (0.05, 0.15, 0.4)
"""Shares of FFN channels at which copies are pruned."""
TOKEN_STEP = 32
"""A vocabulary keeps a multiple of this."""
_LEAST_MORE = 1e-4
"""Share of the dense model by which a choice that saved too little is made to save more."""
_KNOTS = 5
"""Vocabularies whose cost is computed exactly; between them it is interpolated."""


@dataclass(frozen=True)
class Decision:
    """What a budget comes to.

    Attributes:
        budget: What was asked.
        settings: Of the plan, as far as it is known before there is one.
        evidence: What is known of all axes.
        choice: What was chosen.
        dense: What the dense model takes.
    """

    budget: Budget
    settings: PruneSettings
    evidence: Evidence
    choice: Choice
    dense: float

    def finish(self, plan: PruningPlan, tokenizer: Any) -> PruningPlan:
        """The plan with as many channels as fit, and what each axis gives.

        Args:
            plan: Made with the settings.
            tokenizer: Of the tokens that stay.

        Raises:
            InputError: It cannot be met.
        """
        budget = self.budget
        plan = self._widest(plan, tokenizer)
        reached = budget.cost(plan.shape, tokenizer)
        excess = self.dense - budget.target
        stay = sum(plan.dense_widths[block.origin] for block in plan.shape.blocks)
        ratio = 1 - sum(plan.shape.ffn_widths) / stay
        axes = self.evidence.shares(self.choice, excess, self.dense - reached, ratio)
        # A share of groups is of attentions that stay.
        groups = plan.kv_groups.removed[0] if plan.kv_groups else 0
        axes = tuple(replace(one, removed=groups) if one.axis == "kv_groups" else one for one in axes)
        shares = BudgetShares(budget.name, budget.unit, budget.target, self.dense, reached, axes)
        return replace(plan, budget=shares)

    def _widest(self, plan: PruningPlan, tokenizer: Any) -> PruningPlan:
        """Where the ratio is fixed that of the plan is tried first; else none, then ever more units."""
        budget, align = self.budget, plan.settings.align
        fixed = "ffn" not in budget.axes
        first = plan if fixed else plan.at_ratio(0.0)
        if budget.cost(first.shape, tokenizer) <= budget.target:
            return first
        dense = [plan.dense_widths[block.origin] for block in plan.shape.blocks]
        units, total = sum(width // align for width in dense), sum(dense)
        least = plan.settings.prune_ratio if fixed else 0.0
        tried = range(max(0, int(units - (1 - least) * total / align)), units - len(dense) + 1)

        def cut(units_gone: int) -> PruningPlan:
            return plan.at_ratio(max(0.0, 1 - (units - units_gone) * align / total))

        place = _first(tried, lambda gone: budget.cost(cut(gone).shape, tokenizer) <= budget.target)
        if place is None:
            smallest = cut(tried[-1]) if tried else first
            raise unreachable(budget, budget.cost(smallest.shape, tokenizer))
        return cut(place)


def decide(trials: Trials, order: TokenOrder | None, settings: PruneSettings, budget: Budget) -> Decision:
    """Settings with which a model meets a budget at the least predicted loss.

    Args:
        trials: The dense model.
        order: In which order tokens go; None where none may go or does.
        settings: How to prune, and how much of what is fixed.
        budget: What to meet.

    Raises:
        InputError: No combination meets it.
    """
    loaded = trials.loaded
    shape = model_shape(loaded.model)
    dense = budget.cost(shape, loaded.tokenizer)
    if dense <= budget.target:
        budget = replace(budget, axes=())
    vocabulary = _Vocabulary(loaded, order, budget, settings.vocabulary)
    removals = {axis: _removals(trials, axis, settings, budget, shape) for axis in PARTS}
    levels = {
        axis: _levels(axis, of_axis, budget, shape, loaded.tokenizer) for axis, of_axis in removals.items()
    }
    levels["vocabulary"] = vocabulary.levels(shape)
    evidence = Evidence(levels, *_channels(trials, settings, budget, shape, dense))
    excess, reached = dense - budget.target, []
    while (choice := evidence.choose(excess)) is not None:
        chosen = {axis: of_axis[choice.levels[axis]] for axis, of_axis in removals.items()}
        left = _left(loaded.model, chosen, settings)
        if choice.ratio > evidence.ratios[0]:
            break
        widths = trials.plan.at_ratio(choice.ratio).shape.ffn_widths
        narrow = left.with_ffn_widths([widths[block.origin] for block in left.blocks])
        level = vocabulary.fit(choice.levels["vocabulary"], narrow)
        choice = replace(choice, levels={**choice.levels, "vocabulary": level})
        reached.append(vocabulary.cost(level, narrow))
        over = reached[-1] - budget.target
        if over <= 0 or "ffn" in budget.axes:
            break
        # Parts save a little less than was thought, and no channels may make up for that.
        excess += max(over, _LEAST_MORE * dense)
    else:
        raise unreachable(budget, min(reached, default=dense - evidence.most))
    size = vocabulary.sizes[choice.levels["vocabulary"]]
    settings = replace(
        settings,
        prune_ratio=choice.ratio,
        vocabulary=0 if size == vocabulary.tokens and not settings.vocabulary else size,
        blocks=len(chosen["blocks"].removed),
        attentions=len(chosen["attentions"].removed),
        kv_groups=settings.kv_groups or _share_of_groups(shape, left),
    )
    return Decision(budget, settings, evidence, choice, dense)


def _left(model: Any, chosen: Mapping[str, Removal], settings: PruneSettings) -> ModelShape:
    """About what stays of a model, with as many parts fewer as were chosen: the plan will find which.

    Args:
        model: The dense model.
        chosen: Of each axis of parts.
        settings: What of them is fixed; a share of groups is of attentions that stay.
    """
    shape = model_shape(model)
    gone: set[int] = set()
    going = {}
    for axis in ("blocks", "attentions", "kv_groups"):
        row, amount = PARTS[axis], getattr(settings, axis)
        parts = row.parts(shape)
        count = row.count(shape, gone, amount) if amount else len(chosen[axis].removed)
        going[axis] = _of_other_blocks((*chosen[axis].removed, *row.candidates(model)), count, gone, parts)
        gone.update(part // parts for part in going[axis])
    for axis, removed in reversed(going.items()):
        shape = PARTS[axis].shape_without(shape, removed)
    return shape


def _of_other_blocks(order: Iterable[int], count: int, gone: Collection[int], parts: int = 1) -> list[int]:
    """The first parts of an order that are of blocks that stay; of several parts a block keeps one."""
    rest = dict.fromkeys(order)
    left = Counter(part // parts for part in rest)
    going: list[int] = []
    for part in rest:
        block = part // parts
        if len(going) < count and block not in gone and left[block] > min(1, parts - 1):
            going.append(part)
            left[block] -= 1
    return going


def _share_of_groups(dense: ModelShape, left: ModelShape) -> float:
    """Of the key-value groups of attentions that stay, the share that goes."""
    attending = [block for block in left.blocks if block.has_attention]
    total = sum(dense.blocks[block.origin].kv_groups or 0 for block in attending)
    return 1 - sum(block.kv_groups or 0 for block in attending) / total


def _removals(
    trials: Trials, axis: str, settings: PruneSettings, budget: Budget, shape: ModelShape
) -> list[Removal]:
    """The choices that there are, of the fewest removals first: none, or the fixed number, where it is fixed."""
    row, model = PARTS[axis], trials.loaded.model
    if amount := getattr(settings, axis):
        return trials.removals(axis, row.count(shape, (), amount))
    removals = [Removal((), (), 0.0, 0)]
    if axis in budget.axes and (candidates := row.candidates(model)):
        try:
            # The first that may go: a format may care which blocks come after it.
            budget.cost(row.shape_without(shape, candidates[:1]), trials.loaded.tokenizer)
        except InputError:
            return removals  # the format that is budgeted has no such models
        removals += trials.removals(axis, 0)
    return removals


def _levels(
    axis: str, removals: Sequence[Removal], budget: Budget, shape: ModelShape, tokenizer: Any
) -> Levels:
    """What attentions, groups or blocks save, all of an axis alike, and cost."""
    numbers = np.array([len(removal.removed) for removal in removals])
    last = removals[-1].removed
    without = PARTS[axis].shape_without(shape, last)
    saved = budget.cost(shape, tokenizer) - budget.cost(without, tokenizer)
    losses = np.maximum.accumulate([removal.loss for removal in removals])
    return Levels(PARTS[axis].units(shape), numbers, numbers * (saved / max(len(last), 1)), losses)


def _channels(
    trials: Trials, settings: PruneSettings, budget: Budget, shape: ModelShape, dense: float
) -> tuple[ChannelCurve, int, float, tuple[float, float]]:
    """What `Evidence` has of FFN channels: their curve, their number, what one saves, how many may go."""
    widths, align, fixed = shape.ffn_widths, settings.align, settings.prune_ratio
    half = [min(width, max(align, width // 2 // align * align)) for width in widths]
    gone = sum(widths) - sum(half)
    if not gone or ("ffn" not in budget.axes and not fixed):
        return ChannelCurve(), sum(widths), 0.0, (0.0, 0.0)
    saves = (dense - budget.cost(shape.with_ffn_widths(half), trials.loaded.tokenizer)) / gone
    if "ffn" not in budget.axes:
        return trials.channels((fixed,)), sum(widths), saves, (fixed, fixed)
    curve = trials.channels(RATIOS)
    most = 1 - len(widths) * align / sum(widths) if curve.ratios else 0.0
    return curve, sum(widths), saves, (0.0, most)


class _Vocabulary:
    """The sizes that a vocabulary may have for a budget.

    Attributes:
        tokens: Of the dense model's tokenizer.
        sizes: What may be kept, the most first.
    """

    def __init__(self, loaded: LoadedModel, order: TokenOrder | None, budget: Budget, fixed: int) -> None:
        self._tokenizer, self._order, self._budget = loaded.tokenizer, order, budget
        self.tokens = len(loaded.tokenizer)
        least = self.tokens - (len(order.removed) if order else 0)
        if fixed:
            check_vocabulary(fixed, self.tokens, least)
        free = [size for size in range(least, self.tokens) if size % TOKEN_STEP == 0]
        self.sizes = [fixed] if fixed else [self.tokens, *reversed(free)]

    def levels(self, shape: ModelShape) -> Levels:
        """What ever smaller ones save a model of this shape, and cost it."""
        if self._order is None:
            return Levels.nothing(self.tokens)
        removed = self.tokens - np.array(self.sizes)
        knots = np.unique(np.linspace(0, len(removed) - 1, _KNOTS).round().astype(int))
        dense = self._budget.cost(shape, self._tokenizer)
        saved = [dense - self.cost(int(place), shape) for place in knots]
        every = np.interp(np.arange(len(removed)), knots, saved)
        return Levels(self.tokens, removed, every, self._order.losses[removed])

    def fit(self, level: int, shape: ModelShape) -> int:
        """The level of the most tokens with which a model of this shape keeps to the budget, near a level."""
        while level + 1 < len(self.sizes) and self.cost(level, shape) > self._budget.target:
            level += 1
        while level > 0 and self.cost(level - 1, shape) <= self._budget.target:
            level -= 1
        return level

    def cost(self, level: int, shape: ModelShape) -> float:
        """What a model of this shape takes with the tokens of a level."""
        size = self.sizes[level]
        if self._order is None or size == self.tokens:
            return self._budget.cost(shape, self._tokenizer)
        kept = kept_tokens(self._tokenizer, set(self._order.removed[: self.tokens - size]))
        return self._budget.cost(replace(shape, vocab_size=size), trimmed_tokenizer(self._tokenizer, kept))


def _first(places: range, holds: Callable[[int], bool]) -> int | None:
    """The first place where something holds that, but for a few places, holds from there on."""
    low, high = 0, len(places)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(places[middle]) else (middle + 1, high)
    return next((place for place in places[low:] if holds(place)), None)
