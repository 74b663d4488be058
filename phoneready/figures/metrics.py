"""The metrics: one row each, which budgets, `eval --baseline`, history, reports and the documentation read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated

import pydantic

from cfsp import plugins
from cfsp.errors import InputError

CHECKPOINT = "checkpoint"
"""The item that is the pruned (and recovered) model before export."""

FILE, BENCH, PROJECTION = "file", "bench", "projection"
TEXT, TASK, ANSWERS, OWN = "text", "task", "answers", "own"
"""Where figures come from."""
ENERGY_OF = "joules_"
"""Begins the names of what a rate of that name takes: joules_tg128."""
ANY_MEMBER = ".*"
"""Ends the planned name of an own metric: which figures its function returns is known when it has run."""


@dataclass(frozen=True)
class Metric:
    """A kind of figure.

    Attributes:
        name: As budgets and records write it.
        title: As tables for people call it.
        help: What it is.
        source: Where it comes from: FILE, BENCH, PROJECTION, TEXT, TASK, ANSWERS or OWN.
        unit: As in BudgetVerdict.
        higher_is_better: Its direction; None where the metric itself says it, or nobody does.
        sized: A number of tokens follows the name.
        sampled: A figure is the median of noisy samples: ratios have an interval, differences have none.
        metered: A figure's low and high are what its meter may be wrong, beside the noise of its samples.
        against_dense: Whether it can be given relative to the dense model's; a divergence from that model cannot.
        tolerance: How much worse than its baseline `eval --baseline` lets it be; None of what is not compared there.
        tolerates_ratio: The tolerance is of now / baseline; else of the difference between them.
    """

    name: str
    title: str
    help: str
    source: str
    unit: str = ""
    higher_is_better: bool | None = False
    sized: bool = False
    sampled: bool = False
    metered: bool = False
    against_dense: bool = True
    tolerance: float | None = None
    tolerates_ratio: bool = False

    @property
    def is_speed(self) -> bool:
        """Whether it is measured in time."""
        return self.source == BENCH and self.unit in ("ms", "t/s")


_ROWS = (
    Metric("file_bytes", "file size", "size of an exported file; of an ONNX folder, graph and weights", FILE, "bytes"),
    Metric("peak_rss_bytes", "peak memory (RSS)", "most resident memory of any process", BENCH, "bytes", sampled=True),
    Metric("load", "loading", "opening the file", BENCH, "ms", sampled=True),
    Metric("ttft", "time to first token", "after a prompt of N tokens", BENCH, "ms", sized=True, sampled=True),
    Metric("pp", "prompt processing", "reading a prompt of N tokens", BENCH, "t/s", True, sized=True, sampled=True),
    Metric("tg", "generation", "generating N tokens", BENCH, "t/s", True, sized=True, sampled=True),
    Metric(
        f"{ENERGY_OF}pp", "energy of prompt processing", "joules a token, with `bench.energy`",
        BENCH, "J", sized=True, sampled=True, metered=True,
    ),
    Metric(
        f"{ENERGY_OF}tg", "energy of generation", "the same of generating N tokens",
        BENCH, "J", sized=True, sampled=True, metered=True,
    ),
    Metric(
        "perplexity", "perplexity", "exp of the mean loss on a text", TEXT,
        tolerance=1.02, tolerates_ratio=True,
    ),
    Metric(
        "bits_per_byte", "bits per byte", "loss on a text over its bytes, whatever the vocabulary", TEXT, "bits",
        tolerance=1.02, tolerates_ratio=True,
    ),
    Metric(
        "tokens_per_byte", "tokens per byte", "tokens of its tokenizer over a text's bytes: its time and context",
        TEXT, "tokens",
        tolerance=1.02, tolerates_ratio=True,
    ),
    Metric(
        "perplexity_ratio", "perplexity ratio", "perplexity over the dense model's on the same tokens", TEXT, "x",
        against_dense=False,
    ),
    Metric(
        "kl_mean", "KL mean", "mean KL(dense || model) over tokens", TEXT, "nats",
        against_dense=False,
        tolerance=0.01,
    ),
    Metric(
        "kl_p99_9", "KL p99.9", "99.9th percentile of KL(dense || model)", TEXT, "nats",
        against_dense=False,
    ),
    Metric(
        "same_top1", "same top-1", "tokens for which both put the same one first", TEXT, "share", True,
        against_dense=False, tolerance=0.01,
    ),
    Metric(
        "accuracy", "accuracy", "share of right answers of a task", TASK, "share", True,
        tolerance=0.02,
    ),
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
"""Name -> metric; a number of tokens follows the name of the sized ones."""

OWN_METRIC = Metric(
    "MODULE:FUNCTION", "own metric", "what evaluate.metrics names; it says its unit and direction itself", OWN,
    higher_is_better=None, against_dense=False,
    tolerance=0.02,
)  # fmt: skip


def tolerance_name(metric: Metric) -> str:
    """What `eval --tolerance` calls a metric; one name means all own metrics."""
    return "own" if metric is OWN_METRIC else metric.name


TOLERANCES: Mapping[str, float] = MappingProxyType(
    {tolerance_name(row): row.tolerance for row in (*_ROWS, OWN_METRIC) if row.tolerance is not None}
)
"""Key of `eval --tolerance` -> its default."""


@dataclass(frozen=True)
class FigureKey:
    """Which figure; the same in every release of the same configuration.

    Attributes:
        metric: A name in METRICS, with its number of tokens.
        item: Quantization, ONNX variant, or CHECKPOINT.
        place: Target or device, as the configuration names it; None for what depends on no machine.
        n_threads: Of benchmarks; None if the configuration leaves them to the target.
        on: Text (`text builtin:python-docs`) or task; None for all tasks, or where there is neither.
    """

    metric: Annotated[str, pydantic.Field(min_length=1, max_length=300)]
    item: str
    place: str | None = None
    n_threads: int | None = None
    on: str | None = None

    @property
    def threads(self) -> str | None:
        """Their number for people; None if the configuration leaves them to the target."""
        return f"{self.n_threads} thread{'s' if self.n_threads != 1 else ''}" if self.n_threads else None

    def describe(self) -> str:
        """For people."""
        on = f"of {self.on}" if self.on else None
        return ", ".join(filter(None, (self.metric, self.item, self.place, self.threads, on)))


def metric_of(name: str) -> Metric:
    """The metric that a name such as `tg128` means.

    Raises:
        InputError: There is none.
    """
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
    """Names of the metrics that come from somewhere."""
    return tuple(row.name for row in METRICS.values() if row.source == source)


def own_reference(name: str) -> str:
    """`module:function`, or the plugin, of an own metric's figure, such as `module:function.key`."""
    module, colon, function = name.rpartition(":")
    return module + colon + function.partition(".")[0]


def means(wanted: str, name: str) -> bool:
    """Whether a figure's metric is one that is wanted.

    `module:function` means all figures of that function; planned, `module:function.*`, they may be any.
    """
    planned = name.endswith(ANY_MEMBER) and own_reference(wanted) + ANY_MEMBER == name
    return name == wanted or planned or name.startswith(f"{wanted}.")
