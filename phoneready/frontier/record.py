"""What was measured of files, and frontier.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cfsp.errors import InputError
from cfsp.evaluation.task_results import TaskResult
from cfsp.validation import Seed, Share
from phoneready.evaluation.dominance import Best, Choice, Standing, best_of
from phoneready.evaluation.measured_file import MeasuredFile
from phoneready.settings.schema import RecoverConfig
from phoneready.settings.structures import Structures


@dataclass(frozen=True)
class Speed:
    """How fast a file writes, and what that takes.

    Attributes:
        test: The workload.
        n_threads: Threads.
        tokens_per_second: Median of the samples; None where it could not be measured.
        low: Their slowest tenth.
        high: Their fastest tenth.
        peak_rss_bytes: Most resident memory; None where unknown.
        failure: Why it could not be measured.
        times: Speed over that of the dense Q4_0 file, which took turns with it: the quotient of medians; None where
            either failed or it is too noisy to tell.
        times_low: Lower end of the 95 % interval.
        times_high: Upper end.
        in_turns: Whether that file took turns with it.
    """

    test: str
    n_threads: int
    tokens_per_second: float | None
    low: float | None
    high: float | None
    peak_rss_bytes: int | None
    failure: str | None = None
    times: float | None = None
    times_low: float | None = None
    times_high: float | None = None
    in_turns: bool = False


@dataclass(frozen=True)
class FrontierPoint(MeasuredFile, Structures):
    """A file and its figures; it may have been deleted. The structures are what went beside FFN channels.

    Attributes:
        quant: Quantization.
        prune_ratio: Share of FFN channels that was to go.
        removed: Share that went, after alignment.
        allocation: As prune.allocation.
        align: Widths are multiples of it.
        expected_bytes: What its size was computed to be before it was made, where a size limited it.
        speed: How fast it is, where that was asked for.
        seconds: Time it took to make and measure.
        recovered: Whether it was trained after pruning.
        tasks: What it does of tasks, where any were asked for.
    """

    KIND: ClassVar[str] = "frontier-point"
    SCHEMA_VERSION: ClassVar[int] = 1

    quant: str
    prune_ratio: Share
    removed: Share
    allocation: str
    align: int
    expected_bytes: int | None
    speed: Speed | None
    seconds: float
    recovered: bool = False
    tasks: tuple[TaskResult, ...] = ()

    def __post_init__(self) -> None:
        if Path(self.file).name != self.file or not self.file.endswith(".gguf"):  # it may be deleted
            raise InputError("not the name of a GGUF file", field="file", value=self.file)

    @property
    def is_dense(self) -> bool:
        """Whether nothing was removed."""
        return self.is_whole and not self.prune_ratio

    @property
    def model(self) -> str:
        """What was done to it, for people."""
        return model_label(self, self.prune_ratio, self.recovered)

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding; None where it is not known."""
        return self.speed.tokens_per_second if self.speed else None

    @property
    def times(self) -> float | None:
        """Decoding, times the speed of the dense Q4_0 file; None where it is not known."""
        return self.speed.times if self.speed else None

    @property
    def label(self) -> str:
        """The file, for people."""
        return f"{self.model} {self.quant}"


@dataclass(frozen=True)
class SpeedChoice(Best):
    """The best file of a decode speed.

    Attributes:
        times: The speed: no file is slower than so many times the dense Q4_0 file.
    """

    times: float


@dataclass(frozen=True)
class Frontier:
    """frontier.json.

    Attributes:
        source: Reference of the dense model.
        source_sha256: Hash of its weights, where known.
        seed: Of everything drawn.
        calibration: References of the calibration text.
        vocabulary_text: Text whose tokens were counted; the calibration's where empty.
        points: All files that were measured, by size.
        standings: One for each, in that order.
        choices: The best file at each size that was asked for.
        left_out: Files that were not made, and why.
        failed: Files that could not be made, and why.
        open: Files that are still to be measured.
        kept: Files that lie in the folder.
        speed_choices: The best file at each speed that was asked for, where any could be held against dense Q4_0.
        recovery: How models were trained, where any were.
    """

    KIND: ClassVar[str] = "frontier"
    SCHEMA_VERSION: ClassVar[int] = 2

    source: str
    source_sha256: str | None
    seed: Seed
    calibration: tuple[str, ...]
    vocabulary_text: tuple[str, ...]
    points: tuple[FrontierPoint, ...]
    standings: tuple[Standing, ...]
    choices: tuple[Choice, ...]
    left_out: tuple[str, ...]
    failed: tuple[str, ...]
    open: tuple[str, ...]
    kept: tuple[str, ...]
    speed_choices: tuple[SpeedChoice, ...] = ()
    recovery: RecoverConfig | None = None

    def find(self, file: str | None) -> FrontierPoint | None:
        """The file of a name."""
        return next((point for point in self.points if point.file == file), None)


def choose_by_speed(points: Sequence[FrontierPoint], times: Iterable[float]) -> tuple[SpeedChoice, ...]:
    """The best file that decodes so many times as fast as the dense Q4_0 file, by medians; empty without any speed."""
    if not any(point.times for point in points):
        return ()
    choices = []
    for factor in times:
        best = best_of(point for point in points if (point.times or 0.0) >= factor)
        choices.append(SpeedChoice(best.best, best.dense, best.excess, factor))
    return tuple(choices)


def model_label(structures: Structures, prune_ratio: float, recovered: bool) -> str:
    """What was done to the dense model, for people."""
    parts = structures.words
    parts += [f"FFN -{100 * prune_ratio:g} %"] if prune_ratio else []
    parts += ["recovered"] if recovered else []
    return ", ".join(parts) or "dense"
