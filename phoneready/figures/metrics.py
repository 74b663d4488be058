"""What a release can be held to: the metrics, and which figures of them a configuration produces."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cfsp.errors import InputError

CHECKPOINT = "checkpoint"
"""The item that is the pruned (and recovered) model before export."""


@dataclass(frozen=True)
class Metric:
    """A kind of figure.

    Attributes:
        unit: As in BudgetVerdict.
        higher_is_better: Its direction.
        against_dense: Whether it can be given relative to the dense model's; a divergence from that model cannot.
        help: For people.
    """

    unit: str
    higher_is_better: bool
    against_dense: bool
    help: str


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "file_bytes": Metric("bytes", False, True, "size of an exported file; of an ONNX folder, graph and weights"),
        "peak_rss_bytes": Metric("bytes", False, True, "most resident memory of any benchmark process"),
        "load": Metric("ms", False, True, "opening the file"),
        "ttft": Metric("ms", False, True, "time to first token after a prompt of N tokens"),
        "pp": Metric("t/s", True, True, "speed of reading a prompt of N tokens"),
        "tg": Metric("t/s", True, True, "speed of generating N tokens"),
        "perplexity": Metric("", False, True, "on a text"),
        "perplexity_ratio": Metric("x", False, False, "perplexity over the dense model's on the same tokens"),
        "kl_mean": Metric("nats", False, False, "mean KL(dense || model) over tokens"),
        "kl_p99_9": Metric("nats", False, False, "99.9th percentile of that"),
        "same_top1": Metric("share", True, False, "tokens for which both put the same one first"),
        "accuracy": Metric("share", True, True, "of a task of lm-evaluation-harness"),
        "mean_accuracy": Metric("share", True, True, "mean over all tasks"),
        "degenerate": Metric("share", False, True, "answers that are empty, loop, echo, or are no language"),
        "projected_memory_bytes": Metric("bytes", False, True, "memory that a GGUF file would need on a device"),
        "projected_pp": Metric("t/s", True, True, "speed of reading a prompt there, a band"),
        "projected_tg": Metric("t/s", True, True, "speed of generating there, a band"),
    }
)  # fmt: skip
"""Name -> metric; ttft, pp and tg are followed by a number of tokens."""

SIZED = ("ttft", "pp", "tg")
_SAMPLED = frozenset((*SIZED, "load", "peak_rss_bytes"))
ON_TEXT = ("perplexity", "perplexity_ratio", "kl_mean", "kl_p99_9", "same_top1")
ON_DEVICE = ("projected_memory_bytes", "projected_pp", "projected_tg")


@dataclass(frozen=True)
class FigureKey:
    """Which figure; the same in every release of the same configuration.

    Attributes:
        metric: A name in METRICS, with its number of tokens.
        item: Quantization, ONNX variant, or CHECKPOINT.
        place: Target or device, as the configuration names it; None for what depends on no machine.
        n_threads: Threads, of benchmarks; None where the configuration leaves them to the target.
        on: Text (`text builtin:python-docs`) or task; None for all tasks, or where there is neither.
    """

    metric: str
    item: str
    place: str | None = None
    n_threads: int | None = None
    on: str | None = None

    def describe(self) -> str:
        """For people."""
        threads = f"{self.n_threads} thread{'s' if self.n_threads != 1 else ''}" if self.n_threads else None
        on = f"of {self.on}" if self.on else None
        return ", ".join(filter(None, (self.metric, self.item, self.place, threads, on)))


def metric_of(name: str) -> Metric:
    """The metric that a name such as `tg128` means.

    Raises:
        InputError: There is none.
    """
    match = re.fullmatch(rf"({'|'.join(SIZED)})\d+", name)
    if match:
        return METRICS[match[1]]
    if name in SIZED or name not in METRICS:
        names = ", ".join(known + "N" if known in SIZED else known for known in METRICS)
        raise InputError("unknown metric", field="metric", value=name, allowed=names)
    return METRICS[name]


def is_sampled(name: str) -> bool:
    """Whether a metric is the median of noisy samples, of which ratios have an interval and differences have none."""
    return name.rstrip("0123456789") in _SAMPLED
