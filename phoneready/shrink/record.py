"""What shrinking found: a step after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cfsp.evaluation.task_results import TaskResult
from phoneready.evaluation.evaluation_record import TextResult
from phoneready.evaluation.figures import task_figures
from phoneready.figures.budgets import BudgetConfig
from phoneready.figures.figure_set import PRUNED
from phoneready.figures.gate import judge
from phoneready.figures.verdict import MISSED
from phoneready.shrink.settings import ShrinkSettings

START = 0
"""Number of the step before the first: nothing is removed."""
BASE_QUANT = "Q4_0"
"""The quantization whose file's size is told."""


@dataclass(frozen=True)
class ShrunkStep:
    """A model on the way.

    Attributes:
        number: Of the step; START for the model that the others are held against.
        checkpoint: Its folder, relative to that of the record.
        removed: Share of the dense model's FFN channels that is gone.
        vocabulary: Tokens that it knows.
        parameters: Its weights.
        file_bytes: Size that its GGUF file in `BASE_QUANT` will have; None where there is none.
        texts: The figures on each text, beside the start's.
        tasks: What it does of the tasks.
        shortcoming: Of its training, in words; None where it gained something, or where nothing was trained.
    """

    KIND: ClassVar[str] = "shrunk-step"
    SCHEMA_VERSION: ClassVar[int] = 1

    number: int
    checkpoint: str
    removed: float
    vocabulary: int
    parameters: int
    file_bytes: int | None
    texts: tuple[TextResult, ...]
    tasks: tuple[TaskResult, ...]
    shortcoming: str | None = None

    @property
    def accuracy(self) -> float | None:
        """Mean over the tasks; None without tasks that have one."""
        scores = [task.accuracy.value for task in self.tasks if task.accuracy is not None]
        return sum(scores) / len(scores) if scores else None

    def cannot_start(self, settings: ShrinkSettings) -> str | None:
        """What is wrong with it as the start, in words: an accuracy that no step can fall below."""
        if self.accuracy is None or self.accuracy > settings.max_accuracy_drop:
            return None
        return f"the start's accuracy in the tasks is {self.accuracy:.3f}: train it longer, or for the task (--task)"

    def worse_than(self, start: ShrunkStep, settings: ShrinkSettings) -> str | None:
        """Which limit it surely misses, in words; None where it keeps all, or the items are too few to tell."""
        most_lost = BudgetConfig(
            metric="mean_accuracy",
            relative_to="baseline",
            difference=True,
            at_least=-settings.max_accuracy_drop,
        )
        ours, theirs = (
            [f for f in task_figures("", PRUNED, "", one.tasks) if f.key.metric == most_lost.metric]
            for one in (self, start)
        )
        for now, before in zip(ours, theirs, strict=True):
            if judge(most_lost, now, before).outcome == MISSED:
                return f"accuracy is {now.value:.3f}, at the start {before.value:.3f}"
        most = settings.max_bits_ratio
        for text in self.texts if most is not None else ():
            own, dense = text.bits_per_byte, text.against_bits_per_byte
            if most is not None and own and dense and own > most * dense:
                return f"{text.source} takes {own / dense:.3f} times the start's bits per byte"
        return None


@dataclass(frozen=True)
class Shrunk:
    """All steps so far.

    Attributes:
        source: The model's reference.
        source_sha256: Hash of its weights.
        seed: Of everything that was drawn.
        settings: How far, in what steps, and where to stop.
        tokens: Training budget of each step in tokens; None where it is in epochs.
        steps: The start first.
        kept: Number of the last step within the limits.
        missed: Why it stopped before the end; None where it did not.
    """

    KIND: ClassVar[str] = "shrunk"
    SCHEMA_VERSION: ClassVar[int] = 1

    source: str
    source_sha256: str | None
    seed: int
    settings: ShrinkSettings
    tokens: int | None
    steps: tuple[ShrunkStep, ...]
    kept: int
    missed: str | None = None

    @property
    def best(self) -> ShrunkStep:
        """The step that is kept."""
        return self.steps[self.kept]
