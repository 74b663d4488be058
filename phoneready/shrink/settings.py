"""How far to shrink in what steps, what is judged, and where to stop."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cfsp.evaluation.task_results import TaskSettings
from cfsp.recovery.settings import AUTO, METHODS, NEXT_TOKEN, settled, training_as_read
from cfsp.settings import setting
from phoneready.evaluation.settings import WindowSettings
from phoneready.settings.schema import RecoverConfig


@dataclass(frozen=True)
class StepTraining(RecoverConfig):
    """How steps are trained: a step's file is not what the next one prunes, so never through its rounding."""

    method: str = setting(
        AUTO,
        "ig-lora (ranks by importance), lora, or full (all weights).",
        choices=(AUTO, *(name for name, method in METHODS.items() if not method.through_rounding)),
        shown="ig-lora",
    )


@dataclass(frozen=True)
class ShrinkSettings(TaskSettings, WindowSettings):
    """Shares are of the dense model's FFN channels."""

    step: float = setting(
        0.05, "Share of the dense model's FFN channels that each step removes.", ge=0.001, lt=1
    )
    until: float = setting(0.3, "Share that all steps remove together; 0: none.", ge=0, lt=1)
    vocabulary: int = setting(
        0, "Tokens of the vocabulary to keep from the first step on; 0 keeps all.", ge=0
    )
    task: str | None = setting(
        None,
        "Chats of the one task that the model is for: it learns the task first, and is calibrated, counted and trained "
        "on it, by the next token unless --loss says otherwise. What is judged is --tasks.",
        metavar="FILE.jsonl",
    )
    max_accuracy_drop: float = setting(
        0.01,
        "Stop after a step whose accuracy in the tasks is surely lower by more than this than at the start.",
        ge=0,
        le=1,
    )
    max_bits_ratio: float | None = setting(
        None,
        "Stop after a step whose bits per byte of a text are more than this times those of the start.",
        gt=0,
    )

    @property
    def shares(self) -> tuple[float, ...]:
        """Share that is gone after each step; one step of no channels where only the vocabulary goes."""
        count = math.ceil(round(self.until / self.step, 9))
        removed = tuple(round(min((n + 1) * self.step, self.until), 9) for n in range(count))
        return removed or ((0.0,) if self.vocabulary else ())

    @property
    def problem(self) -> str | None:
        """What is wrong between fields."""
        if not self.shares:
            return "nothing is to be removed; allowed: --until above 0, or --vocabulary"
        if self.task and not self.tasks:
            return "the task has no held-out part: name chats that are not trained on with --tasks"
        if not self.tasks and self.max_accuracy_drop != type(self).max_accuracy_drop:
            return "no accuracy is measured that could drop; allowed: --max-accuracy-drop with --tasks"
        return None


def learning(training: RecoverConfig, task: str) -> RecoverConfig:
    """How a task is learnt: as steps are trained, but from its chats alone, with no teacher, and no plan to go by."""
    method = settled(training).method
    alone = replace(training, data=(task,), method="lora" if method == "ig-lora" else method, loss=NEXT_TOKEN)
    return training_as_read(alone, alone.texts)[0]
