"""`phoneready shrink`: prune and recover in steps, as far as the result is good enough."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cfsp.evaluation.task_results import READS
from cfsp.records import record_to_json
from cfsp.recovery.settings import training_as_read
from cfsp.settings import as_read, pick, setting
from cfsp.text.settings import CalibrationSettings
from phoneready.commands.options import (
    TRAINING,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    Renamed,
    SeedOption,
    ThreadsOption,
    TrustOption,
    was_given,
)
from phoneready.console import note, prepare_torch, show_progress, warn, write_result
from phoneready.settings.schema import COUNTED, CountedText
from phoneready.shrink.settings import ShrinkSettings, StepTraining

_NAMED = {"calibration": "calibration_calibration", "data": "training_data", "loss": "training_loss"}
"""Field that a task stands in for -> its parameter."""


def shrink(
    context: typer.Context,
    model: ModelArgument,
    settings: ShrinkSettings,
    counted: CountedText,
    calibration: Annotated[CalibrationSettings, Renamed("Pruning: ", {"seqlen": "--calibration-seqlen"})],
    training: Annotated[StepTraining, replace(TRAINING, options={**TRAINING.options, "for_quant": None})],
    output: Path = setting(
        Path("shrunk"), "Folder to make; continued when a run was stopped in it.", option="-o --output"
    ),
    seed: SeedOption = 0,
    trust_remote_code: TrustOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Prune and train in steps, judge each, and keep the smallest model that is good enough.

    With --task a model for one task: it learns the task first, and the steps end where its accuracy in --tasks would
    fall. A run that was stopped goes on with the same command. Leaves the curve (shrunk.md, shrunk.json) and the
    checkpoint that is kept (model/), which `phoneready export` takes.
    """
    counted, uncounted = as_read(counted, COUNTED, bool(settings.vocabulary))
    settings, unread = as_read(settings, READS)
    warn((*uncounted, *unread))
    prepare_torch(threads)
    from phoneready.settings.schema import ModelConfig, PruneConfig, ReleaseConfig
    from phoneready.shrink.run import for_task
    from phoneready.shrink.run import shrink as run_shrink
    from phoneready.shrink.tables import format_shrunk

    asked = ModelConfig(reference=model, trust_remote_code=trust_remote_code, device=device, dtype=dtype)
    prune = pick(PruneConfig, calibration, vocabulary_text=counted.vocabulary_text)
    config = ReleaseConfig(model=asked, seed=seed, prune=prune, recover=training)
    named = [field for field, name in _NAMED.items() if was_given(context, name)]
    config = for_task(config, settings, named)
    learnt = config.recover or training
    learnt, untrained = training_as_read(learnt, learnt.texts)
    warn(untrained)
    config = config.model_copy(update={"recover": learnt})
    found = run_shrink(
        config,
        settings,
        output,
        show=lambda name, state: note(f"{name:<14} {state}"),
        progress=show_progress,
        threads=threads,
        tell=lambda line: note(f"{'':<14} {line}"),
        named=named,
    )
    write_result(format_shrunk(found), record_to_json(found), as_json=json)
