"""What would end shrinking after hours, found before anything is done."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from cfsp.errors import InputError, require_extra
from cfsp.evaluation.tasks import is_chat_file, load_chat_task, load_tasks, needs_harness
from cfsp.recovery.checks import check_readable
from cfsp.text.tokens import load_documents
from phoneready.evaluation.run import check_texts
from phoneready.evaluation.settings import EvaluationSettings
from phoneready.recipe import check_place
from phoneready.release.before_work import check_training
from phoneready.release.stages import LOCK_FILE
from phoneready.settings.schema import RecoverConfig, ReleaseConfig
from phoneready.shrink.settings import ShrinkSettings, learning


def check_before_work(
    config: ReleaseConfig,
    training: RecoverConfig,
    settings: ShrinkSettings,
    folder: Path,
    ours: Iterable[str],
) -> None:
    """Refuse settings and files that cannot be used.

    Args:
        config: Model, calibration.
        training: How to train.
        settings: How far, what is judged.
        folder: Where.
        ours: Names of what shrinking leaves in a folder.

    Raises:
        InputError: One of them, or a folder that something else has made.
        MissingExtraError: An extra that they need.
    """
    if problem := settings.problem:
        raise InputError(problem)
    if settings.task and not is_chat_file(settings.task):
        why, allowed = "not a file of chats", "FILE.jsonl, FILE.parquet"
        raise InputError(why, field="task", value=settings.task, allowed=allowed)
    check_place(config, folder)
    _check_folder(folder, {LOCK_FILE, "stages", *ours})
    _check_training(training, settings.task)
    check_texts(EvaluationSettings(text=settings.text, chats=settings.chats))
    if any(map(needs_harness, settings.tasks)):
        require_extra("lm_eval", "eval")
    if settings.tasks:
        with load_tasks(settings):
            pass
    prune, learnt = config.prune, ((settings.task,) if settings.task else ())
    texts = (*learnt, *training.texts, *prune.calibration, *prune.vocabulary_text)
    check_readable((*texts, *settings.text, *settings.chats))
    _check_held_out(dict.fromkeys((*learnt, *training.data)), settings)


def _check_folder(folder: Path, ours: set[str]) -> None:
    """A release's folder has the same lock, and stages of its own."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    strange = sorted(name for name in there - ours if not name.startswith("."))
    if strange or (folder / "stages" / "prune").is_dir():
        what = strange[0] if strange else "stages/prune"
        raise InputError(f"{folder} holds {what}, which shrinking does not make; choose another one with -o")


def _check_training(training: RecoverConfig, task: str | None) -> None:
    if training.for_quant is not None:
        raise InputError(
            "a step's file is not what the next step prunes; train the kept checkpoint through its rounding",
            field="for_quant",
            value=training.for_quant,
            allowed="none",
        )
    for asked in (training, *([learning(training, task)] if task is not None else [])):
        check_training(asked)


def _check_held_out(trained: Iterable[str], settings: ShrinkSettings) -> None:
    """Raise InputError where chats are judged that are trained on."""
    held = {
        name: [json.dumps(item.messages) for item in load_chat_task(name, settings.limit).items]
        for name in filter(is_chat_file, settings.tasks)
    }
    for reference in filter(is_chat_file, trained if held else ()):
        chats = (document.messages for document in load_documents(reference) if document.messages)
        asked = {json.dumps(messages[:-1]) for messages in chats}
        for name, items in held.items():
            if both := sum(one in asked for one in items):
                raise InputError(
                    f"{both} of its {len(items)} chats are in {reference}, which is trained on",
                    field="tasks",
                    value=name,
                )
