"""A release as the single commands that do the same."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from exporters.onnx import find_variant
from phoneready.release.results import ReleaseFigures
from phoneready.settings.schema import ReleaseConfig
from phoneready.settings.sections import RecoverConfig

_RECOVER_APART = ("data", "validation", "patience", "report_to")


def single_commands(config: ReleaseConfig, figures: ReleaseFigures) -> tuple[str, ...]:
    """The commands, in order; 4-bit ONNX variants are rounded for other windows of the calibration's text."""
    found = [_prune(config, figures)]
    final = "checkpoint"
    if config.recover is not None:
        found.append(_recover(config, config.recover))
        final = "recovered"
    found += [_judge(config, final), _export(config, final)]
    return tuple(shlex.join(map(str, ["phoneready", *words])) for words in found)


def _prune(config: ReleaseConfig, figures: ReleaseFigures) -> list[object]:
    p, s = config.prune, figures.plan.settings
    words: list[object] = [
        "prune",
        config.model.reference,
        "-o",
        "checkpoint",
        "--prune-ratio",
        s.prune_ratio,
    ]
    words += _each("--calibration", p.calibration)
    words += ["--nsamples", p.nsamples, "--seqlen", p.seqlen, "--seed", config.seed, "--score", s.score]
    words += ["--coarse", s.coarse_metric, "--allocation", s.allocation, "--coarse-strength", s.strength]
    words += ["--align", s.align, "--reconstruct", s.reconstruct]
    words += ["--ridge", s.ridge, "--correction", s.correction, "--dtype", s.dtype]
    return words + (["--uniform"] if s.uniform_width else [])


def _recover(config: ReleaseConfig, settings: RecoverConfig) -> list[object]:
    words: list[object] = ["recover", "checkpoint", "-o", "recovered", "--teacher", config.model.reference]
    words += [*_each("--data", settings.data), *_each("--validation", settings.validation)]
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if name not in _RECOVER_APART and value is not None:
            words += [f"--{name.replace('_', '-')}", value]
    return [*words, "--patience", settings.patience or 0, "--seed", config.seed]


def _judge(config: ReleaseConfig, checkpoint: str) -> list[object]:
    e = config.evaluate
    words: list[object] = ["eval", checkpoint, "--against", config.model.reference]
    words += [*_each("--text", e.text), *_each("--chats", e.chats)]
    words += ["--seqlen", e.seqlen, "--windows", e.max_windows, "--seed", config.seed + 1]
    words += [*_each("--tasks", e.tasks), *_each("--metric", e.metrics)]
    limits = {"--task-data": e.task_data, "--limit": e.limit, "--num-fewshot": e.num_fewshot}
    for option, value in limits.items():
        words += [] if value is None else [option, value]
    return words


def _export(config: ReleaseConfig, checkpoint: str) -> list[object]:
    variants: list[object] = ["--onnx", ",".join(config.export.onnx)] if config.export.onnx else []
    if any(find_variant(variant).calibrated for variant in config.export.onnx):
        variants += [*_each("--calibration", config.prune.calibration), "--seed", config.seed]
    words: list[object] = ["export", checkpoint, "-o", "exports", "--gguf", ",".join(config.export.quants)]
    return [*words, *variants, *([] if config.export.imatrix else ["--no-imatrix"])]


def _each(option: str, values: Iterable[object]) -> list[object]:
    return [word for value in values for word in (option, value)]
