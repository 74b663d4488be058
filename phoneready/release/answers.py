"""What exported models answer, asked in their own runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cfsp.evaluation.answers import answer
from cfsp.progress import Progress, no_progress
from exporters.families import family_of
from phoneready.release.artifact import Artifact

_CONTEXT = 1024


@dataclass(frozen=True)
class Answers:
    """Greedy answers of exports.

    Attributes:
        prompts: The questions.
        answers: Name of an export to its answers.
    """

    KIND: ClassVar[str] = "answers"
    SCHEMA_VERSION: ClassVar[int] = 1

    prompts: tuple[str, ...]
    answers: dict[str, tuple[str, ...]]


def answer_all(
    artifacts: Sequence[Artifact],
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    n_threads: int | None = None,
    progress: Progress = no_progress,
) -> Answers:
    """Ask every export every question, in its own runtime, in the chat template where the model has one.

    Args:
        artifacts: Exports of one model.
        prompts: The questions.
        max_new_tokens: Longest answer.
        n_threads: Threads; torch's number by default.
        progress: Told after each export.

    Raises:
        InputError: An export that its runtime cannot run.
    """
    found: dict[str, tuple[str, ...]] = {}
    for artifact in artifacts:
        family = family_of(artifact.item)
        with contextlib.closing(family.open_model(str(artifact.root), _CONTEXT, n_threads)) as model:
            found[artifact.name] = tuple(answer(model, prompts, max_new_tokens=max_new_tokens))
        progress("asking the files", len(found), len(artifacts))
    return Answers(tuple(prompts), found)
