"""What the stages of shrinking that prune or train will take."""

from __future__ import annotations

from collections.abc import Callable

from cfsp.devices import find_device
from cfsp.recovery.settings import token_budget
from phoneready.forecasts.said import Machine, foretell
from phoneready.forecasts.stages import Pruning, Recovering, Windows
from phoneready.release.stages import Stage, stage_folder
from phoneready.shrink.steps import LEARNT, PRUNED, TRAINED, ShrinkSteps, kind_and_number


def foretell_stage(steps: ShrinkSteps, stage: Stage, tell: Callable[[str], None]) -> None:
    """Say what a stage will take, where that is known and long, and refuse what cannot fit.

    Raises:
        InputError: Memory, or a disk, has too little room.
    """
    model, (kind, number) = steps.config.model, kind_and_number(stage.name)
    if kind not in (PRUNED, LEARNT, TRAINED):
        return
    source = (str(steps.checkpoint(stage.after[-1 if kind == PRUNED else 0])),)
    output, device = stage_folder(steps.folder, stage.name), find_device(model.device)
    if kind == PRUNED:
        prune = steps.config.prune
        asked = Pruning(steps.pruning(number), Windows(prune.nsamples, prune.seqlen))
        machine = Machine(prune.dtype, device, model.dtype)
        foretell("prune", source, asked, output, text=prune.calibration, machine=machine, tell=tell)
        return
    how = steps.how_trained(stage.name)
    if how is not None and token_budget(how):
        foretell("recover", source, Recovering(how), output, machine=Machine(how.dtype, device), tell=tell)
