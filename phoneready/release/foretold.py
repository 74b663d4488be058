"""What each stage of a release will take: its row of the forecasts, the models that it reads, and what is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cfsp.devices import find_device
from cfsp.recovery.settings import token_budget
from phoneready.figures.figure_set import DENSE
from phoneready.forecasts.said import Machine, foretell
from phoneready.forecasts.stages import Drawing, Exporting, Judging, Pruning, Recovering, Windows
from phoneready.forecasts.texts import judged_windows
from phoneready.release.stages import stage_folder
from phoneready.release.steps import RECOVERY_STAGE, Steps
from phoneready.settings.schema import ReleaseConfig

_FINAL = "final"


@dataclass(frozen=True)
class _Row:
    """Of a stage.

    Attributes:
        work: A name in the table of forecasts.
        models: Stages whose checkpoints it reads, `final` for what is exported; none is the model itself.
        asked: What the forecast reads of the configuration; None where that does not say how much it is.
        dtype: Of products.
        kept: From what weights are to be kept in to what they are.
    """

    work: str
    models: tuple[str, ...]
    asked: Callable[[ReleaseConfig], Any]
    dtype: Callable[[ReleaseConfig], str] = lambda _: "float32"
    kept: Callable[[str], str] = lambda dtype: dtype


def foretell_stage(config: ReleaseConfig, folder: Path, name: str, tell: Callable[[str], None]) -> None:
    """Say what a stage will take, where that is known and long, and refuse what cannot fit.

    Raises:
        InputError: Memory, or a disk, has too little room.
    """
    row = _ROWS.get(name)
    asked = row.asked(config) if row else None
    if row is None or asked is None:
        return
    stages = [Steps(config, folder, None).final if model == _FINAL else model for model in row.models]
    models = [str(stage_folder(folder, stage) / "model") for stage in stages] or [config.model.reference]
    foretell(
        row.work,
        models,
        asked,
        stage_folder(folder, name),
        text=() if stages else config.prune.calibration,
        machine=Machine(row.dtype(config), find_device(config.model.device), row.kept(config.model.dtype)),
        tell=tell,
    )


def _windows(config: ReleaseConfig) -> Windows:
    return Windows(config.prune.nsamples, config.prune.seqlen)


def _float32(_: str) -> str:
    """What weights are kept in by training, and by the proof of an export, whatever is asked for."""
    return "float32"


def _pruning_dtype(config: ReleaseConfig) -> str:
    return config.prune.dtype


def _recovery_dtype(config: ReleaseConfig) -> str:
    return config.recover.dtype if config.recover else "float32"


def _drawing(config: ReleaseConfig) -> Drawing:
    return Drawing(_windows(config), moments=Steps(config, Path(), None).needs_moments)


def _pruning(config: ReleaseConfig) -> Pruning:
    return Pruning(config.prune_settings(), _windows(config))


def _recovering(config: ReleaseConfig) -> Recovering | None:
    training = config.recover
    return Recovering(training) if training and token_budget(training) else None


def _exporting(config: ReleaseConfig) -> Exporting:
    export = config.export
    text = _windows(config).most(export.rounding_windows)
    return Exporting(export.names, text, export.gptq, export.tune_scales)


def _judging(config: ReleaseConfig) -> Judging:
    return _judged(config, 1, few_bits=False)


def _judging_files(config: ReleaseConfig) -> Judging:
    return _judged(config, len(config.evaluate.files), few_bits=True)


def _judging_all(config: ReleaseConfig) -> Judging:
    return _judged(config, 2 * len(config.export.names), few_bits=True, prompts=0)


def _judged(config: ReleaseConfig, times: int, *, few_bits: bool, prompts: int | None = None) -> Judging:
    """So many files beside the dense model."""
    evaluate, asked = config.evaluate, len(Steps(config, Path(), None).prompts)
    windows = judged_windows(evaluate.settings(0, ()))
    text = replace(windows, count=times * windows.count)
    questions = times * evaluate.n_sets * (asked if prompts is None else prompts)
    return Judging(text, questions, evaluate.max_new_tokens, (few_bits, False))


_ROWS: Mapping[str, _Row] = MappingProxyType(
    {
        "dense": _Row("draw", (), _drawing, _pruning_dtype),
        "prune": _Row("prune", ("dense",), _pruning, _pruning_dtype),
        RECOVERY_STAGE: _Row("recover", ("prune",), _recovering, _recovery_dtype, _float32),
        "evaluate": _Row("eval", (_FINAL, "dense"), _judging),
        f"export-{DENSE}": _Row("export", ("dense",), _exporting, kept=_float32),
        "export-pruned": _Row("export", (_FINAL,), _exporting, kept=_float32),
        "side-by-side": _Row("eval", (_FINAL, "dense"), _judging_all),
        "evaluate-files": _Row("eval", (_FINAL, "dense"), _judging_files),
    }
)
"""By the stage's name; how long a benchmark takes is not known before its first rows."""
