"""Which tasks a model is asked, and what it did in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import pydantic

from cfsp.settings import Reads, Settings, setting
from cfsp.validation import WhereSet


@dataclass(frozen=True)
class TaskSettings(Settings):
    """Which tasks, and how much of them."""

    tasks: tuple[str, ...] = setting(
        (),
        "Chats whose last answer the model must write; or tasks of lm-evaluation-harness: names, task files or folders "
        "of them (extra: eval).",
        metavar="FILE.jsonl|NAME|FILE.yaml,...",
    )
    task_data: Path | None = setting(
        None, "Folder of the task files' data.", shown="the task file's", example="task-data", rare=True
    )
    limit: int | None = setting(None, "Items of each task.", ge=1, shown="all", example=200, rare=True)
    num_fewshot: int | None = setting(
        None, "Examples before each item.", ge=0, le=10_000, shown="the task's", example=5, rare=True
    )


_OF_TASKS = (lambda asked: bool(asked.tasks), "without tasks")
READS: Reads = MappingProxyType(dict.fromkeys(("task_data", "limit", "num_fewshot"), _OF_TASKS))

Right = Annotated[str, pydantic.Field(pattern=r"^[01]*$")]
"""A character an item, in the order of the task: 1 for a right answer, 0 for another one."""


@dataclass(frozen=True)
class TaskMetric:
    """The mean of a metric over a task's items, such as `acc` or `acc_norm`; `right` is empty if it is no share."""

    name: str
    value: float
    stderr: float | None
    higher_is_better: bool
    right: Annotated[Right, WhereSet] = ""


@dataclass(frozen=True)
class TaskResult:
    """A task done by one model.

    `source` is `lm_eval`, or the name of the task file or file of chats; `sha256` is of that file, with its data.
    """

    task: str
    version: str
    source: str
    sha256: str | None
    n_items: int
    limit: int | None
    num_fewshot: int
    metrics: tuple[TaskMetric, ...]

    @property
    def accuracy(self) -> TaskMetric | None:
        """The task's main figure: `acc`, or else the first that is better the higher it is."""
        scores = [score for score in self.metrics if score.higher_is_better]
        return next((one for one in scores if one.name == "acc"), scores[0] if scores else None)
