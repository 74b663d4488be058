"""Which point to try next.

With every channel that goes, quality gets worse, and size, memory and time get better. So of each recipe (all of a
point but its ratio) one ratio is worth knowing: for the best quality the least at which all costs are within budget,
for the smallest file the largest at which all qualities are. What widths alone settle is settled without a trial; the
rest is predicted from the trials so far, tried, and closed in on. Among recipes the one that may turn out best goes
first, and one that is not expected to be better than the best so far is not tried at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from cfsp.errors import InputError
from phoneready.settings.schema import SIZE, TuneConfig
from phoneready.tune.forecast import Forecast, MeasuredPoint
from phoneready.tune.limits import COST, QUALITY, Judged, Limits
from phoneready.tune.predict import Prediction
from phoneready.tune.space import Point, Recipe
from phoneready.tune.trial import Bench

_EDGE = 0.1
"""A new trial keeps this share of the open range away from what is known, or closing in takes long."""


@dataclass(frozen=True)
class Candidate:
    """A point worth trying.

    Attributes:
        point: The point.
        objective: What it is expected to reach: nats, or bytes.
        optimistic: What it may reach.
        why: For people.
    """

    point: Point
    objective: Prediction | None
    optimistic: float
    why: str


@dataclass
class Searcher:
    """Chooses points.

    Args:
        bench: Knows sizes without trials.
        limits: The budgets.
        recipes: What to choose from.
        tune: The goal and the range.
    """

    bench: Bench
    limits: Limits
    recipes: Sequence[Recipe]
    tune: TuneConfig

    def __post_init__(self) -> None:
        self._exact = functools.cache(self._judge_exact)
        self._ratios = functools.cache(self._achievable)

    def best(self, tried: Iterable[MeasuredPoint]) -> MeasuredPoint | None:
        """The best point so far that meets all budgets; of equals the earlier."""
        meeting = [one for one in tried if one.judged.meets]
        return min(meeting, key=self.objective, default=None)

    def objective(self, one: MeasuredPoint) -> float:
        """What is minimized: nats, or bytes."""
        return float(one.file_bytes) if self.tune.goal == SIZE else one.divergence

    def feasible_from(self, recipe: Recipe) -> int | None:
        """Number of the least ratio at which everything that widths settle is within budget; None where none is."""
        ratios = self._ratios(recipe)
        return _first(len(ratios), lambda i: self._exact(Point(recipe, ratios[i])).meets)

    def hopeless(self) -> tuple[Point, Judged] | None:
        """Where no point can meet what widths settle: the one that comes closest, and what it misses."""
        if any(self.feasible_from(recipe) is not None for recipe in self.recipes):
            return None
        ends = [Point(recipe, self._ratios(recipe)[-1]) for recipe in self.recipes]
        closest = min(ends, key=lambda point: self._exact(point).violation)
        return closest, self._exact(closest)

    def next(self, tried: Sequence[MeasuredPoint], failed: Collection[Point] = ()) -> Candidate | None:
        """The next point to try; None where nothing is expected to be better.

        Args:
            tried: The trials so far.
            failed: Points that could not be made.
        """
        candidates = (self._candidate(recipe, tried) for recipe in self.recipes)
        found = [c for c in candidates if c is not None and c.point not in failed]
        best = self.best(tried)
        if best is not None:
            bar = self.objective(best) * (1 - self.tune.tolerance)
            found = [c for c in found if c.optimistic < bar]
        return min(found, key=lambda c: c.optimistic, default=None)

    def least_known(self, recipe: Recipe, known: Collection[Point]) -> Point | None:
        """Within what widths settle, the point farthest from all that are known; None where all are."""
        first = self.feasible_from(recipe)
        if first is None:
            return None
        taken = [point.prune_ratio for point in known if point.recipe == recipe]
        open_ratios = [ratio for ratio in self._ratios(recipe)[first:] if ratio not in taken]
        distance = {r: min((abs(r - one) for one in taken), default=0.0) for r in open_ratios}
        return Point(recipe, max(distance, key=lambda r: distance[r])) if distance else None

    def forecast(self, tried: Sequence[MeasuredPoint]) -> Forecast:
        """What the trials so far say of others."""
        return Forecast(tried, self.limits)

    def _candidate(self, recipe: Recipe, tried: Sequence[MeasuredPoint]) -> Candidate | None:
        first = self.feasible_from(recipe)
        if first is None:
            return None
        ratios = self._ratios(recipe)
        own = {one.point.prune_ratio: one for one in tried if one.point.recipe == recipe}
        chosen = self._smallest if self.tune.goal == SIZE else self._best_quality
        index = chosen(recipe, ratios, first, own, self.forecast(tried))
        if index is None or ratios[index] in own:
            return None
        return self._describe(Point(recipe, ratios[index]), tried)

    def _best_quality(
        self,
        recipe: Recipe,
        ratios: Sequence[float],
        first: int,
        own: dict[float, MeasuredPoint],
        forecast: Forecast,
    ) -> int | None:
        """The least ratio at which costs are within budget: below it they are not, above it quality is lost."""
        failed = [i for i, r in enumerate(ratios) if r in own and not own[r].judged.meets_family(COST)]
        kept = [i for i, r in enumerate(ratios) if r in own and own[r].judged.meets_family(COST)]
        low = max([first - 1, *(i for i in failed)])
        high = min([i for i in kept if i > low], default=len(ratios))
        if high - low <= 1:
            return None
        guess = _first(len(ratios), lambda i: forecast.meets(Point(recipe, ratios[i]), COST))
        guess = len(ratios) - 1 if guess is None else guess
        if low < first:
            # Nothing has failed yet: the least ratio itself is open.
            return max(guess, first) if high > max(guess, first) else first
        return _between(guess, low, high)

    def _smallest(
        self,
        recipe: Recipe,
        ratios: Sequence[float],
        first: int,
        own: dict[float, MeasuredPoint],
        forecast: Forecast,
    ) -> int | None:
        """The largest ratio at which qualities are within budget."""
        failed = [i for i, r in enumerate(ratios) if r in own and not own[r].judged.meets_family(QUALITY)]
        high = min(failed, default=len(ratios))
        kept = [
            i for i, r in enumerate(ratios) if r in own and i < high and own[r].judged.meets_family(QUALITY)
        ]
        low = max(kept, default=first - 1)
        if high - low <= 1 or self._close_enough(recipe, ratios, low, high, first):
            return None
        beyond = _first(len(ratios), lambda i: not forecast.meets(Point(recipe, ratios[i]), QUALITY))
        guess = (len(ratios) if beyond is None else beyond) - 1
        if not own and not forecast.knows(QUALITY):
            guess = first + (len(ratios) - first) // 3
        return _between(guess, low, high) if high < len(ratios) or low >= first else max(guess, first)

    def _close_enough(self, recipe: Recipe, ratios: Sequence[float], low: int, high: int, first: int) -> bool:
        """Whether the whole open range is worth less than the tolerance."""
        if low < first or high >= len(ratios):
            return False
        return (ratios[high] - ratios[low]) / (1 - ratios[low]) < self.tune.tolerance

    def _describe(self, point: Point, tried: Sequence[MeasuredPoint]) -> Candidate:
        predicted = self.forecast(tried).divergence(point) if tried else None
        if self.tune.goal == SIZE:
            size = self.bench.runner.file_bytes(point.recipe, point.prune_ratio)
            return Candidate(
                point, predicted, float(size or 0), "may be the smallest file within the budgets"
            )
        optimistic = predicted.low if predicted else 0.0
        return Candidate(point, predicted, optimistic, "the least pruned file of its kind within the budgets")

    def _judge_exact(self, point: Point) -> Judged:
        try:
            figures = self.bench.exact_figures(point)
        except InputError as error:
            raise InputError(f"{point.describe()}: {error}") from error
        return self.limits.judge(point, figures)

    def _achievable(self, recipe: Recipe) -> tuple[float, ...]:
        """Ratios whose widths differ, ascending: whole units of the alignment go."""
        dense = self.bench.runner.dense_shape.ffn_widths
        total, step = sum(dense), recipe.align
        if self.limits.config.prune.uniform_width:
            step *= len(dense)
        units = sum(width // recipe.align for width in dense) * recipe.align // step
        ratios = [round(1 - kept * step / total, 6) for kept in range(units, 0, -1)]
        low, high = self.tune.min_prune_ratio, self.tune.max_prune_ratio
        least = len(dense) * recipe.align / total
        found = tuple(r for r in ratios if low <= r <= high and 1 - r >= least)
        if not found:
            raise InputError(
                f"widths in multiples of {recipe.align} reach no prune ratio from {low:g} to {high:g}",
                field="tune.aligns",
                value=recipe.align,
            )
        return found


def _first(count: int, holds: Callable[[int], bool]) -> int | None:
    """The first number for which something holds that holds for all after it; None where it holds for none."""
    if not count or not holds(count - 1):
        return None
    low, high = -1, count - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _between(guess: int, low: int, high: int) -> int:
    """A guess kept inside (low, high), a little away from both where there is room."""
    margin = max(1, round(_EDGE * (high - low)))
    return min(max(guess, low + margin), max(high - margin, low + 1))
