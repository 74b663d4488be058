"""`phoneready recover`: train back into a pruned checkpoint what pruning has cost."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cfsp.files import refuse_existing
from cfsp.records import record_to_json
from cfsp.recovery.settings import (
    RecoveryReferences,
    RecoverySettings,
    reads_teacher,
    training_as_read,
)
from cfsp.settings import no_effect, setting
from phoneready.console import MakeOptions, prepare_torch, show_progress, warn, write_result

if TYPE_CHECKING:
    from cfsp.recovery.recovery_record import RecoveryRecord


def recover(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Checkpoint of `phoneready prune`; or any model, to train it alike.",
            metavar="CHECKPOINT",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Checkpoint folder to create.", show_default=False)
    ],
    references: RecoveryReferences,
    settings: RecoverySettings,
    how: MakeOptions,
    teacher: str | None = setting(
        None, "Dense model.", metavar="MODEL", shown="what the checkpoint was pruned from"
    ),
    work: Path | None = setting(None, "Folder for training's own checkpoints.", shown="DIR.work", rare=True),
) -> None:
    """Train a pruned checkpoint, and merge what was learnt: widths and speed stay the same.

    A killed run goes on when the same command is given again. `accelerate launch -m phoneready recover ...` trains
    on several processes or GPUs. What is kept is the best validation's weights.
    """
    warnings = training_as_read(settings, references.texts)[1]
    if teacher is not None and not reads_teacher(settings, references.texts):
        warnings += (no_effect("--teacher", "without --loss distill or both, or the reference self"),)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes on a machine the first
        warn(warnings)
    inputs = [Path(name) for name in (checkpoint, teacher, *references.texts) if name]
    refuse_existing(output, force=how.force, inputs=inputs)
    prepare_torch(how.threads)
    from cfsp.devices import find_device
    from cfsp.recovery.recover import RecoveryJob, check_outcome
    from cfsp.recovery.recover import recover as run_recovery
    from exporters.families import ROUNDING
    from phoneready.room import check_room, recovering_needs
    from phoneready.text import WRITERS

    def before() -> None:
        needs = partial(recovering_needs, settings=settings)
        check_room("recover", (checkpoint,), needs, output, device=find_device(how.device))

    with show_progress() as progress:
        record, is_main = run_recovery(
            RecoveryJob(
                checkpoint,
                output,
                settings,
                references.data,
                references.validation,
                teacher=teacher,
                work=work,
                device=how.device,
                force=how.force,
            ),
            writers=WRITERS,
            rounding=ROUNDING,
            before=before,
            progress=progress,
        )
    if is_main:
        text = format_recovery(record, output)
        write_result(text, record_to_json(record), as_json=how.json)
    check_outcome(record, output)


def format_recovery(record: RecoveryRecord, output: Path) -> str:
    """What training did, in words."""
    settings = record.settings
    ranks = f", rank {min(record.ranks)} to {max(record.ranks)}" if record.ranks else ""
    origin = "held out of it" if record.held_out else ", ".join(part.reference for part in record.validation)
    lines = [
        f"Validation {record.change} (step {record.kept_step} of {len(record.losses)}, "
        f"{sum(v.n_learnt for v in record.validation)} tokens, {origin}).",
        f"Trained {record.n_trainable} weights ({settings.method}{ranks}; {settings.loss}) on "
        f"{record.tokens_seen} tokens of {', '.join(part.reference for part in record.training)} "
        f"in {record.seconds:.0f} s, {record.dtype} on {record.device}, processes: {record.processes}; "
        f"stopped by {record.stopped_by}.",
        *(
            f"Left out of {part.reference}, because they are loops: {part.n_loops} of the texts that it wrote."
            for part in (*record.training, *record.validation)
            if part.n_loops
        ),
        f"Written to {output}.",
    ]
    return "\n".join(lines)
