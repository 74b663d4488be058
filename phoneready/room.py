"""Whether memory and disk have room for what a command or a stage needs at least, asked before anything is written.

What is needed follows from shapes, which the heads of a model's files have. How long something takes is not foretold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cfsp.devices import CPU
from cfsp.errors import InputError
from cfsp.extent import Extent, Needs, read_extent, require_room
from cfsp.models.offload import WHOLE, scratch_bytes
from cfsp.models.reference import find_model
from cfsp.progress import Progress, no_progress
from cfsp.pruning.prune import TOLD_WINDOWS
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.statistics import MOMENT_WINDOWS
from cfsp.recovery.settings import Training, method_of
from exporters.export_record import ExportFormat
from exporters.families import family_of, find_format
from exporters.proof import PARITY_SEQLEN
from exporters.quantize.walk import rounding_bytes
from exporters.settings import FileSettings

LESS = {
    "prune": "less text (--nsamples, --seqlen), or a smaller model",
    "export": "less text (--nsamples, --rounding-windows, --seqlen), or a smaller model",
    "eval": "shorter windows (--seqlen), or a smaller model",
    "search": "less text (--nsamples), or a smaller model",
    "recover": "an adapter (--method lora), the loss next-token (no teacher), or a smaller model",
}
"""What takes less memory."""
_FLOATS_STAY = "gguf"
"""The family whose files of floats are there until all files of few bits are made of them."""
_FLOAT_BITS = 32.0


def check_room(
    what: str,
    models: Sequence[str],
    needs: Callable[[Sequence[Extent]], Needs],
    output: Path | None = None,
    *,
    device: torch.device = CPU,
    kept: str = "float32",
    progress: Progress = no_progress,
) -> None:
    """Refuse what cannot fit; `needs` is asked of the models, whose weights are kept in the dtype of that name.

    Nothing is checked if the heads of a model's files do not tell how large it is: what reads it says why.

    Raises:
        InputError: Memory, or a disk, has too little room.
    """
    try:
        paths = [Path(find_model(model, progress=progress).path or "") for model in models]
        extents = [read_extent(path, kept) for path in paths]
    except (InputError, OSError):
        return
    if device != CPU:  # nothing stays in files for a GPU, whose memory is asked for when a model is put there
        extents = [replace(extent, keeping=WHOLE) for extent in extents]
    least = needs(extents)
    if device != CPU:
        least = replace(least, memory=0)
    require_room(least, output, what, LESS[what])


def drawing_needs(extents: Sequence[Extent], windows: int, seqlen: int, *, moments: bool) -> Needs:
    """Of the dense model as a checkpoint, with its activation moments."""
    (dense,) = extents
    memory = _passed(dense, min(windows, MOMENT_WINDOWS) * seqlen) if moments else 0
    return Needs(memory, _saved(dense))


def pruning_needs(
    extents: Sequence[Extent],
    settings: PruneSettings,
    windows: int,
    seqlen: int,
    *,
    only_plan: bool = False,
) -> Needs:
    """Of statistics, plan, reconstruction, and the checkpoint."""
    (dense,) = extents
    read = min(windows, TOLD_WINDOWS) if settings.keeps_blocks else windows
    memory = _passed(dense, read * seqlen if settings.prune_ratio else min(seqlen, read * seqlen))
    if only_plan:
        return Needs(memory)
    scratch = scratch_bytes(dense.least_weights) if dense.by_blocks else 0
    disk = 0
    if not any((settings.blocks, settings.attentions, settings.kv_groups, settings.vocabulary)):
        rounded = settings.align / 2 * len(dense.widths) / sum(dense.widths)
        share = max(0.0, 1 - settings.prune_ratio - rounded)
        disk = dense.stored_bytes * int(share * dense.block_weights + dense.end_weights)
    return Needs(memory, disk, scratch)


def exporting_needs(
    extents: Sequence[Extent],
    settings: FileSettings,
    windows: int | None,
    seqlen: int,
    *,
    is_saved: bool = False,
) -> Needs:
    """Of files, the floats that they are made of, and their proofs.

    `windows` are those of the text that files of few bits are rounded for, None without one; a model that is no folder
    is saved as one first.
    """
    (extent,) = extents
    if extent.by_blocks and not extent.is_alone:
        extent = replace(extent, keeping=WHOLE)
    memory, tokens = _passed(extent, PARITY_SEQLEN), (windows or 0) * seqlen
    if is_saved:
        extent = replace(extent, stored_bytes=4)
    there = _saved(extent) if is_saved else 0
    families: dict[str, list[ExportFormat]] = {}
    for name in settings.names:
        families.setdefault(family_of(name).name, []).append(find_format(name))
    most = 0
    for name, rows in families.items():
        floats = (extent.stored_bytes if extent.by_blocks else 4) * extent.least_weights
        in_blocks = extent.by_blocks and name != _FLOATS_STAY
        if in_blocks or any(row.bits == _FLOAT_BITS for row in rows):
            floats = 0
        files = sum(int(row.bits / 8 * extent.least_weights) for row in rows if row.is_sized)
        most = max(most, there + (floats + files if name == _FLOATS_STAY else max(floats, files)))
        there += files
        fitted = [row for row in rows if "calibration" in row.reads]
        if windows is not None and any(settings.gptq or "gptq" not in row.reads for row in fitted):
            rounding = extent.least_resident_bytes + rounding_bytes(tokens, max(extent.widths))
            memory = max(memory, _passed(extent, tokens), rounding)
    return Needs(memory, most)


def judging_needs(extents: Sequence[Extent], seqlen: int, few_bits: Sequence[bool]) -> Needs:
    """Of models beside each other, but for those whose own runtime maps a file of few bits into memory."""
    each = zip(extents, few_bits, strict=True)
    return Needs(sum(_passed(extent, seqlen) for extent, few in each if not few))


def recovering_needs(extents: Sequence[Extent], settings: Training) -> Needs:
    """Of training: gradients and AdamW's two moments of all weights, if these are trained; and the checkpoint."""
    (extent,) = extents
    method = method_of(settings)
    few = method.adapter or method.through_rounding
    # The models themselves are in memory already when this is asked.
    return Needs(0 if few else 12 * extent.least_weights, _saved(extent))


def _passed(extent: Extent, tokens: int) -> int:
    """Bytes of a pass through all blocks, with hidden states of so many tokens at once."""
    return extent.least_resident_bytes + extent.states_bytes(tokens)


def _saved(extent: Extent) -> int:
    return extent.stored_bytes * extent.least_weights
