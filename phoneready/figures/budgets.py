"""Budgets: what a release must keep to, and what they say of each of its figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal, Self

import pydantic

from cfsp.errors import InputError
from cfsp.units import format_bytes, parse_bytes, parse_ms
from cfsp.validation import Section, as_value_error
from phoneready.figures.metrics import OWN, FigureKey, means, metric_of

_PARSERS: Mapping[str, Callable[[str, str], float]] = MappingProxyType({"bytes": parse_bytes, "ms": parse_ms})


class BudgetConfig(Section):
    """A limit on figures of one metric.

    Attributes:
        files: Quantizations, variants or `checkpoint`; all that have the metric when empty. So are the others.
        on: `text`, `chats`, a reference or a task.
        at_most: Upper limit: a number in the metric's unit, or with its unit, such as "80 MB".
        relative_to: What the limit is a multiple of; the figure itself is limited if None.
        difference: The limit is on figure minus reference instead of figure over reference.
    """

    metric: str
    files: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    threads: tuple[int, ...] = ()
    on: tuple[str, ...] = ()
    at_most: float | str | None = None
    at_least: float | str | None = None
    relative_to: Literal["dense", "baseline"] | None = None
    difference: bool = False

    @pydantic.field_validator("metric")
    @classmethod
    def _known(cls, name: str) -> str:
        as_value_error(lambda: metric_of(name))
        return name

    @pydantic.field_validator("at_most", "at_least")
    @classmethod
    def _finite(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("not a finite number")
        return value

    @pydantic.model_validator(mode="after")
    def _one_limit(self) -> Self:
        metric = metric_of(self.metric)
        if metric.higher_is_better is not None:
            self.check_direction(metric.higher_is_better)
        elif (self.at_most is None) == (self.at_least is None):
            raise ValueError(f"{self.metric} wants a limit; allowed: one of at_most and at_least")
        if self.relative_to == "dense" and not metric.against_dense:
            known = "is not taken of the dense model" if metric.source == OWN else "is relative to it already"
            raise ValueError(f"relative_to: {self.metric} {known}; allowed: baseline")
        if self.difference and self.relative_to is None:
            raise ValueError("difference: wants relative_to")
        if self.difference and metric.sampled:
            raise ValueError(f"difference: {self.metric} is measured; allowed: a ratio")
        if isinstance(self._written, str):
            as_value_error(lambda: self.limit)
        return self

    def check_direction(self, higher_is_better: bool) -> None:
        """Raise ValueError for a limit to the good side of a metric."""
        wanted, other = ("at_least", "at_most") if higher_is_better else ("at_most", "at_least")
        if getattr(self, wanted) is None or getattr(self, other) is not None:
            better = "higher" if higher_is_better else "lower"
            raise ValueError(f"{self.metric} is better the {better} it is; allowed: {wanted} only")

    @property
    def is_upper(self) -> bool:
        """Whether the limit is an upper one."""
        return self.at_most is not None

    @property
    def limit(self) -> float:
        """The limit, in the metric's unit or as a ratio."""
        if not isinstance(self._written, str):
            return float(self._written)
        field, text = "at_most" if self.is_upper else "at_least", self._written
        if self.is_ratio:
            raise InputError("a ratio is a number", field=field, value=text, allowed="such as 1.05")
        parse = _PARSERS.get(metric_of(self.metric).unit)
        if parse is None:
            raise InputError("wants a number", field=field, value=text)
        return parse(text, field)

    @property
    def is_ratio(self) -> bool:
        """Whether the limit is a multiple of a reference."""
        return self.relative_to is not None and not self.difference

    def describe(self) -> str:
        """The limit for people, such as `at most 1.05 x dense`."""
        side = "at most" if self.is_upper else "at least"
        unit = "x" if self.is_ratio else metric_of(self.metric).unit
        written = self._written if isinstance(self._written, str) else format_figure(self.limit, unit)
        above = "above" if self.difference else None
        return " ".join(filter(None, (side, written, above, self.relative_to)))

    @property
    def _written(self) -> float | str:
        value = self.at_most if self.at_most is not None else self.at_least
        return 0.0 if value is None else value


def select(budget: BudgetConfig, keys: Iterable[FigureKey]) -> list[FigureKey]:
    """The figures that a budget limits, in the order given."""
    return [
        key
        for key in keys
        if means(budget.metric, key.metric)
        and all(fits(key, names, getattr(budget, field)) for field, names in SELECTORS.items())
    ]


_Names = Callable[[FigureKey], tuple[str | int | None, ...]]


def fits(key: FigureKey, names: _Names, wanted: Sequence[str | int]) -> bool:
    """Whether a figure has one of the wanted names, or none are wanted."""
    return not wanted or ANY in names(key) or any(name in wanted for name in names(key))


def _names_on(key: FigureKey) -> tuple[str | int | None, ...]:
    if key.on is None:
        return (ANY if key.metric == "accuracy" else None,)
    kind, _, source = key.on.partition(" ")
    return (key.on, kind, source)


ANY = "any task"
"""What is planned of tasks before they are read."""

SELECTORS: Mapping[str, _Names] = MappingProxyType(
    {
        "files": lambda key: (key.item,),
        "targets": lambda key: (key.place,),
        "devices": lambda key: (key.place,),
        "threads": lambda key: (key.n_threads,),
        "on": _names_on,
    }
)
"""Field of a budget -> the names by which it finds a figure."""


VERDICTS_FILE = "verdicts.json"

OUTCOMES = MISSED, INCONCLUSIVE, PASS = "missed", "inconclusive", "pass"
"""How a figure can stand to its budget, the worst first."""


@dataclass(frozen=True)
class BudgetVerdict:
    """One figure held against its budget: an outcome of OUTCOMES, and a sentence that says why.

    `limit` is the budget for people, such as `at most 1.05 x dense`; value and interval are in `unit`: `bytes`, `ms`,
    `t/s`, `J`, `nats`, `share`, `x` for a ratio, or nothing.
    """

    metric: str
    subject: str
    target: str | None
    limit: str
    value: float | None
    low: float | None
    high: float | None
    outcome: str
    reason: str
    unit: str = ""

    def figure(self) -> str:
        """The value for people, with its interval."""
        value = format_figure(self.value, self.unit)
        if self.low is None or self.high is None:
            return value
        return f"{value} ({format_figure(self.low, self.unit)} to {format_figure(self.high, self.unit)})"


@dataclass(frozen=True)
class Verdicts:
    """verdicts.json: every budget of a release, and the worst outcome of all; `pass` if there are no budgets."""

    KIND: ClassVar[str] = "verdicts"
    SCHEMA_VERSION: ClassVar[int] = 1

    outcome: str
    source: str
    source_sha256: str | None
    baseline: str | None
    verdicts: tuple[BudgetVerdict, ...]


def worst_outcome(verdicts: Sequence[BudgetVerdict]) -> str:
    """The worst outcome of several; `pass` of none."""
    return min((verdict.outcome for verdict in verdicts), key=OUTCOMES.index, default=PASS)


def format_figure(value: float | None, unit: str) -> str:
    """A figure for people, such as `83.4 MiB`, `57.2 ms` or `1.05 x`; a dash for what is not known."""
    if value is None:
        return "-"
    if unit == "bytes":
        return format_bytes(value)
    return f"{value:.4g}" if unit in ("", "share") else f"{value:.4g} {unit}"
