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

QUALITY, COST = "quality", "cost"
"""What gets worse with every channel that goes, and what gets better."""


def family(metric: str) -> str:
    """QUALITY or COST."""
    return QUALITY if metric_of(metric).is_quality else COST


def objective_item(tune: TuneConfig, item: str) -> str:
    """Whose divergence is minimized: the file's or the checkpoint's."""
    return CHECKPOINT if tune.judge == CHECKPOINT else item


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
    def family(self) -> str:
        """QUALITY or COST."""
        return family(self.budget.metric)

    @property
    def name(self) -> str:
        """The same at every point, whatever its file is called."""
        whose = CHECKPOINT if self.verdict.subject == CHECKPOINT else "file"
        return " ".join((self.verdict.metric, whose, self.verdict.target or "", self.budget.describe()))

    @property
    def label(self) -> str:
        """The figure's name in tables."""
        return self.verdict.metric + (f" on {self.verdict.target}" if self.verdict.target else "")

    @property
    def missed(self) -> bool:
        """Whether the whole interval is beyond the limit."""
        return self.verdict.outcome == MISSED

    @property
    def excess(self) -> float:
        """How far beyond the limit, relative to it; negative within it, inf of a figure that is not known."""
        limit, value = self.budget.limit, self.verdict.value
        if value is None:
            return math.inf
        sign = 1 if self.budget.is_upper else -1
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
        return tuple(one for one in self.held if one.missed)

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
        return max((one.excess for one in self.missed), default=0.0)

    def meets_family(self, name: str) -> bool:
        """Whether it misses none of QUALITY or of COST."""
        return not any(one.family == name for one in self.missed)

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

    def budgets(self, point: Point) -> tuple[BudgetConfig, ...]:
        """Those that a point has to meet."""
        return config_of(self.config, point).budgets

    def wanted(self, point: Point) -> tuple[FigureKey, ...]:
        """The figures that budgets limit at a point."""
        config = config_of(self.config, point)
        keys = [key for key in planned_figures(config) if key.item in (point.recipe.item, CHECKPOINT)]
        return tuple(dict.fromkeys(key for budget in config.budgets for key in select(budget, keys)))

    def exact(self, point: Point) -> tuple[FigureKey, ...]:
        """Those of them that widths alone settle."""
        return tuple(
            key for key in self.wanted(point) if metric_of(key.metric).is_exact and point.recipe.is_sized
        )

    def relative(self, point: Point) -> tuple[FigureKey, ...]:
        """Those that need the dense model's figure beside them."""
        keys = self.wanted(point)
        budgets = [b for b in self.budgets(point) if b.relative_to == "dense"]
        return tuple(dict.fromkeys(key for budget in budgets for key in select(budget, keys)))

    def judge(self, point: Point, figures: Iterable[Figure]) -> Judged:
        """Hold a point's figures against its budgets; a budget without a figure yet is passed over.

        Args:
            point: The point.
            figures: Its figures, and the dense model's.
        """
        wanted = self.wanted(point)
        known = [figure for figure in figures if any(same_figure(key, figure.key) for key in wanted)]
        found = FigureSet(self.config.model.reference, None, self.config.seed, tuple(known))
        present = [figure.key for figure in known]
        return Judged(
            tuple(
                BudgetCheck(budget, verdict)
                for budget in self.budgets(point)
                if select(budget, present)
                for verdict in judge_all([budget], found, self.baseline)
            )
        )
