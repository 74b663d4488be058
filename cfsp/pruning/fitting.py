"""Settings that meet a budget: what every axis costs is measured or predicted, and a combination is chosen.

- Tokens: nats on the counted text, as they are put in order (axes/token_order.py). No forward pass. Rows that no token
  has cost nothing and go before anything else.
- FFN channels: copies of the model are pruned at some ratios and made up for as the settings say; the divergence from
  the dense model is measured on calibration windows that the repair has not seen.
- Attentions, key-value groups and blocks: the divergence without them (axes/removal.py), times what of it is left in
  one copy from which some are removed and made up for.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cfsp.errors import InputError
from cfsp.models.architectures import model_shape
from cfsp.models.shape import ModelShape
from cfsp.models.source import LoadedModel
from cfsp.models.token_trees import trimmed_tokenizer
from cfsp.pruning.axes.parts import Removal
from cfsp.pruning.axes.vocabulary import TokenOrder, check_vocabulary, kept_tokens, padding_rows
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
_IN_TURN = ("blocks", "attentions", "kv_groups")
"""Axes of parts, in the order in which what goes is chosen."""
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
        plan = _widest(plan, budget, lambda shape: budget.cost(shape, tokenizer))
        reached = budget.cost(plan.shape, tokenizer)
        if reached > budget.target:
            raise unreachable(budget, reached)
        excess = self.dense - budget.target
        axes = self.evidence.shares(self.choice, excess, self.dense - reached, _ratio(plan))
        # A share of groups is of attentions that stay.
        groups = plan.kv_groups.removed[0] if plan.kv_groups else 0
        axes = tuple(replace(one, removed=groups) if one.axis == "kv_groups" else one for one in axes)
        shares = BudgetShares(budget.name, budget.unit, budget.target, self.dense, reached, axes)
        return replace(plan, budget=shares)


def _widest(plan: PruningPlan, budget: Budget, cost: Callable[[ModelShape], float]) -> PruningPlan:
    """The plan with as many channels as fit, or as few as there can be where none do.

    Where the ratio is fixed that of the plan is tried first; else none, then ever more units. It is the only one where
    the channels of some blocks stay.
    """
    align, fixed = plan.settings.align, "ffn" not in budget.axes
    first = plan if fixed else plan.at_ratio(0.0)
    if cost(first.shape) <= budget.target:
        return first
    dense = [plan.dense_widths[block.origin] for block in plan.shape.blocks]
    units, total = sum(width // align for width in dense), sum(dense)
    least = plan.settings.prune_ratio if fixed else 0.0
    tried = range(max(0, int(units - (1 - least) * total / align)), units - len(dense) + 1)

    def cut(units_gone: int) -> PruningPlan:
        return plan.at_ratio(max(0.0, 1 - (units - units_gone) * align / total))

    place = _first(tried, lambda gone: cost(cut(gone).shape) <= budget.target)
    return cut(tried[-1] if place is None else place) if tried else first


def _ratio(plan: PruningPlan) -> float:
    """Share of the channels of blocks that stay that goes."""
    stay = sum(plan.dense_widths[block.origin] for block in plan.shape.blocks)
    return 1 - sum(plan.shape.ffn_widths) / stay


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
    trims = settings.vocabulary or "vocabulary" in budget.axes
    vocabulary = _Vocabulary(loaded, order if trims else None, budget, settings.vocabulary)
    removals = {axis: _removals(trials, axis, settings, budget, shape) for axis in PARTS}
    levels = {
        axis: _levels(axis, of_axis, budget, shape, loaded.tokenizer) for axis, of_axis in removals.items()
    }
    levels["vocabulary"] = vocabulary.levels(shape)
    parts = _Parts(loaded.model, {axis: of_axis[-1] for axis, of_axis in removals.items()}, settings)
    channels = _channels(trials, settings, budget, shape, dense)
    evidence = Evidence(levels, *channels, going=parts.together(levels))
    allocation = _Allocation(budget, evidence, trials.plan, parts, vocabulary, dense)
    fit = allocation.with_returned(allocation.least())
    size = vocabulary.sizes[fit.level]
    settings = replace(
        settings,
        prune_ratio=fit.plan.settings.prune_ratio,
        vocabulary=0 if size == vocabulary.rows and not settings.vocabulary else size,
        blocks=len(fit.plan.gone),
        attentions=len(fit.plan.silent),
        kv_groups=settings.kv_groups or (fit.plan.kv_groups.share if fit.plan.kv_groups else 0.0),
    )
    return Decision(budget, settings, evidence, fit.choice, dense)


@dataclass(frozen=True)
class _Fit:
    """A combination with the tokens and channels that fit beside its parts.

    Attributes:
        choice: The combination, of as many tokens as fit.
        level: Of the vocabulary.
        plan: About what the plan will be.
        cost: What the model takes.
        loss: Predicted for as many channels as fit.
    """

    choice: Choice
    level: int
    plan: PruningPlan
    cost: float
    loss: float


@dataclass(frozen=True)
class _Allocation:
    """Fits combinations to a budget.

    Attributes:
        budget: What to meet.
        evidence: What is known of all axes.
        whole: The plan by which nothing goes.
        parts: Which parts go.
        vocabulary: The sizes that it may have.
        dense: What the dense model takes.
    """

    budget: Budget
    evidence: Evidence
    whole: PruningPlan
    parts: _Parts
    vocabulary: _Vocabulary
    dense: float

    def least(self) -> _Fit:
        """The combination of the least predicted loss that meets the budget.

        Raises:
            InputError: None does.
        """
        excess = self.dense - self.budget.target
        while choice := self.evidence.choose(excess):
            fit = self._fit(choice)
            if fit.cost <= self.budget.target:
                return fit
            # Parts save a little less than was thought, and no channels may make up for that.
            excess += max(fit.cost - self.budget.target, _LEAST_MORE * self.dense)
        fit = self._fit(self.evidence.largest)
        if fit.cost > self.budget.target:
            raise unreachable(self.budget, fit.cost)
        return fit

    def with_returned(self, fit: _Fit) -> _Fit:
        """Without what goes for nothing: units come back, the dearest first, while the budget is met.

        Parts go whole and may save more than was missing. Channels or tokens that take the place of one that comes
        back are predicted to lose no more than it.
        """
        excess = self.dense - self.budget.target
        while self.budget.target - fit.cost >= self._step(fit):
            removed = (_with_one_back(fit.choice, axis) for axis in self._returnable(fit))
            fits = (self._fit(self.evidence.with_removed(one, excess)) for one in removed)
            better = (one for one in fits if one.cost <= self.budget.target and one.loss <= fit.loss)
            if (returned := next(better, None)) is None:
                break
            fit = returned
        return fit

    def _step(self, fit: _Fit) -> float:
        """What the least unit takes that may come back or be cut."""
        steps = [self.evidence.levels[axis].unit for axis in self._returnable(fit)]
        if "ffn" in self.budget.axes:
            settings, blocks = self.whole.settings, len(fit.plan.shape.blocks)
            unit = settings.align * (blocks if settings.uniform_width else 1)
            steps.append(unit * self.evidence.channel_saves)
        return min(steps, default=math.inf)

    def _returnable(self, fit: _Fit) -> list[str]:
        """Axes of which a part may come back, first those whose last costs most."""
        last = {}
        for axis in PARTS:
            table, removed = self.evidence.levels[axis], fit.choice.removed[axis]
            if removed > table.removed[0] and self.parts.going(_with_one_back(fit.choice, axis)):
                last[axis] = table.at(removed)[1] - table.at(removed - 1)[1]
        return sorted(last, key=lambda axis: -last[axis])

    def _fit(self, choice: Choice) -> _Fit:
        """A combination with as many tokens, where no channels go, and as many channels as fit."""
        vocabulary, low = self.vocabulary, self.evidence.ratios[0]
        level = vocabulary.level(choice.removed["vocabulary"])
        plan = self.parts.without(self.whole.at_ratio(low), choice.removed)
        if choice.ratio <= low:
            level = vocabulary.fit(level, plan.shape)
        if "ffn" in self.budget.axes:
            plan = _widest(plan, self.budget, lambda shape: vocabulary.cost(level, shape))
        removed = {**choice.removed, "vocabulary": vocabulary.rows - vocabulary.sizes[level]}
        loss = self.evidence.loss(removed, _ratio(plan))
        return _Fit(replace(choice, removed=removed), level, plan, vocabulary.cost(level, plan.shape), loss)


def _with_one_back(choice: Choice, axis: str) -> Mapping[str, int]:
    """What is removed but for one unit of an axis."""
    return {**choice.removed, axis: choice.removed[axis] - 1}


class _Parts:
    """About which blocks, attentions and groups go: the plan will find which.

    Args:
        model: The dense model.
        alone: Axis -> a removal, for what each part costs alone.
        settings: What of them is fixed; a share of groups is of attentions that stay.
    """

    def __init__(self, model: Any, alone: Mapping[str, Removal], settings: PruneSettings) -> None:
        self._model, self._alone, self._settings = model, alone, settings
        self._shape = model_shape(model)
        self._order = functools.cache(self._cheapest_first)

    def together(self, levels: Mapping[str, Levels]) -> dict[str, npt.NDArray[np.int64]]:
        """Of the levels of every axis how many go together, as `Evidence` has it."""
        rows = [levels[axis].removed.tolist() for axis in PARTS]
        every = [self.going(dict(zip(PARTS, counts, strict=True))) for counts in itertools.product(*rows)]
        size = list(map(len, rows))
        return {
            axis: np.array([len(going[axis]) if going else -1 for going in every]).reshape(size)
            for axis in PARTS
        }

    def going(self, removed: Mapping[str, int]) -> dict[str, list[int]] | None:
        """Which go of so many, fewer where others leave no more; None where fewer than are fixed can go."""
        gone: set[int] = set()
        going: dict[str, list[int]] = {}
        for axis in _IN_TURN:
            row, amount = PARTS[axis], getattr(self._settings, axis)
            try:
                count = row.count(self._shape, gone, amount) if amount else removed[axis]
            except InputError:
                return None
            parts = row.parts(self._shape)
            going[axis] = _of_other_blocks(self._order(axis, frozenset(gone)), count, gone, parts)
            if amount and len(going[axis]) < count:
                return None
            gone.update(part // parts for part in going[axis])
        return going

    def without(self, plan: PruningPlan, removed: Mapping[str, int]) -> PruningPlan:
        """A plan by which no parts go, with so many fewer.

        Raises:
            InputError: Fewer than are fixed can go.
        """
        going = self.going(removed)
        if going is None:
            raise InputError("fewer parts than are fixed can go", value=dict(removed))
        gone: set[int] = set()
        for axis in _IN_TURN:
            if going[axis]:
                removal = replace(self._alone[axis], removed=tuple(sorted(going[axis])))
                plan = replace(plan, **PARTS[axis].planned(self._model, removal, gone))
            gone.update(going[axis])
        return plan

    def _cheapest_first(self, axis: str, gone: frozenset[int]) -> list[int]:
        """Parts that may go beside blocks that do."""
        losses = self._alone[axis].losses
        candidates = PARTS[axis].candidates(self._model, gone) if losses else ()
        return sorted(candidates, key=lambda part: (losses[part], part))


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


def _removals(
    trials: Trials, axis: str, settings: PruneSettings, budget: Budget, shape: ModelShape
) -> list[Removal]:
    """The choices that there are, of the fewest removals first: none, or the fixed number, where it is fixed."""
    row, model = PARTS[axis], trials.loaded.model
    if amount := getattr(settings, axis):
        return trials.removals(axis, row.count(shape, (), amount))
    removals = [Removal((), (), 0.0, 0)]
    if axis in budget.axes and (candidates := row.candidates(model, frozenset())):
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

    Args:
        loaded: The dense model.
        order: In which order tokens go; None where none may.
        budget: What to meet.
        fixed: Size that is asked for; 0 for none.

    Attributes:
        rows: Of the dense model's embedding.
        sizes: Rows that may be kept, the most first: all tokens, without the rows that none has but for those that
            fill up the last step.
    """

    def __init__(self, loaded: LoadedModel, order: TokenOrder | None, budget: Budget, fixed: int) -> None:
        self._tokenizer, self._order, self._budget = loaded.tokenizer, order, budget
        self._tokens = tokens = len(loaded.tokenizer)
        self.rows = max(tokens, len(loaded.model.get_input_embeddings().weight))
        self.sizes, self._trimmed = [self.rows], functools.cache(self._of_size)
        if order is None:
            return
        least, spare = tokens - len(order.removed), len(padding_rows(loaded.tokenizer, self.rows))
        if fixed:
            check_vocabulary(fixed, tokens + spare, least)
        free = [size for size in range(least, tokens) if size % TOKEN_STEP == 0]
        self.sizes = [fixed] if fixed else [tokens + min(spare, -tokens % TOKEN_STEP), *reversed(free)]

    def level(self, removed: int) -> int:
        """That at which so many rows go."""
        return self.sizes.index(self.rows - removed)

    def levels(self, shape: ModelShape) -> Levels:
        """What ever smaller ones save a model of this shape, and cost it."""
        if self._order is None:
            return Levels.nothing(self.rows)
        removed = self.rows - np.array(self.sizes)
        knots = np.unique(np.linspace(0, len(removed) - 1, _KNOTS).round().astype(int))
        dense = self._budget.cost(shape, self._tokenizer)
        saved = [dense - self.cost(int(place), shape) for place in knots]
        every = np.interp(np.arange(len(removed)), knots, saved)
        gone = np.maximum(self._tokens - np.array(self.sizes), 0)
        return Levels(self.rows, removed, every, self._order.losses[gone])

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
        if self._order is None or size == self.rows:
            return self._budget.cost(shape, self._tokenizer)
        return self._budget.cost(replace(shape, vocab_size=size), self._trimmed(size))

    def _of_size(self, size: int) -> Any:
        """The tokenizer of so many tokens."""
        removed = self._order.removed[: max(0, self._tokens - size)] if self._order else ()
        return trimmed_tokenizer(self._tokenizer, kept_tokens(self._tokenizer, set(removed)))


def _first(places: range, holds: Callable[[int], bool]) -> int | None:
    """The first place where something holds that, but for a few places, holds from there on."""
    low, high = 0, len(places)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(places[middle]) else (middle + 1, high)
    return next((place for place in places[low:] if holds(place)), None)
