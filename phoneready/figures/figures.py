"""Figures of a release: the table of metrics, figures.json, budgets, and what these say of each figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import pydantic

from cfsp import plugins
from cfsp.errors import InputError
from cfsp.evaluation.task_results import Right
from cfsp.records import read_record
from cfsp.units import format_bytes, parse_bytes, parse_ms
from cfsp.validation import Section, Seed, as_value_error
from runtime_bench.records.bench_record import MeasuredOn
from runtime_bench.records.compare import Samples
from runtime_bench.records.pairs import Windows
from runtime_bench.records.summary import RatioInterval

CHECKPOINT = "checkpoint"  # the item that is the pruned (and recovered) model before export
SHIPPED, DENSE = "shipped", "dense"
FILE, BENCH, PROJECTION = "file", "bench", "projection"
TEXT, TASK, ANSWERS, OWN = "text", "task", "answers", "own"
ENERGY_OF = "joules_"  # begins the energy of a rate: joules_tg128
ANY_MEMBER = ".*"  # ends the planned name of an own metric, whose figures are known after it ran
FIGURES_FILE, VERDICTS_FILE = "figures.json", "verdicts.json"
OUTCOMES = MISSED, INCONCLUSIVE, PASS = "missed", "inconclusive", "pass"  # the worst first
UNJUDGED = "not judged"  # the outcome of a release without budgets


class Metric(NamedTuple):
    name: str  # as budgets and records write it
    title: str  # as tables for people call it
    help: str
    source: str  # FILE, BENCH, PROJECTION, TEXT, TASK, ANSWERS or OWN
    unit: str = ""  # as in BudgetVerdict
    higher_is_better: bool | None = False  # None: its function says it, or nobody does
    sized: bool = False  # a number of tokens follows the name
    sampled: bool = False  # the median of noisy samples: ratios have an interval, differences have none
    metered: bool = False  # low and high are the error of a meter, beside the noise of the samples
    against_dense: bool = True  # a divergence from the dense model is relative to it already
    tolerance: float | None = None  # how much worse than its baseline `eval --baseline` lets it be
    tolerates_ratio: bool = False  # the tolerance is of now / baseline; else of their difference

    @property
    def margin(self) -> float:
        """The tolerance as a share, if it is of a ratio."""
        return (self.tolerance or 0.0) - self.tolerates_ratio

    @property
    def is_speed(self) -> bool:
        return self.source == BENCH and self.unit in ("ms", "t/s")


_ROWS = (
    Metric("file_bytes", "file size", "size of an exported file; of an ONNX folder, graph and weights", FILE, "bytes"),
    Metric("peak_rss_bytes", "peak memory (RSS)", "most resident memory of any process", BENCH, "bytes", sampled=True),
    Metric("load", "loading", "opening the file", BENCH, "ms", sampled=True),
    Metric("ttft", "time to first token", "after a prompt of N tokens", BENCH, "ms", sized=True, sampled=True),
    Metric("pp", "prompt processing", "reading a prompt of N tokens", BENCH, "t/s", True, sized=True, sampled=True),
    Metric("tg", "generation", "generating N tokens", BENCH, "t/s", True, sized=True, sampled=True),
    Metric(
        f"{ENERGY_OF}pp", "energy of prompt processing", "joules per token, with `bench.energy`",
        BENCH, "J", sized=True, sampled=True, metered=True,
    ),
    Metric(
        f"{ENERGY_OF}tg", "energy of generation", "the same of generating N tokens",
        BENCH, "J", sized=True, sampled=True, metered=True,
    ),
    Metric(
        "perplexity", "perplexity", "exp of the mean loss on a text", TEXT, tolerance=1.02, tolerates_ratio=True,
    ),
    Metric(
        "bits_per_byte", "bits per byte", "loss on a text over its bytes, whatever the vocabulary", TEXT, "bits",
        tolerance=1.02, tolerates_ratio=True,
    ),
    Metric(
        "tokens_per_byte", "tokens per byte", "tokens of its tokenizer over a text's bytes: its time and context",
        TEXT, "tokens", tolerance=1.02, tolerates_ratio=True,
    ),
    Metric(
        "perplexity_ratio", "perplexity ratio", "perplexity over the dense model's on the same tokens", TEXT, "x",
        against_dense=False,
    ),
    Metric(
        "kl_mean", "KL mean", "mean KL(dense || model) over tokens", TEXT, "nats",
        against_dense=False, tolerance=0.01,
    ),
    Metric(
        "kl_p99_9", "KL p99.9", "99.9th percentile of KL(dense || model)", TEXT, "nats", against_dense=False,
    ),
    Metric(
        "same_top1", "same top-1", "tokens for which both put the same one first", TEXT, "share", True,
        against_dense=False, tolerance=0.01,
    ),
    Metric("accuracy", "accuracy", "share of right answers of a task", TASK, "share", True, tolerance=0.02),
    Metric("mean_accuracy", "mean accuracy", "mean over all tasks", TASK, "share", True),
    Metric(
        "degenerate", "degenerate answers", "answers that are empty, loop, echo or are no language", ANSWERS, "share",
        tolerance=0.05,
    ),
    Metric("projected_memory_bytes", "projected memory", "what a GGUF file would need there", PROJECTION, "bytes"),
    Metric("projected_pp", "projected prompt processing", "speed there, a band", PROJECTION, "t/s", True),
    Metric("projected_tg", "projected generation", "speed there, a band", PROJECTION, "t/s", True),
)  # fmt: skip
METRICS: Mapping[str, Metric] = MappingProxyType({row.name: row for row in _ROWS})
"""Name -> metric, which budgets, `eval --baseline`, history, reports and the documentation read."""
OWN_METRIC = Metric(
    "MODULE:FUNCTION", "own metric", "what evaluate.metrics names; it says its unit and direction itself", OWN,
    higher_is_better=None, against_dense=False, tolerance=0.02,
)  # fmt: skip
TOLERANCES: Mapping[str, float] = MappingProxyType(
    {row.name: row.tolerance for row in _ROWS if row.tolerance is not None} | {"own": 0.02}
)
"""Key of `eval --tolerance` -> its default; `own` means all own metrics."""


def metric_of(name: str) -> Metric:
    """The metric that a name such as `tg128` means; raises InputError if there is none."""
    row = recorded_metric(name)
    if (
        row is not OWN_METRIC
        or ":" in name
        or own_reference(name) in plugins.load_plugins(plugins.METRICS, METRICS)
    ):
        return row
    rows = (*METRICS.values(), OWN_METRIC)
    names = ", ".join(f"{row.name}N" if row.sized else row.name for row in rows)
    raise InputError("unknown metric", field="metric", value=name, allowed=names)


def recorded_metric(name: str) -> Metric:
    """The metric of a recorded figure; an own one may have gone since."""
    row, sized = METRICS.get(name), METRICS.get(name.rstrip("0123456789"))
    if row is not None and not row.sized:
        return row
    return sized if sized is not None and sized.sized and sized.name != name else OWN_METRIC


def metrics_from(source: str) -> tuple[str, ...]:
    return tuple(row.name for row in METRICS.values() if row.source == source)


def own_reference(name: str) -> str:
    """`module:function`, or the plugin, of an own metric's figure, such as `module:function.key`."""
    module, colon, function = name.rpartition(":")
    return module + colon + function.partition(".")[0]


def means(wanted: str, name: str) -> bool:
    """Whether a figure's metric is one that is wanted; `module:function` means all figures of that function."""
    planned = name.endswith(ANY_MEMBER) and own_reference(wanted) + ANY_MEMBER == name
    return name == wanted or planned or name.startswith(f"{wanted}.")


@dataclass(frozen=True)
class FigureKey:
    """Which figure; the same in every release of the same configuration."""

    metric: Annotated[str, pydantic.Field(min_length=1, max_length=300)]  # with its number of tokens
    item: str  # quantization, ONNX variant, or CHECKPOINT
    place: str | None = None  # target or device, if it depends on one
    n_threads: int | None = None  # of benchmarks, unless they are left to the target
    on: str | None = None  # text (`text builtin:python-docs`) or task; None for all tasks

    @property
    def threads(self) -> str | None:
        return f"{self.n_threads} thread{'s' if self.n_threads != 1 else ''}" if self.n_threads else None

    def describe(self) -> str:
        on = f"of {self.on}" if self.on else None
        return ", ".join(filter(None, (self.metric, self.item, self.place, self.threads, on)))


def measured_place(target: str) -> str:
    """A target without the options that change no figure: `ssh:board,retries=5` is `ssh:board`."""
    name, *options = target.split(",")
    kept = [
        option for option in options if option.partition("=")[0] not in ("retries", "folder", "ndk", "config")
    ]
    return ",".join((name, *kept))


@dataclass(frozen=True)
class Figure:
    """One figure of a release, of SHIPPED or of the DENSE model that it is compared with."""

    key: FigureKey
    role: str
    subject: str  # the file or checkpoint, by name
    unit: str
    value: float | None  # None if it could not be found; `failure` says why
    kind: str = "exact"  # or as in benchmark records, as are target and backends
    target: str | None = None
    samples: Samples | None = (
        None  # what it is the median of, as judged: less is better, so of a speed 1 / value
    )
    stderr: float | None = None  # of accuracies
    low: float | None = None  # of bands, and by a meter's error
    high: float | None = None
    failure: str | None = None
    conditions: dict[str, str] = field(default_factory=dict)  # equal for two figures that are comparable
    higher_is_better: bool | None = None  # of own metrics that state it
    backends: str | None = None
    right: tuple[Right, ...] = ()  # for each task, which of its items were answered rightly
    windows: Windows | None = None  # of text, what each of its windows adds
    measured_on: MeasuredOn | None = None  # whether samples were added until budgets were decided
    anchor: Samples | None = None  # of the file that took turns with it, to compare other sessions by

    @property
    def is_estimate(self) -> bool:
        """Whether it stands for more items than were asked."""
        return recorded_metric(self.key.metric).source == TASK or self.stderr is not None

    def in_unit(self, of_speeds: RatioInterval) -> RatioInterval:
        """What was found of speeds, which are 1 / samples, in the figure's own unit or as its ratio."""
        if recorded_metric(self.key.metric).higher_is_better:
            return of_speeds
        return RatioInterval(1 / of_speeds.ratio, 1 / of_speeds.high, 1 / of_speeds.low)


@dataclass(frozen=True)
class FigureSet:
    """figures.json: all figures of a release, with the dense model's reference and its weights' hash, if known."""

    KIND: ClassVar[str] = "release-figures"
    SCHEMA_VERSION: ClassVar[int] = 4

    source: str
    source_sha256: str | None
    seed: Seed
    figures: tuple[Figure, ...]

    def by_key(self, role: str) -> dict[FigureKey, Figure]:
        return {figure.key: figure for figure in self.figures if figure.role == role}


def read_baseline(path: Path, wanted: Iterable[FigureKey]) -> FigureSet:
    """An earlier release's figures; raises InputError if one that is wanted is missing, or one cannot be."""
    baseline = read_record(FigureSet, path)
    for figure in baseline.figures:
        samples = figure.samples.times if figure.samples else ()
        values = [value for value in (figure.value, *samples) if value is not None]
        if recorded_metric(figure.key.metric) is not OWN_METRIC and min(values, default=0) < 0:
            raise InputError(
                f"{path}: no figure: {figure.key.describe()}", value=min(values), allowed="0 or more"
            )

    def is_there(planned: FigureKey) -> bool:
        """Planned tasks and figures of own metrics are not named yet."""
        return any(
            means(found.metric, planned.metric)
            and replace(found, metric="", on=None) == replace(planned, metric="", on=None)
            and (found.on == planned.on or (found.metric == "accuracy" and planned.on is None))
            for found in baseline.by_key(SHIPPED)
        )

    missing = [key.describe() for key in wanted if not is_there(key)]
    if missing:
        raise InputError(f"{path} has no {'; no '.join(dict.fromkeys(missing))}", field="baseline.file")
    return baseline


def check_same_model(baseline: FigureSet, source: str, sha256: str | None, where: Path) -> None:
    known = baseline.source_sha256 and sha256
    before, now = (baseline.source_sha256, sha256) if known else (baseline.source, source)
    if before != now:
        raise InputError(
            f"{where} is of another model: {baseline.source} ({baseline.source_sha256})",
            field="baseline.file",
            allowed=f"a release of {source} ({sha256})",
        )


class BudgetConfig(Section):
    """A limit on figures of one metric: of all that have it, or of those that all selectors name."""

    metric: str
    files: tuple[str, ...] = ()  # quantizations, variants or `checkpoint`
    targets: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    threads: tuple[int, ...] = ()
    on: tuple[str, ...] = ()  # `text`, `chats`, a reference or a task
    at_most: float | str | None = None  # in the metric's unit, or with its unit, such as "80 MB"
    at_least: float | str | None = None
    relative_to: Literal["dense", "baseline"] | None = None  # what the limit is a multiple of
    difference: bool = False  # the limit is on figure minus reference

    @pydantic.field_validator("metric")
    @classmethod
    def _known(cls, name: str) -> str:
        as_value_error(lambda: metric_of(name))
        return name

    @pydantic.field_validator("targets")
    @classmethod
    def _places(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(measured_place, targets))

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
            raise ValueError(f"{self.metric} needs a limit; allowed: one of at_most and at_least")
        if self.relative_to == "dense" and not metric.against_dense:
            known = "is not taken of the dense model" if metric.source == OWN else "is relative to it already"
            raise ValueError(f"relative_to: {self.metric} {known}; allowed: baseline")
        if self.difference and self.relative_to is None:
            raise ValueError("difference: needs relative_to")
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
        return self.at_most is not None

    @property
    def limit(self) -> float:
        """The limit, in the metric's unit or as a ratio."""
        if not isinstance(self._written, str):
            return float(self._written)
        name, text = "at_most" if self.is_upper else "at_least", self._written
        if self.is_ratio:
            raise InputError("a ratio is a number", field=name, value=text, allowed="such as 1.05")
        unit = metric_of(self.metric).unit
        if unit not in ("bytes", "ms"):
            raise InputError("needs a number", field=name, value=text)
        return parse_bytes(text, name) if unit == "bytes" else parse_ms(text, name)

    @property
    def is_ratio(self) -> bool:
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
    """The figures that a budget limits: of every file that ships, or of those that it names, such as CHECKPOINT."""
    return [
        key
        for key in keys
        if means(budget.metric, key.metric)
        and (key.item != CHECKPOINT or CHECKPOINT in budget.files)
        and all(fits(key, names, getattr(budget, field)) for field, names in SELECTORS.items())
    ]


_Names = Callable[[FigureKey], tuple[str | int | None, ...]]
_ANY = "any task"  # what is planned of tasks before they are read


def fits(key: FigureKey, names: _Names, wanted: Sequence[str | int]) -> bool:
    """Whether a figure has one of the wanted names, or none are wanted."""
    return not wanted or _ANY in names(key) or any(name in wanted for name in names(key))


def _names_on(key: FigureKey) -> tuple[str | int | None, ...]:
    if key.on is None:
        return (_ANY if key.metric == "accuracy" else None,)
    kind, _, source = key.on.partition(" ")
    return (key.on, kind, source)


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


@dataclass(frozen=True)
class BudgetVerdict:
    """One figure held against its budget: an outcome of OUTCOMES, and a sentence that says why.

    `limit` is for people, such as `at most 1.05 x dense`; value and interval are in `unit`: `bytes`, `ms`, `t/s`, `J`,
    `nats`, `share`, `x` for a ratio, or nothing.
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
    """verdicts.json: every budget of a release, and the worst outcome of all; `not judged` without budgets."""

    KIND: ClassVar[str] = "verdicts"
    SCHEMA_VERSION: ClassVar[int] = 2

    outcome: str
    source: str
    source_sha256: str | None
    baseline: str | None
    verdicts: tuple[BudgetVerdict, ...]


def format_figure(value: float | None, unit: str) -> str:
    """A figure for people, such as `83.4 MiB`, `57.2 ms` or `1.05 x`; a dash for what is not known."""
    if value is None:
        return "-"
    if unit == "bytes":
        return format_bytes(value)
    return f"{value:.4g}" if unit in ("", "share") else f"{value:.4g} {unit}"
