"""A release as the single commands that do the same."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection, Iterable, Mapping

from cfsp.models.offload import AUTO
from cfsp.recovery.settings import reads_teacher
from cfsp.settings import declared, pick
from exporters.families import find_format, makes_gguf
from exporters.settings import ExportSettings
from phoneready.release.results import ReleaseFigures
from phoneready.settings.schema import ReleaseConfig


def single_commands(
    config: ReleaseConfig, figures: ReleaseFigures, threads: Mapping[str, int | None]
) -> tuple[str, ...]:
    """The commands, in order; the last one writes the release's model files, byte for byte.

    Each has the threads that its stage had; without a number a command has as many as by itself.
    """
    asked, model, made = config.prune, config.model, config.export.names
    seed: tuple[object, ...] = ("--seed", config.seed)
    opened = [] if model.device == "auto" else ["--device", model.device]
    kept = [] if model.dtype == AUTO else ["--dtype", model.dtype]

    # Without a name one of GGUF is meant.
    named = asked.for_quant or (() if makes_gguf(made) else made)
    pruning = dataclasses.replace(asked, align=figures.plan.settings.align, for_quant=named)
    words = option_words(pruning, set() if asked.vocabulary else {"vocabulary_text"})
    weights = [] if model.dtype == pruning.dtype else ["--weights-dtype", model.dtype]
    commands: dict[str, tuple[object, ...]] = {
        "prune": ("prune", model.reference, "-o", "checkpoint", *words, *weights, *seed, *opened)
    }
    final = "checkpoint"
    if (training := config.recover) is not None:
        settings = dataclasses.replace(training, patience=training.patience or 0, report_to=())
        teacher = ["--teacher", model.reference] if reads_teacher(training, training.texts) else []
        words = (*teacher, *option_words(settings))
        commands["recover"] = ("recover", final, "-o", "recovered", *words, *seed, *opened)
        final = "recovered"
    judging = config.evaluate.settings(config.seed + 1, figures.evaluation.prompts)
    no_text = [] if judging.text or judging.chats else ["--no-text"]
    words = (*option_words(judging), *opened, *kept, *no_text)
    commands["evaluate"] = ("eval", final, "--against", model.reference, *words)
    record = figures.pruned[0]
    name = record.file.removesuffix(".gguf").removesuffix(f"-{record.quant}")
    exporting = pick(ExportSettings, config.export, name=name, seed=config.seed, rounding_windows=None)
    if any("calibration" in find_format(one).reads for one in made):
        exporting = dataclasses.replace(
            exporting, calibration=asked.calibration, nsamples=asked.nsamples, seqlen=asked.seqlen,
            rounding_windows=config.export.rounding_windows, dense=model.reference,
        )  # fmt: skip
    commands["export-pruned"] = ("export", final, "-o", "exports", *option_words(exporting), *opened, *kept)
    return tuple(
        shlex.join(map(str, ("phoneready", *command, *(("--threads", count) if count else ()))))
        for command, count in ((command, threads.get(stage)) for stage, command in commands.items())
    )


def option_words(settings: object, without: Collection[str] = ()) -> Iterable[object]:
    """Settings as command-line options; what is None or empty, or named, is left to the command's default."""
    for row in (row for row in declared(type(settings)) if row.name not in without):
        value, option = getattr(settings, row.name), row.options[-1]
        if isinstance(value, bool):
            yield from [] if value == row.default else [option]
        elif isinstance(value, tuple) and row.setting.splits:
            yield from [option, ",".join(map(str, value))] if value else []
        elif isinstance(value, tuple):
            yield from (word for entry in value for word in (option, entry))
        elif value is not None:
            yield from (option, value)
