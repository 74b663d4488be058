"""The line that says before a stage what it will take, and the refusal of what cannot fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cfsp.devices import CPU
from cfsp.errors import InputError
from cfsp.forecast import LONG_S, Extent, ProductsAs, Work, foresee, read_extent, require_room
from cfsp.models.builtin import BUILTIN_MODELS
from cfsp.models.offload import AUTO, WHOLE
from cfsp.models.reference import find_model
from cfsp.progress import Progress, no_progress
from cfsp.text.settings import SELF
from cfsp.units import format_seconds
from phoneready.console import note
from phoneready.forecasts.stages import STAGES, writing


@dataclass(frozen=True)
class Machine:
    """What computes.

    Attributes:
        dtype: Of products, a name in `cfsp.precision.DTYPES`.
        device: Where torch is.
        kept: What weights are kept in, the same; float32 where nothing else may be.
    """

    dtype: str = "float32"
    device: torch.device = CPU
    kept: str = "float32"


def unless_asked(dtype: str) -> str:
    """What weights are kept in where they are whole unless 16 bits are asked for."""
    return "float32" if dtype == AUTO else dtype


def foretell(
    stage: str,
    models: Sequence[str],
    asked: Any,
    output: Path | None = None,
    *,
    text: Sequence[str] = (),
    writer: str | None = None,
    machine: Machine = Machine(),
    tell: Callable[[str], None] = note,
    progress: Progress = no_progress,
) -> None:
    """Say what a stage will take, where that is long, and refuse what cannot fit; nothing is written yet.

    Nothing is said where the heads of a model's files do not tell how large it is: what reads it says why. Nor is it
    where the device does not multiply what is timed.

    Args:
        stage: A name in `STAGES`.
        models: References of the models that it reads.
        asked: What that row of `STAGES` reads.
        output: What it writes; None where that is nothing.
        text: References of calibration text.
        writer: The model that writes it where that is to be done; the first of `models` by default.
        machine: What computes.
        tell: Told the line.
        progress: Told about downloads.

    Raises:
        InputError: Memory, or a disk, has too little room.
    """
    try:
        paths = [Path(find_model(model, progress=progress).path or "") for model in models]
        extents = [_on(read_extent(path, machine.kept), machine) for path in paths]
    except (InputError, OSError):
        return
    row = STAGES[stage]
    work = row.work(extents, asked)
    if machine.device != CPU:
        work = replace(work, least_memory=0)  # a GPU's, which is asked for when the model is put there
    if output is None:
        work = replace(work, disk=0)
    require_room(work, output, stage, row.less)
    if work.is_within(LONG_S):
        return
    with suppress(RuntimeError, OSError):  # a full GPU, say: what cannot be timed is not spoken of
        # What built-in models write comes with the package.
        writes = SELF in text and (writer or models[0]) not in BUILTIN_MODELS
        more = writing(extents[0], asked.text) if writes else None
        if line := _line(work, more, extents[0], machine, row.products_as):
            tell(line)


def _line(work: Work, more: Work | None, extent: Extent, machine: Machine, products_as: ProductsAs) -> str:
    """What work will take, and what writing text before it; "" where that is short."""
    forecast = foresee(work, extent, dtype=machine.dtype, device=machine.device, products_as=products_as)
    if forecast.seconds < LONG_S:
        return ""
    if more is None or (seconds := foresee(more, extent).seconds) < LONG_S:
        return str(forecast)
    return f"{forecast}; {format_seconds(seconds)} more where the text that it writes itself is not kept from before"


def _on(extent: Extent, machine: Machine) -> Extent:
    """It on a device: nothing stays in files for a GPU."""
    return extent if machine.device == CPU else replace(extent, keeping=WHOLE, on_cpu=False)
