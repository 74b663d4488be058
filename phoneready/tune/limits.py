"""Budgets as a search sees them: which are settled by widths alone, which have to be measured, who meets them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from phoneready.figures.budgets import BudgetConfig, select
from phoneready.figures.figure_set import Figure, FigureSet, same_figure
from phoneready.figures.gate import judge_all
from phoneready.figures.metrics import CHECKPOINT, FigureKey, metric_of
from phoneready.figures.verdict import INCONCLUSIVE, MISSED, BudgetVerdict, format_figure
from phoneready.settings.planned import planned_figures
from phoneready.settings.schema import ReleaseConfig, TuneConfig
from phoneready.tune.space import Point, config_of


@dataclass(frozen=True)
class BudgetCheck:
    """A figure held against a budget.

    Attributes:
        budget: The budget.
        verdict: What it says.
    """

    budget: BudgetConfig
    verdict: BudgetVerdict

    @property
    def is_quality(self) -> bool:
        """Whether it gets worse with every channel that goes; else it is a cost."""
        return metric_of(self.budget.metric).is_quality

    @property
    def name(self) -> str:
        """The same at every point, whatever its file is called."""
        whose = CHECKPOINT if self.verdict.subject == CHECKPOINT else "file"
        return " ".join((self.verdict.metric, whose, self.verdict.target or "", self.budget.describe()))

    @property
    def label(self) -> str:
        """The figure's name in tables."""
        return self.verdict.metric + (f" on {self.verdict.target}" if self.verdict.target else "")

    def excess(self, value: float | None) -> float:
        """How far a figure is beyond the limit, relative to it; negative within it, inf of one that is not known."""
        if value is None:
            return math.inf
        sign, limit = 1 if self.budget.is_upper else -1, self.budget.limit
        return sign * (value - limit) / (abs(limit) or 1.0)

    def describe(self) -> str:
        """For people."""
        v = self.verdict
        return f"{v.metric} of {v.subject} is {format_figure(v.value, v.unit)}, {v.limit}"


@dataclass(frozen=True)
class Judged:
    """A point held against the budgets.

    Attributes:
        held: One for every figure that a budget limits and that was found.
    """

    held: tuple[BudgetCheck, ...]

    @property
    def missed(self) -> tuple[BudgetCheck, ...]:
        """The budgets that it does not meet."""
        return tuple(one for one in self.held if one.verdict.outcome == MISSED)

    @property
    def meets(self) -> bool:
        """Whether it misses none; noise may leave some open."""
        return not self.missed

    @property
    def is_open(self) -> bool:
        """Whether noise leaves any open."""
        return any(one.verdict.outcome == INCONCLUSIVE for one in self.held)

    @property
    def violation(self) -> float:
        """How far it is from meeting the budget that it misses most, relative to it; 0 where it meets all."""
        return max((one.excess(one.verdict.value) for one in self.missed), default=0.0)

    @property
    def is_hopeless(self) -> bool:
        """Whether it misses a budget on what is the same at every ratio."""
        return any(metric_of(one.budget.metric).fixed for one in self.missed)

    def misses(self, *, quality: bool) -> bool:
        """Whether it misses a budget of a quality, or one of a cost."""
        return any(one.is_quality == quality for one in self.missed)

    def describe(self) -> str:
        """What is missed, for people."""
        return "; ".join(one.describe() for one in self.missed)


@dataclass(frozen=True)
class Limits:
    """The budgets of a configuration.

    Attributes:
        config: What is tuned.
        baseline: An earlier release's figures, where budgets are relative to them.
    """

    config: ReleaseConfig
    baseline: FigureSet | None = None

    @property
    def tune(self) -> TuneConfig:
        """What may vary, and what is best."""
        return self.config.tune or TuneConfig()

    def objective_item(self, point: Point) -> str:
        """Whose divergence is minimized: the file's or the checkpoint's."""
        return CHECKPOINT if self.tune.judge == CHECKPOINT else point.recipe.item

    def wanted(self, point: Point, relative_to: str | None = None) -> tuple[FigureKey, ...]:
        """The figures that budgets limit at a point: all, or those that are limited relative to something."""
        config = config_of(self.config, point)
        keys = [key for key in planned_figures(config) if key.item in (point.recipe.item, CHECKPOINT)]
        budgets = [one for one in config.budgets if relative_to in (None, one.relative_to)]
        return tuple(dict.fromkeys(key for budget in budgets for key in select(budget, keys)))

    def judge(self, point: Point, figures: Iterable[Figure]) -> Judged:
        """Hold a point's figures against its budgets; a budget without a figure yet is passed over.

        Args:
            point: The point.
            figures: Its figures, and the dense model's.
        """
        wanted = self.wanted(point)
        known = [figure for figure in figures if any(same_figure(key, figure.key) for key in wanted)]
        figure_set = FigureSet(self.config.model.reference, None, self.config.seed, tuple(known))
        present = [figure.key for figure in known]
        return Judged(
            tuple(
                BudgetCheck(budget, verdict)
                for budget in config_of(self.config, point).budgets
                if select(budget, present)
                for verdict in judge_all([budget], figure_set, self.baseline)
            )
        )
