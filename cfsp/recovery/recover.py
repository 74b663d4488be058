"""The whole way from a checkpoint to a recovered one."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch

from cfsp.devices import find_device
from cfsp.errors import InputError, LimitError
from cfsp.files import claim_output, no_space_as_input_error, refuse_existing
from cfsp.models.checkpoint import save_checkpoint
from cfsp.models.paging import emptied
from cfsp.models.reference import load_model
from cfsp.models.source import ModelSource
from cfsp.models.weights import cast_weights
from cfsp.precision import product_dtype, products_in
from cfsp.progress import Progress, no_progress
from cfsp.pruning.moments import collect_input_moments, moment_windows
from cfsp.reading import as_input_error
from cfsp.recovery.adapter import add_adapter, give_trained, merge_adapter
from cfsp.recovery.checks import check_readable, usable
from cfsp.recovery.data import RecoveryData, TrainingMix, load_recovery_data
from cfsp.recovery.inputs import RecoveryInputs, dense_of, load_inputs, read_extents
from cfsp.recovery.language import check_vocabulary
from cfsp.recovery.recovery_record import RECOVERY_FILE, RecoveryRecord, data_record
from cfsp.recovery.rounding import RoundedModel, Rounding
from cfsp.recovery.settings import (
    MUON,
    RecoverySettings,
    learning_rate,
    learns_from_teacher,
    token_budget,
    training_as_read,
)
from cfsp.recovery.sharding import is_sharded, shard_out
from cfsp.recovery.shares import AUTO, is_to_be_sharded
from cfsp.recovery.student import Student, Teacher
from cfsp.recovery.work import Run, RunInputs, WorkFolder
from cfsp.scratch import LargeScratch
from cfsp.text.generation import stop_ids
from cfsp.text.settings import SELF
from cfsp.text.writers import TRANSFORMERS, Writer

logger = logging.getLogger(__name__)

MOMENT_TOKENS = 32_768
"""Training tokens from which the windows for activation moments are chosen."""
ROUNDING_TOKENS = 16_384
"""Training tokens that numbers are rounded for before training goes through them."""


@dataclass(frozen=True)
class Recovered:
    """A finished run.

    Attributes:
        record: How it went.
        is_main: Whether this process is the one that wrote the output.
    """

    record: RecoveryRecord
    is_main: bool


def recover(
    checkpoint: str,
    output: Path,
    settings: RecoverySettings,
    *,
    data: Sequence[str] = (SELF,),
    validation: Sequence[str] = (),
    teacher: str | None = None,
    work: Path | None = None,
    device: str = "auto",
    shard: str = AUTO,
    force: bool = False,
    trust_remote_code: bool = False,
    writers: Sequence[Writer] = (TRANSFORMERS,),
    rounding: Rounding | None = None,
    before: Callable[[int], None] = lambda shares: None,
    progress: Progress = no_progress,
) -> Recovered:
    """Train what pruning has cost back into a checkpoint, and write a new one.

    The weights that are written are those of the best validation, which may be the untrained ones: `check_outcome`
    tells. A killed run goes on from its work folder when it is called again with the same arguments.

    Args:
        checkpoint: A pruned checkpoint, or any model reference (to train a dense model alike).
        output: Folder to create.
        settings: How to train.
        data: `self` (sampled from the teacher), `student` (from the checkpoint), or text references; mixed in equal
            shares.
        validation: The same; nothing holds out a share of `data`.
        teacher: Model reference; the checkpoint's dense model where the loss or the data needs one.
        work: Folder for training's own checkpoints; `output` with `.work` appended unless given. Removed at the end.
        device: A name as `find_device` takes; of several processes each has a GPU of its own, whatever number it says.
        shard: A name in SHARDING: whether several processes share out the weights.
        force: Replace an existing output, and a work folder of other inputs.
        trust_remote_code: Let transformers run code that a folder or hub model brings along.
        writers: What may have the dense model write, for `self`; the first that can does.
        rounding: What knows the formats of `for_quant`.
        before: Called once the models are read, in the process that writes, with the number of processes that share
            out the weights, or 1; it may raise.
        progress: Told about every step.

    Raises:
        InputError: Something that cannot be used, a teacher without some of the tokens, or a full disk.
        MissingExtraError: Without the `recover` extra.
    """
    references = (*data, *validation)
    warnings = training_as_read(settings, references)[1]
    settings = usable(settings, references, rounding)
    read = (checkpoint, teacher or dense_of(checkpoint), *references)
    refuse_existing(output, force=force, inputs=map(Path, read))
    folder = WorkFolder(work or output.with_name(output.name + ".work"))
    _check_apart(folder.path, output)
    where = find_device(device)
    from cfsp.recovery.trainer import train, training_arguments

    arguments = training_arguments(settings, folder.path, device=where)
    is_main = arguments.process_index == 0
    progress = progress if is_main else no_progress
    if is_main:
        check_readable(references)
    with ExitStack() as claims:
        for path in (output, folder.path) if is_main else ():
            claims.enter_context(claim_output(path))
        sharded = _is_sharded(shard, settings, checkpoint, teacher, arguments)
        plain = _plain_settings(settings, arguments, sharded=sharded)
        folder.check_settings(plain, arguments.world_size, force=force)
        inputs = load_inputs(
            checkpoint,
            teacher,
            settings,
            data=references,
            trust_remote_code=trust_remote_code,
            in_files=sharded,
            progress=progress,
        )
        if is_main:
            before(arguments.world_size if sharded else 1)
        with arguments.main_process_first(local=False):
            drawn = _read(data, validation, settings, inputs, writers, progress)
        dense = None if inputs.teacher is None else inputs.teacher.source
        if not learns_from_teacher(settings):
            # It has written the text, and is not held beside what is trained.
            inputs = replace(inputs, teacher=None)
        tokens_per_step = _tokens_per_process(settings) * arguments.world_size
        mix = TrainingMix(drawn.training, _n_sequences(settings, drawn, tokens_per_step), settings.seed)
        inputs = replace(inputs, rounded=_rounded(settings, inputs, mix, rounding, arguments, progress))
        with arguments.main_process_first(local=False):
            folder.open(_run_inputs(plain, inputs, drawn, arguments), force=force)
        student = _student(inputs, settings, arguments.device, sharded=sharded)
        run = Run(student, mix, drawn.validation, settings, folder, tokens_per_step, progress)
        train(run, arguments)
        record = _record(checkpoint, run, inputs, dense, drawn, arguments)
        record = replace(record, warnings=warnings)
        if is_main:
            model = _trained(run, inputs, checkpoint, trust_remote_code=trust_remote_code)
            _write(output, run, inputs, model, record, force=force, progress=progress)
            folder.remove()
    return Recovered(record, is_main)


def check_outcome(record: RecoveryRecord, output: Path) -> None:
    """Raise LimitError where a run diverged or gained nothing; what was kept is in `output` all the same."""
    if record.shortcoming is not None:
        remedy = "; try a lower learning rate" if record.stopped_by == "diverged" else ""
        raise LimitError(f"{record.shortcoming} in {output}{remedy}")


def _is_sharded(
    asked: str, settings: RecoverySettings, checkpoint: str, teacher: str | None, arguments: Any
) -> bool:
    sharded = is_to_be_sharded(
        asked,
        settings,
        partial(read_extents, checkpoint, teacher, settings),
        dtype=product_dtype(settings.dtype, arguments.device.type),
        device=arguments.device,
        processes=arguments.world_size,
    )
    if sharded and settings.optimizer == MUON:
        why = "moves whole matrices, and these are shared out"
        raise InputError(why, field="optimizer", value=MUON, allowed="adamw, or --shard never")
    return sharded


def _check_apart(work: Path, output: Path) -> None:
    """The work folder is removed at the end, and the output is written in one piece."""
    first, second = work.resolve(), output.resolve()
    if first.is_relative_to(second) or second.is_relative_to(first):
        raise InputError(
            "the output and the work folder may not hold each other", field="work", value=str(work)
        )


def _read(
    data: Sequence[str],
    validation: Sequence[str],
    settings: RecoverySettings,
    inputs: RecoveryInputs,
    writers: Sequence[Writer],
    progress: Progress,
) -> RecoveryData:
    loaded, teacher = inputs.loaded, inputs.teacher
    drawn = load_recovery_data(
        data,
        validation,
        teacher.tokenizer if teacher and inputs.respelling else loaded.tokenizer,
        settings,
        dense=teacher,
        student=loaded,
        respelling=inputs.respelling,
        writers=writers,
        progress=progress,
    )
    ends = torch.tensor(sorted(stop_ids(loaded)), dtype=torch.int64)
    if settings.end_weight != 1 and not any(torch.isin(s.targets, ends).any() for s in drawn.training):
        raise InputError(
            "no turn ends in the training data",
            field="end_weight",
            value=settings.end_weight,
            allowed="1, or chats",
        )
    return check_vocabulary(drawn, inputs)


def _tokens_per_process(settings: RecoverySettings) -> int:
    """Input tokens of one optimizer step, on each process."""
    return settings.seqlen * settings.batch_size * settings.gradient_accumulation_steps


def _n_sequences(settings: RecoverySettings, drawn: RecoveryData, tokens_per_step: int) -> int:
    """Sequences of whole optimizer steps that come closest to the budget, at least one step."""
    budget = token_budget(settings)
    if budget is None:
        tokens = (settings.epochs or 1.0) * sum(part.n_tokens for part in drawn.training)
    else:
        tokens = float(budget)
    steps = max(1, round(tokens / tokens_per_step))
    return steps * tokens_per_step // settings.seqlen


def _plain_settings(settings: RecoverySettings, arguments: Any, *, sharded: bool) -> dict[str, Any]:
    """What the result depends on, as JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(replace(settings, report_to=()))))
    plain |= {"dtype": str(product_dtype(settings.dtype, arguments.device.type))}
    return plain | ({"sharded": True} if sharded else {})


def _run_inputs(
    settings: dict[str, Any], inputs: RecoveryInputs, drawn: RecoveryData, arguments: Any
) -> RunInputs:
    hashes = {**inputs.hashes, "ranks": str(inputs.ranks)}
    if inputs.rounded is not None:
        hashes["rounded"] = inputs.rounded.sha256
    for name, parts in (("data", drawn.training), ("validation data", drawn.validation)):
        hashes[name] = " ".join(part.sha256 for part in parts)
    return RunInputs(settings, hashes, arguments.world_size)


def _rounded(
    settings: RecoverySettings,
    inputs: RecoveryInputs,
    mix: TrainingMix,
    rounding: Rounding | None,
    arguments: Any,
    progress: Progress,
) -> RoundedModel | None:
    """The model as a file of few bits holds it, its numbers chosen for the first of the training text."""
    if settings.for_quant is None or rounding is None:
        return None
    count = min(len(mix), math.ceil(ROUNDING_TOKENS / settings.seqlen))
    windows = torch.stack([mix[i]["input_ids"] for i in range(count)])
    with LargeScratch("recover") as scratch:
        folder = scratch.path / "model"
        with no_space_as_input_error(folder):
            save_checkpoint(inputs.loaded, folder, plan=inputs.plan, seed=settings.seed)
        return rounding.start(folder, settings.for_quant, windows, str(arguments.device), progress)


def _student(
    inputs: RecoveryInputs, settings: RecoverySettings, device: torch.device, *, sharded: bool
) -> Student:
    model: Any = inputs.loaded.model
    dtype = product_dtype(settings.dtype, device.type)
    bring = emptied(model) if sharded else None
    torch.manual_seed(settings.seed)
    if inputs.ranks:
        model = add_adapter(model, inputs.ranks, settings.alpha)
    if inputs.rounded is not None:
        inputs.rounded.attach(model)
    teacher = _teacher(inputs, settings, device, dtype, sharded=sharded)
    student = Student(model, settings, dtype, teacher, sorted(stop_ids(inputs.loaded)))
    if bring is not None:
        float32 = torch.float32
        shard_out(student, student.causal_lm, bring, device, dtype=float32, products=dtype, methods=["sums"])
    return student


def _teacher(
    inputs: RecoveryInputs,
    settings: RecoverySettings,
    device: torch.device,
    dtype: torch.dtype,
    *,
    sharded: bool,
) -> Teacher | None:
    if not learns_from_teacher(settings) or inputs.teacher is None:
        return None
    model = inputs.teacher.model.requires_grad_(False)
    bring = emptied(model) if sharded else None
    teacher = Teacher(model, inputs.respelling, settings.temperature).eval()
    if bring is None:
        cast_weights(model, dtype)
    else:
        shard_out(teacher, model, bring, device, dtype=dtype, products=dtype)
    return teacher


def _record(
    checkpoint: str,
    run: Run,
    inputs: RecoveryInputs,
    dense: ModelSource | None,
    drawn: RecoveryData,
    arguments: Any,
) -> RecoveryRecord:
    state, settings = run.state, run.settings
    return RecoveryRecord(
        checkpoint=checkpoint,
        checkpoint_sha256=inputs.sha256,
        teacher=dense.reference if dense else None,
        teacher_sha256=dense.sha256 if dense else None,
        settings=settings,
        learning_rate=learning_rate(settings),
        dtype=str(run.student.dtype).removeprefix("torch."),
        device=arguments.device.type,
        processes=arguments.world_size,
        ranks=inputs.ranks,
        n_trainable=sum(p.numel() for _, p in run.student.trainable()),
        training=tuple(data_record(part) for part in drawn.training),
        validation=tuple(data_record(part) for part in drawn.validation),
        held_out=drawn.held_out,
        losses=tuple(state.losses),
        validations=tuple(state.validations),
        kept_step=state.best_step,
        perplexity_before=state.validations[0].perplexity,
        perplexity_after=state.best.perplexity,
        tokens_seen=state.losses[-1].tokens if state.losses else 0,
        seconds=state.seconds,
        stopped_by=state.stopped_by or "budget",
        sharded=is_sharded(run.student),
        held_bytes=run.held_bytes,
    )


def _trained(run: Run, inputs: RecoveryInputs, checkpoint: str, *, trust_remote_code: bool) -> Any:
    """The model with the best weights; where none is whole, as it is read once more, with those of the work folder."""
    if not is_sharded(run.student):
        student = run.student.to("cpu")
        return merge_adapter(student.model) if inputs.ranks else student.model.eval()
    model = load_model(checkpoint, trust_remote_code=trust_remote_code, may_stream=True).model
    file = run.work.best_file(run.state.best_step)
    with as_input_error(f"{file} is damaged or cut short"):
        opened = safetensors.safe_open(file, "pt")
    with opened as stored:
        give_trained(model, stored, run.settings.alpha)
    return model


def _write(
    output: Path,
    run: Run,
    inputs: RecoveryInputs,
    model: Any,
    record: RecoveryRecord,
    *,
    force: bool,
    progress: Progress,
) -> None:
    numbers = None if inputs.rounded is None else inputs.rounded.finish(model)
    count = min(len(run.mix), math.ceil(MOMENT_TOKENS / run.settings.seqlen))
    windows = torch.stack([run.mix[i]["input_ids"] for i in range(count)])
    with products_in(run.settings.dtype, model.device.type):
        moments = collect_input_moments(model, moment_windows(windows), progress=progress)
    save_checkpoint(
        replace(inputs.loaded, model=model),
        output,
        plan=inputs.plan,
        input_moments=moments,
        extra_records={RECOVERY_FILE: record},
        rounded=numbers,
        seed=run.settings.seed,
        force=force,
    )
