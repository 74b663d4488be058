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
from phoneready.settings.schema import RecoverConfig, ReleaseConfig


def single_commands(
    config: ReleaseConfig, figures: ReleaseFigures, threads: Mapping[str, int | None]
) -> tuple[str, ...]:
    """The commands, in order; the last one writes the release's model files, byte for byte."""
    made: list[tuple[str, list[object]]] = [("prune", _prune(config, figures))]
    final = "checkpoint"
    if config.recover is not None:
        made.append(("recover", _recover(config, config.recover)))
        final = "recovered"
    made += [("evaluate", _judge(config, figures, final)), ("export-pruned", _export(config, figures, final))]
    return tuple(
        shlex.join(["phoneready", *map(str, words), *map(str, _threads(threads.get(stage)))])
        for stage, words in made
    )


def _prune(config: ReleaseConfig, figures: ReleaseFigures) -> list[object]:
    asked = config.prune
    # Without a name one of GGUF is meant.
    named = asked.for_quant or (() if makes_gguf(config.export.names) else config.export.names)
    settings = dataclasses.replace(asked, align=figures.plan.settings.align, for_quant=named)
    without = set() if asked.vocabulary else {"vocabulary_text"}
    words = ["prune", config.model.reference, "-o", "checkpoint", *option_words(settings, without)]
    if config.model.dtype != settings.dtype:
        words += ["--weights-dtype", config.model.dtype]
    return [*words, "--seed", config.seed, *_opened(config)]


def _recover(config: ReleaseConfig, section: RecoverConfig) -> list[object]:
    settings = dataclasses.replace(section, patience=section.patience or 0, report_to=())
    words: list[object] = ["recover", "checkpoint", "-o", "recovered"]
    if reads_teacher(section, section.texts):
        words += ["--teacher", config.model.reference]
    return [*words, *option_words(settings), "--seed", config.seed, *_opened(config)]


def _judge(config: ReleaseConfig, figures: ReleaseFigures, checkpoint: str) -> list[object]:
    settings = config.evaluate.settings(config.seed + 1, figures.evaluation.prompts)
    words = ["eval", checkpoint, "--against", config.model.reference, *option_words(settings)]
    words += [*_opened(config), *_kept(config)]
    return words if settings.text or settings.chats else [*words, "--no-text"]


def _export(config: ReleaseConfig, figures: ReleaseFigures, checkpoint: str) -> list[object]:
    record = figures.pruned[0]
    name = record.file.removesuffix(".gguf").removesuffix(f"-{record.quant}")
    settings = pick(ExportSettings, config.export, name=name, seed=config.seed, rounding_windows=None)
    if any("calibration" in find_format(name).reads for name in config.export.names):
        prune = config.prune
        settings = dataclasses.replace(
            settings, calibration=prune.calibration, nsamples=prune.nsamples, seqlen=prune.seqlen,
            rounding_windows=config.export.rounding_windows, dense=config.model.reference,
        )  # fmt: skip
    return ["export", checkpoint, "-o", "exports", *option_words(settings), *_opened(config), *_kept(config)]


def _kept(config: ReleaseConfig) -> list[object]:
    """What weights are kept in, where that is not the command's default."""
    return [] if config.model.dtype == AUTO else ["--dtype", config.model.dtype]


def _threads(count: int | None) -> list[object]:
    return ["--threads", count] if count else []


def _opened(config: ReleaseConfig) -> list[object]:
    """How a model is opened: with code of its own, on a device that is not the command's default."""
    device = config.model.device
    trust = ["--trust-remote-code"] if config.model.trust_remote_code else []
    return [*trust, *([] if device == "auto" else ["--device", device])]


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
