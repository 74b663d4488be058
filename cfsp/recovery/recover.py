"""The whole way from a checkpoint to a recovered one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from cfsp.devices import find_device
from cfsp.errors import InputError, LimitError
from cfsp.files import LargeScratch, claim_output, no_space_as_input_error, refuse_existing
from cfsp.models.architectures import decoder_layers
from cfsp.models.checkpoint import (
    INFO_FILE,
    PLAN_FILE,
    is_pruned_checkpoint,
    read_checkpoint_info,
    save_checkpoint,
)
from cfsp.models.reference import load_model
from cfsp.models.source import LoadedModel
from cfsp.models.weights import cast_weights
from cfsp.precision import product_dtype, products_in
from cfsp.progress import Progress, no_progress
from cfsp.pruning.plan import PruningPlan
from cfsp.pruning.statistics import collect_input_moments, moment_windows
from cfsp.records import read_record
from cfsp.recovery.data import TrainingMix, check_readable, load_recovery_data
from cfsp.recovery.recovery_record import RECOVERY_FILE, RecoveryRecord
from cfsp.recovery.rounding import Rounding
from cfsp.recovery.settings import (
    DISTILL,
    RecoverySettings,
    learning_rate,
    learns_from_teacher,
    method_of,
    reads_teacher,
    training_as_read,
    usable,
)
from cfsp.recovery.student import Student, Teacher, add_adapter, importance_ranks, merge_adapter
from cfsp.text.calibration import check_seqlen
from cfsp.text.respelling import Respelling, respelling
from cfsp.text.self_sampling import TRANSFORMERS, Writer, model_fingerprint
from cfsp.text.settings import SELF

MOMENT_TOKENS = 32_768
"""Training tokens from which the windows for activation moments are chosen."""
ROUNDING_TOKENS = 16_384
"""Training tokens on which a format's scales are chosen before training goes through its rounding."""


@dataclass(frozen=True)
class RecoveryJob:
    """What is trained, on what, and where it is written."""

    checkpoint: str  # A pruned checkpoint, or any model reference (to train a dense model alike)
    output: Path
    settings: RecoverySettings
    # `self` (sampled from the teacher), or text references; mixed in equal shares.
    data: tuple[str, ...] = (SELF,)
    validation: tuple[str, ...] = ()  # the same; without any a share of `data` is held out
    # model reference; the checkpoint's dense model by default, if the loss or the data needs one.
    teacher: str | None = None
    # folder for training's own checkpoints; `output` with `.work` appended by default. Removed at the
    # end.
    work: Path | None = None
    # A name as `find_device` takes; of several processes each takes its own GPU, whatever number it
    # says.
    device: str = "auto"
    force: bool = False  # replace an existing output, and a work folder of other inputs

    @property
    def references(self) -> tuple[str, ...]:
        """All that is read."""
        return (*self.data, *self.validation)


class _Inputs(NamedTuple):
    """What a run is made from."""

    loaded: LoadedModel  # the model that is trained; its source is the dense model if a checkpoint names one
    sha256: str  # hash of its weights
    plan: PruningPlan | None  # the checkpoint's pruning plan
    ranks: tuple[int, ...]  # adapter rank of every block; empty if all weights are trained
    hashes: dict[str, str]  # what the result depends on -> its hash
    teacher: LoadedModel | None = None  # the dense model, if the loss or the data needs it
    respelling: Respelling | None = None  # how the model spells the teacher's tokens, if it has fewer


def recover(
    job: RecoveryJob,
    *,
    writers: Sequence[Writer] = (TRANSFORMERS,),
    rounding: Rounding | None = None,
    before: Callable[[], None] = lambda: None,
    progress: Progress = no_progress,
) -> tuple[RecoveryRecord, bool]:
    """Train what pruning has cost back into a checkpoint, and write a new one.

    The weights that are written are those of the best validation, which may be the untrained ones: `check_outcome`
    tells. A killed run goes on from its work folder when it is called again with the same job.

    Args:
        writers: What may have the dense model write, for `self`; the first that can does.
        rounding: Knows the formats of `for_quant`.
        before: Called once the models are read, in the process that writes; it may raise.

    Returns:
        The record, and whether this process is the one that wrote the output.

    Raises:
        InputError: Something that cannot be used, a teacher without some of the tokens, or a full disk.
        MissingExtraError: Without the `recover` extra.
    """
    from cfsp.recovery.trainer import RunInputs, WorkFolder, start_accelerator, train

    warnings = training_as_read(job.settings, job.references)[1]
    settings = usable(job.settings, job.references, rounding)
    where, folder = find_device(job.device), WorkFolder(_work_folder(job))
    accelerator = start_accelerator(settings, folder.path, where)
    processes, is_main = accelerator.num_processes, accelerator.is_main_process
    where = where if processes == 1 else accelerator.device
    dtype = product_dtype(settings.dtype, where.type)
    progress = progress if is_main else no_progress
    if is_main:
        check_readable(job.references)
    with ExitStack() as claims:
        for path in (job.output, folder.path) if is_main else ():
            claims.enter_context(claim_output(path))
        plain = json.loads(json.dumps(dataclasses.asdict(replace(settings, report_to=()))))
        run = RunInputs(plain | {"dtype": str(dtype)}, {}, processes)
        folder.refuse_other(run, force=job.force)
        inputs = _load_inputs(job, settings, progress)
        loaded, hashes = inputs.loaded, inputs.hashes
        if is_main:
            before()
        with accelerator.main_process_first():
            training, validation = load_recovery_data(
                job.data,
                job.validation,
                loaded.tokenizer,
                settings,
                dense=inputs.teacher,
                respelling=inputs.respelling,
                writers=writers,
                progress=progress,
            )
        source = None if inputs.teacher is None else inputs.teacher.source
        if not learns_from_teacher(settings):
            # It has written the text, and is not held beside what is trained.
            inputs = inputs._replace(teacher=None)
        per_step = settings.batch_size * settings.gradient_accumulation_steps * processes
        n_steps = max(1, round(settings.max_tokens / (per_step * settings.seqlen)))
        mix = TrainingMix(training, n_steps * per_step, settings.seed)
        rounded = None
        if settings.for_quant is not None and rounding is not None:
            with LargeScratch("recover") as scratch:
                start = scratch.path / "model"
                with no_space_as_input_error(start):
                    save_checkpoint(loaded, start, plan=inputs.plan, seed=settings.seed)
                windows = mix.first_windows(ROUNDING_TOKENS)
                rounded = rounding.start(start, settings.for_quant, windows, str(where), progress)
            hashes["rounded"] = rounded.sha256
        for name, parts in (("data", training), ("validation data", validation)):
            hashes[name] = " ".join(part.sha256 for part in parts)
        with accelerator.main_process_first():
            folder.open(replace(run, hashes=hashes), force=job.force)

        model, tutor = loaded.model, None
        torch.manual_seed(settings.seed)
        if inputs.ranks:
            model = add_adapter(model, inputs.ranks, settings.alpha)
        if rounded is not None:
            rounded.attach(model)
        if inputs.teacher is not None:
            dense = inputs.teacher.model.requires_grad_(False)
            tutor = Teacher(dense, inputs.respelling).eval()
            cast_weights(dense, dtype)
        student = Student(model, settings.loss, dtype, tutor)
        state = train(student, settings, mix, validation, folder, accelerator, where, progress)
        record = RecoveryRecord(
            checkpoint=job.checkpoint,
            checkpoint_sha256=inputs.sha256,
            teacher=source.reference if source else None,
            teacher_sha256=source.sha256 if source else None,
            settings=settings,
            learning_rate=learning_rate(settings),
            dtype=str(dtype).removeprefix("torch."),
            device=where.type,
            processes=processes,
            ranks=inputs.ranks,
            n_trainable=sum(p.numel() for _, p in student.trainable()),
            training=tuple(part.record for part in training),
            validation=tuple(part.record for part in validation),
            held_out=not job.validation,
            losses=tuple(state.losses),
            validations=tuple(state.validations),
            kept_step=state.best_step,
            tokens_seen=state.losses[-1].tokens if state.losses else 0,
            seconds=state.seconds,
            stopped_by=state.stopped_by or "budget",
            warnings=warnings,
        )
        if is_main:
            student.to("cpu")
            model = merge_adapter(student.model) if inputs.ranks else student.model.eval()
            numbers = None if rounded is None else rounded.finish(model)
            with products_in(settings.dtype, model.device.type):
                windows = moment_windows(mix.first_windows(MOMENT_TOKENS))
                moments = collect_input_moments(model, windows, progress=progress)
            save_checkpoint(
                replace(loaded, model=model),
                job.output,
                plan=inputs.plan,
                input_moments=moments,
                beside={RECOVERY_FILE: record, **(numbers.files if numbers else {})},
                seed=settings.seed,
                force=job.force,
            )
            folder.remove()
    return record, is_main


def _work_folder(job: RecoveryJob) -> Path:
    """Where training keeps its own checkpoints; raises InputError for places that cannot be written to."""
    checkpoint, dense = Path(job.checkpoint), job.checkpoint
    if is_pruned_checkpoint(checkpoint):
        dense = read_checkpoint_info(checkpoint).source.again
    read = (job.checkpoint, job.teacher or dense, *job.references)
    refuse_existing(job.output, force=job.force, inputs=map(Path, read))
    work = job.work or job.output.with_name(job.output.name + ".work")
    first, second = work.resolve(), job.output.resolve()
    if first.is_relative_to(second) or second.is_relative_to(first):
        # The work folder is removed at the end, and the output is written in one piece.
        raise InputError(
            "the output and the work folder may not hold each other", field="work", value=str(work)
        )
    return work


def check_outcome(record: RecoveryRecord, output: Path) -> None:
    """Raise LimitError if a run diverged or gained nothing; what was kept is in `output` all the same."""
    if record.shortcoming is not None:
        remedy = "; try a lower learning rate" if record.stopped_by == "diverged" else ""
        raise LimitError(f"{record.shortcoming} in {output}{remedy}")


def _load_inputs(job: RecoveryJob, settings: RecoverySettings, progress: Progress) -> _Inputs:
    """Load what a run needs, and check that it fits together.

    Raises InputError: a sequence longer than the model's context, ranks by importance without a plan, or a teacher
    that is missing, lacks tokens of the checkpoint, is not the model of the checkpoint any more, or has nothing to
    teach as it has the same weights.
    """
    read = partial(load_model, dtype="float32", progress=progress)
    loaded = read(job.checkpoint)
    folder, sha256 = Path(job.checkpoint), loaded.source.sha256 or ""
    plan = read_record(PruningPlan, folder / PLAN_FILE) if (folder / PLAN_FILE).is_file() else None
    if (folder / INFO_FILE).is_file():
        loaded = replace(loaded, source=read_checkpoint_info(folder).source)
    check_seqlen(loaded, settings.seqlen)
    method, ranks = method_of(settings), tuple[int, ...]()
    if method.by_importance:
        if plan is None:
            raise InputError(
                f"ranks by importance need the checkpoint's {PLAN_FILE}, and there is none",
                field="method",
                value=settings.method,
                allowed="lora, full",
            )
        ranks = importance_ranks([block.importance for block in plan.blocks if block.width], settings.rank)
    elif method.adapter:
        ranks = (settings.rank,) * len(decoder_layers(loaded.model))
    hashes = {"checkpoint": model_fingerprint(loaded.model), "ranks": str(ranks)}
    if not reads_teacher(settings, job.references):
        return _Inputs(loaded, sha256, plan, ranks, hashes)
    try:
        dense = read(job.teacher or loaded.source.again)
    except InputError as error:
        message = f"the teacher cannot be loaded (--teacher says where it is): {error}"
        raise InputError(message, field="teacher") from error
    spelled = respelling_of(loaded, dense)
    then, now = loaded.source.sha256, dense.source.sha256
    if job.teacher is None and then and now and then != now:
        raise InputError(
            f"{dense.source.reference} is no longer the model that the checkpoint was pruned from",
            field="teacher",
            value=now,
            allowed=f"the model of hash {then}; --teacher takes another one",
        )
    hashes["teacher"] = model_fingerprint(dense.model)
    if hashes["teacher"] == hashes["checkpoint"] and settings.loss == DISTILL and settings.for_quant is None:
        raise InputError(
            "a model learns nothing from its own distribution",
            field="loss",
            value=settings.loss,
            allowed="next-token or both, another teacher, or --for-quant",
        )
    return _Inputs(loaded, sha256, plan, ranks, hashes, dense, spelled)


def respelling_of(loaded: LoadedModel, dense: LoadedModel) -> Respelling | None:
    """How a model spells its teacher's tokens; None if they are the same, InputError if it has others."""
    ours, theirs = (m.model.get_output_embeddings().weight.shape[0] for m in (loaded, dense))
    if ours == theirs and loaded.tokenizer.get_vocab() == dense.tokenizer.get_vocab():
        return None
    cause: InputError | None = None
    try:
        spelling = respelling(dense.tokenizer, loaded.tokenizer)
        if len(spelling.kept) <= ours:
            return spelling
    except InputError as error:
        cause = error
    raise InputError(
        f"the teacher has another vocabulary ({theirs} tokens) than the checkpoint ({ours} tokens), not a larger one",
        field="teacher",
        value=dense.source.reference,
        allowed="the dense model of the checkpoint, or one whose tokenizer has all of the checkpoint's tokens",
    ) from cause
