"""`phoneready frontier`: dense and pruned files side by side, and which is best at which size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cfsp.errors import MissingExtraError
from cfsp.recovery.settings import training_as_read
from cfsp.settings import as_read, declared, no_effect, pick, setting
from cfsp.text.settings import BUILTIN_TEXT, CalibrationSettings
from exporters.settings import RoundingSettings
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
)
from phoneready.console import note, prepare_torch, show_progress, warn, write_result
from phoneready.frontier.settings import READS, FrontierSettings
from phoneready.settings.schema import COUNTED, CountedText, RecoverConfig

if TYPE_CHECKING:
    from phoneready.forecasts.stages import Surveying
    from phoneready.settings.schema import ReleaseConfig


def frontier(
    model: ModelArgument,
    settings: FrontierSettings,
    rounding: RoundingSettings,
    counted: CountedText,
    calibration: Annotated[CalibrationSettings, Renamed("Pruning: ", {"seqlen": "--calibration-seqlen"})],
    training: Annotated[RecoverConfig, TRAINING],
    output: Path = setting(
        Path("frontier"), "Folder to make; continued when it holds a frontier.", option="-o --output"
    ),
    seed: SeedOption = 0,
    trust_remote_code: TrustOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Measure the dense model in every quantization, and pruned ones, and say which file is best at which size.

    All files are measured on the same windows of text, in bits per byte, which compare models of different
    vocabularies, too. A run that was interrupted goes on where it was. Leaves frontier.md, frontier.json,
    frontier.html with plots, and the files that no other dominates.
    """
    prepare_torch(threads)
    from cfsp.devices import find_device
    from cfsp.files import write_text
    from cfsp.records import record_to_json
    from phoneready.forecasts.said import Machine, foretell, unless_asked
    from phoneready.frontier.folder import PLOT_FILE
    from phoneready.frontier.plot import render_frontier
    from phoneready.frontier.run import measure_frontier
    from phoneready.frontier.tables import format_frontier
    from phoneready.settings.schema import ExportConfig, ModelConfig, PruneConfig, ReleaseConfig

    asked = ModelConfig(reference=model, trust_remote_code=trust_remote_code, device=device, dtype=dtype)
    settings, unread = as_read(settings, READS)
    counted, uncounted = as_read(counted, COUNTED, any(settings.vocabularies))
    recover, untrained = _trained(training, settings)
    warn((*unread, *uncounted, *untrained))
    prune = pick(PruneConfig, calibration, vocabulary_text=counted.vocabulary_text)
    export = pick(ExportConfig, rounding)
    config = ReleaseConfig(model=asked, seed=seed, prune=prune, recover=recover, export=export)
    with show_progress() as progress:
        machine = Machine(prune.dtype, find_device(device), unless_asked(dtype))
        # What a run before has left is not made again.
        made = None if output.exists() else output
        asked_for = _asked(config, settings)
        foretell("frontier", (model,), asked_for, made, machine=machine, progress=progress)
        record = measure_frontier(config, settings, output, show=note, progress=progress, threads=threads)
    try:
        write_text(output / PLOT_FILE, render_frontier(record))
    except MissingExtraError as error:
        note(f"no plot is written: {error}")
    kept = (
        f"\n{len(record.kept)} files in {output}; what others dominate is deleted unless --keep is given.\n"
    )
    write_result(format_frontier(record) + kept, record_to_json(record), as_json=json)


def _trained(
    training: RecoverConfig, settings: FrontierSettings
) -> tuple[RecoverConfig | None, tuple[str, ...]]:
    """How pruned models are trained, None where they are not; and a warning for what nothing reads.

    Raises:
        InputError: It cannot be done so.
    """
    if not settings.recover:
        given = (row for row in declared(RecoverConfig) if getattr(training, row.name) != row.default)
        names = (TRAINING.options.get(row.name) or row.options[-1] for row in given)
        return None, tuple(no_effect(name, "without --recover") for name in names)
    from cfsp.recovery.checks import check_readable
    from phoneready.release.before_work import check_training

    training, warnings = training_as_read(training, training.texts)
    check_training(training)
    check_readable(training.texts)
    return training, warnings


def _asked(config: ReleaseConfig, settings: FrontierSettings) -> Surveying:
    """What a forecast reads of it; a search tries as many files as it is given trials."""
    from phoneready.forecasts.stages import Exporting, Pruning, Surveying, Windows
    from phoneready.forecasts.texts import judged_windows
    from phoneready.frontier.points import batches_of

    prune, names = config.prune, settings.chosen_quants
    judged = settings if settings.sources else replace(settings, text=(BUILTIN_TEXT,))
    text = Windows(prune.nsamples, prune.seqlen)
    ratio = sum(settings.prune_ratios) / max(1, len(settings.prune_ratios))
    export = config.export
    rounded_for = text.most(export.rounding_windows)
    made = Exporting(names, rounded_for, export.gptq, export.tune_scales, is_proven=False)
    checkpoints = len(batches_of(settings, prune.allocation)) - 1 + settings.trials
    return Surveying(
        Pruning(replace(config.prune_settings(), prune_ratio=ratio), text),
        made,
        judged_windows(judged),
        checkpoints,
        is_sized=settings.max_size is not None,
    )
