"""Which point to try next.

With every channel that goes, quality gets worse, and size, memory and time get better. So of each recipe (all of a
point but its ratio) one ratio is worth knowing: for the best quality the least at which all costs are within budget,
for the smallest file the largest at which all qualities are. What widths alone settle is settled without a trial; the
rest is predicted from the trials so far, tried, and closed in on. Among recipes the one that may turn out best goes
first, and one that is not expected to be better than the best so far is not tried at all.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cfsp.errors import InputError, LimitError
from phoneready.settings.schema import SIZE
from phoneready.tune.forecast import Forecast, MeasuredPoint
from phoneready.tune.limits import Judged
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
        expected: The divergence that is expected of it, in nats.
        optimistic: What it may reach: nats, or bytes.
        why: For people.
    """

    point: Point
    expected: Prediction | None
    optimistic: float
    why: str


class Searcher:
    """Chooses points.

    Args:
        bench: Knows the budgets and the goal, and sizes without trials.
        recipes: What to choose from.
    """

    def __init__(self, bench: Bench, recipes: Sequence[Recipe]) -> None:
        self._bench, self._recipes, self._tune = bench, recipes, bench.limits.tune
        self._exact = functools.cache(self._judge_exact)
        self._points = functools.cache(self._achievable)

    def best(self, tried: Iterable[MeasuredPoint]) -> MeasuredPoint | None:
        """The best point so far that meets all budgets; of equals the earlier."""
        meeting = [one for one in tried if one.judged.meets]
        return min(meeting, key=self._objective, default=None)

    def leave_out(self) -> tuple[str, ...]:
        """Give up recipes whose files cannot be, such as those that llama.cpp has no architecture for; why, of each.

        Raises:
            InputError: None is left.
        """
        refused: dict[Recipe, InputError] = {}
        for recipe in self._recipes:
            try:
                self._exact(self._points(recipe)[0])
            except InputError as error:
                refused[recipe] = error
        if len(refused) == len(self._recipes):
            raise next(iter(refused.values()))
        self._recipes = [recipe for recipe in self._recipes if recipe not in refused]
        return tuple(map(str, refused.values()))

    def check_hope(self) -> None:
        """Raise LimitError where no point can meet what widths settle: names the closest, and what it misses."""
        if any(self._feasible(recipe) for recipe in self._recipes):
            return
        ends = [self._points(recipe)[-1] for recipe in self._recipes]
        closest = min(ends, key=lambda point: self._exact(point).violation)
        missed = self._exact(closest).describe()
        raise LimitError(f"no point can meet the budgets; closest is {closest.describe()}: {missed}")

    def next(self, tried: Sequence[MeasuredPoint], failed: Collection[Point] = ()) -> Candidate | None:
        """The next point to try; None where nothing is expected to be better.

        Args:
            tried: The trials so far.
            failed: Points that could not be made.
        """
        forecast = Forecast(tried)
        candidates = (self._candidate(recipe, tried, forecast) for recipe in self._recipes)
        promising = [c for c in candidates if c is not None and c.point not in failed]
        best = self.best(tried)
        if best is not None:
            bar = self._objective(best) * (1 - self._tune.tolerance)
            promising = [c for c in promising if c.optimistic < bar]
        return min(promising, key=lambda c: c.optimistic, default=None)

    def least_known(self, tried: Sequence[MeasuredPoint], failed: Collection[Point]) -> Candidate | None:
        """Of the best recipe so far, the point farthest from all that are known; None where all are."""
        best = self.best(tried) or min(tried, key=lambda one: one.judged.violation, default=None)
        failures = Counter(point.recipe for point in failed)
        recipe = best.point.recipe if best else min(self._recipes, key=lambda one: failures[one])
        known = {one.point for one in tried} | set(failed)
        taken = [point.prune_ratio for point in known if point.recipe == recipe]
        distance = {
            point: min((abs(point.prune_ratio - ratio) for ratio in taken), default=0.0)
            for point in self._feasible(recipe)
            if point not in known
        }
        if not distance:
            return None
        point = max(distance, key=lambda one: distance[one])
        return Candidate(point, Forecast(tried).divergence(point), 0.0, "to know the curve")

    def _objective(self, one: MeasuredPoint) -> float:
        """What is minimized: nats, or bytes."""
        return float(one.row.file_bytes) if self._tune.goal == SIZE else one.row.divergence

    def _feasible(self, recipe: Recipe) -> tuple[Point, ...]:
        """The points, from a least ratio on, at which everything that widths settle is within budget."""
        points = self._points(recipe)
        return points[bisect_left(points, True, key=lambda point: self._exact(point).meets) :]

    def _candidate(
        self, recipe: Recipe, tried: Sequence[MeasuredPoint], forecast: Forecast
    ) -> Candidate | None:
        points, feasible = self._points(recipe), self._feasible(recipe)
        if not feasible:
            return None
        same = [
            one for one in tried if (one.row.file, one.row.vocabulary) == (recipe.item, recipe.vocabulary)
        ]
        if any(one.judged.is_hopeless for one in same):
            return None
        known = {points.index(one.point): one.judged for one in tried if one.point in points}
        chosen = self._smallest if self._tune.goal == SIZE else self._best_quality
        index = chosen(points, len(points) - len(feasible), known, forecast)
        if index is None or index in known:
            return None
        point, expected = points[index], forecast.divergence(points[index])
        if self._tune.goal == SIZE:
            size = self._bench.runner.file_bytes(point)
            return Candidate(point, expected, float(size or 0), "may be the smallest file within the budgets")
        optimistic = expected.low if expected else 0.0
        return Candidate(point, expected, optimistic, "the least pruned file of its kind within the budgets")

    def _best_quality(
        self, points: Sequence[Point], first: int, known: Mapping[int, Judged], forecast: Forecast
    ) -> int | None:
        """The least ratio at which costs are within budget: below it they are not, above it quality is lost."""
        low = max([first - 1, *(i for i, judged in known.items() if judged.misses(quality=False))])
        high = min((i for i in known if i > low), default=len(points))
        if high - low <= 1:
            return None
        guess = bisect_left(points, True, first, key=lambda point: forecast.meets(point, quality=False))
        guess = min(guess, len(points) - 1)
        if low < first:
            # Nothing has failed yet: the least ratio itself is open.
            return guess if guess < high else first
        return _between(guess, low, high)

    def _smallest(
        self, points: Sequence[Point], first: int, known: Mapping[int, Judged], forecast: Forecast
    ) -> int | None:
        """The largest ratio at which qualities are within budget."""
        failed = [i for i, judged in known.items() if judged.misses(quality=True)]
        high = min(failed, default=len(points))
        low = max((i for i in known if i < high), default=first - 1)
        if high - low <= 1:
            return None
        if first <= low and high < len(points):
            loosest, tightest = points[low].prune_ratio, points[high].prune_ratio
            # The whole range between them is worth less than the tolerance.
            if (tightest - loosest) / (1 - loosest) < self._tune.tolerance:
                return None
        guess = bisect_left(points, True, key=lambda point: not forecast.meets(point, quality=True)) - 1
        if not known and not forecast.knows_quality:
            guess = first + (len(points) - first) // 3
        return _between(guess, low, high) if high < len(points) or low >= first else max(guess, first)

    def _judge_exact(self, point: Point) -> Judged:
        try:
            return self._bench.limits.judge(point, self._bench.exact_figures(point))
        except InputError as error:
            raise InputError(f"{point.describe()}: {error}") from error

    def _achievable(self, recipe: Recipe) -> tuple[Point, ...]:
        """The points whose widths differ, by ascending ratio: whole units of the alignment go."""
        whole = self._bench.runner.plan(Point(replace(recipe, align=1), 0.0))
        dense = [width for index, width in enumerate(whole.dense_widths) if index not in whole.gone]
        total, step = sum(dense), recipe.align
        if whole.settings.uniform_width:
            step *= len(dense)
        units = sum(width // recipe.align for width in dense) * recipe.align // step
        ratios = [round(1 - kept * step / total, 6) for kept in range(units, 0, -1)]
        low, high = self._tune.min_prune_ratio, self._tune.max_prune_ratio
        least = len(dense) * recipe.align / total
        points = tuple(Point(recipe, r) for r in ratios if low <= r <= high and 1 - r >= least)
        if not points:
            raise InputError(
                f"widths in multiples of {recipe.align} reach no prune ratio from {low:g} to {high:g}",
                field="tune.aligns",
                value=recipe.align,
            )
        return points


def _between(guess: int, low: int, high: int) -> int:
    """A guess kept inside (low, high), a little away from both where there is room."""
    margin = max(1, round(_EDGE * (high - low)))
    return min(max(guess, low + margin), max(high - margin, low + 1))
