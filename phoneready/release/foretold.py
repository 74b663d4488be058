"""What each stage of a release will take: its row of the forecasts, the models that it reads, and what is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
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


def foretell_stage(config: ReleaseConfig, folder: Path, name: str, tell: Callable[[str], None]) -> None:
    """Tell what a stage will take, if that is known and long, and refuse what cannot fit; `tell` is told the line.

    Of a benchmark it is not known before its first rows.

    Raises:
        InputError: Memory, or a disk, has too little room.
    """
    steps, export, training = Steps(config, folder, None), config.export, config.recover
    windows, final = Windows(config.prune.nsamples, config.prune.seqlen), steps.final

    def judging(times: int, prompts: int, *, few_bits: bool) -> Judging:
        """So many models beside the dense one."""
        evaluate = config.evaluate
        text = judged_windows(evaluate.settings(0, ()))
        questions = times * evaluate.n_sets * prompts
        few = (few_bits, False)
        return Judging(replace(text, count=times * text.count), questions, evaluate.max_new_tokens, few)

    asked: Any
    read: tuple[str, ...]
    dtype, kept, n_prompts = "float32", config.model.dtype, len(steps.prompts)
    if name == "dense":
        work, read, dtype = "draw", (), config.prune.dtype
        asked = Drawing(windows, moments=steps.needs_moments)
    elif name == "prune":
        work, read, dtype = "prune", ("dense",), config.prune.dtype
        asked = Pruning(config.prune_settings(), windows)
    elif name == RECOVERY_STAGE and training and token_budget(training):
        # Training, and the proof of an export, keep weights in float32 whatever is asked for.
        work, read, dtype, kept = "recover", ("prune",), training.dtype, "float32"
        asked = Recovering(training)
    elif name in ("export-dense", "export-pruned"):
        work, read, kept = "export", ("dense" if name == f"export-{DENSE}" else final,), "float32"
        text = windows.most(export.rounding_windows)
        asked = Exporting(export.names, text, export.gptq, export.tune_scales)
    elif name in ("evaluate", "side-by-side", "evaluate-files"):
        work, read = "eval", (final, "dense")
        if name == "evaluate":
            asked = judging(1, n_prompts, few_bits=False)
        elif name == "side-by-side":
            asked = judging(2 * len(export.names), 0, few_bits=True)
        else:
            asked = judging(len(config.evaluate.files), n_prompts, few_bits=True)
    else:
        return
    models = [str(stage_folder(folder, stage) / "model") for stage in read] or [config.model.reference]
    foretell(
        work,
        models,
        asked,
        stage_folder(folder, name),
        text=() if read else config.prune.calibration,
        machine=Machine(dtype, find_device(config.model.device), kept),
        tell=tell,
    )
