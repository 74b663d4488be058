"""Which tasks, and how much of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from cfsp.settings import Reads, Settings, setting


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
        None, "Folder of the task files' data.", shown="the task file's", example="task-data"
    )
    limit: int | None = setting(None, "Items of each task.", ge=1, shown="all", example=200)
    num_fewshot: int | None = setting(
        None, "Examples before each item.", ge=0, le=10_000, shown="the task's", example=5
    )


_OF_TASKS = (lambda asked: bool(asked.tasks), "without tasks")
READS: Reads = MappingProxyType(dict.fromkeys(("task_data", "limit", "num_fewshot"), _OF_TASKS))
