"""What a recovery starts from: the checkpoint, its plan, the teacher, and the rank of every block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cfsp.errors import InputError
from cfsp.forecast import Extent, read_extent
from cfsp.models.architectures import decoder_layers
from cfsp.models.checkpoint import INFO_FILE, PLAN_FILE, is_pruned_checkpoint, read_checkpoint_info
from cfsp.models.keeping import AUTO, stay_in_files
from cfsp.models.reference import find_model, load_model
from cfsp.models.source import LoadedModel
from cfsp.progress import Progress, no_progress
from cfsp.pruning.plan import PruningPlan
from cfsp.records import read_record
from cfsp.recovery.adapter import importance_ranks
from cfsp.recovery.rounding import RoundedModel
from cfsp.recovery.settings import (
    RecoverySettings,
    distils_alone,
    learns_from_teacher,
    method_of,
    reads_teacher,
)
from cfsp.text.calibration import check_seqlen
from cfsp.text.respelling import Respelling, respelling
from cfsp.text.self_sampling import model_fingerprint


@dataclass(frozen=True)
class RecoveryInputs:
    """What a run is made from.

    Attributes:
        loaded: The model that is trained; its source is the dense model where a checkpoint names one.
        sha256: Hash of its weights.
        plan: The checkpoint's pruning plan.
        teacher: The dense model, where the loss or the data needs it.
        respelling: How the model spells the teacher's tokens, where it has fewer.
        ranks: Adapter rank of every block; empty where all weights are trained.
        hashes: What of, to a hash of its weights: `checkpoint`, and `teacher` where there is one.
        rounded: The model as a file of few bits holds it, where training goes through its rounding.
    """

    loaded: LoadedModel
    sha256: str
    plan: PruningPlan | None
    teacher: LoadedModel | None
    respelling: Respelling | None
    ranks: tuple[int, ...]
    hashes: Mapping[str, str]
    rounded: RoundedModel | None = None


def load_inputs(
    checkpoint: str,
    teacher: str | None,
    settings: RecoverySettings,
    *,
    data: Sequence[str],
    trust_remote_code: bool = False,
    in_files: bool = False,
    progress: Progress = no_progress,
) -> RecoveryInputs:
    """Load what a run needs, and check that it fits together.

    Args:
        checkpoint: A pruned checkpoint, or any model reference.
        teacher: Model reference; None is the dense model of the checkpoint.
        settings: How to train.
        data: References of training and validation data.
        trust_remote_code: Let transformers run code that a folder or hub model brings along.
        in_files: Leave weights in files where models can be read block by block.
        progress: Told about loading.

    Raises:
        InputError: A sequence longer than the model's context, ranks by importance without a plan, or a teacher that
            is missing, lacks tokens of the checkpoint, is not the model of the checkpoint any more, or has nothing to
            teach as it has the same weights.
    """
    read = partial(_read, trust_remote_code=trust_remote_code, in_files=in_files, progress=progress)
    loaded = read(checkpoint)
    folder, sha256 = Path(checkpoint), loaded.source.sha256 or ""
    plan = read_record(PruningPlan, folder / PLAN_FILE) if (folder / PLAN_FILE).is_file() else None
    if (folder / INFO_FILE).is_file():
        loaded = replace(loaded, source=read_checkpoint_info(folder).source)
    check_seqlen(loaded, settings.seqlen)
    ranks = _ranks(settings, plan, loaded.model)
    hashes = {"checkpoint": model_fingerprint(loaded.model)}
    if not reads_teacher(settings, data):
        return RecoveryInputs(loaded, sha256, plan, None, None, ranks, hashes)
    with _of_teacher():
        dense = read(teacher or loaded.source.again)
    spelled = _respelling(loaded, dense)
    then, now = loaded.source.sha256, dense.source.sha256
    if teacher is None and then and now and then != now:
        raise InputError(
            f"{dense.source.reference} is no longer the model that the checkpoint was pruned from",
            field="teacher",
            value=now,
            allowed=f"the model of hash {then}; --teacher takes another one",
        )
    hashes["teacher"] = model_fingerprint(dense.model)
    if hashes["teacher"] == hashes["checkpoint"] and distils_alone(settings) and settings.for_quant is None:
        raise InputError(
            "a model learns nothing from its own distribution",
            field="loss",
            value=settings.loss,
            allowed="next-token or both, another teacher, or --for-quant",
        )
    return RecoveryInputs(loaded, sha256, plan, dense, spelled, ranks, hashes)


def _read(reference: str, *, in_files: bool, **settings: Any) -> LoadedModel:
    with stay_in_files() if in_files else nullcontext():
        # Training has float32.
        return load_model(reference, dtype=AUTO if in_files else "float32", may_stream=in_files, **settings)


def read_extents(
    checkpoint: str, teacher: str | None, settings: RecoverySettings
) -> tuple[Extent, Extent | None]:
    """How much there is of the model that is trained, and of the teacher where the loss reads one.

    Raises:
        InputError: References lead nowhere, or files are damaged.
    """
    path = Path(find_model(checkpoint).path or "")
    if not learns_from_teacher(settings):
        return read_extent(path), None
    student = read_extent(path)
    with _of_teacher():
        return student, read_extent(Path(find_model(teacher or dense_of(str(path))).path or ""))


def dense_of(checkpoint: str) -> str:
    """Reference of the model that a checkpoint was pruned from; of any other model the model itself."""
    folder = Path(checkpoint)
    return read_checkpoint_info(folder).source.again if is_pruned_checkpoint(folder) else checkpoint


@contextmanager
def _of_teacher() -> Iterator[None]:
    """Say of what cannot be read that it is the teacher."""
    try:
        yield
    except InputError as error:
        message = f"the teacher cannot be loaded (--teacher says where it is): {error}"
        raise InputError(message, field="teacher") from error


def _respelling(loaded: LoadedModel, dense: LoadedModel) -> Respelling | None:
    """How the model spells the teacher's tokens; None where they are the same."""
    ours, theirs = (m.model.get_output_embeddings().weight.shape[0] for m in (loaded, dense))
    if ours == theirs and loaded.tokenizer.get_vocab() == dense.tokenizer.get_vocab():
        return None
    try:
        spelling = respelling(dense.tokenizer, loaded.tokenizer)
    except InputError as error:
        raise _other_vocabulary(dense, ours, theirs) from error
    if len(spelling.kept) > ours:
        raise _other_vocabulary(dense, ours, theirs)
    return spelling


def _other_vocabulary(dense: LoadedModel, ours: int, theirs: int) -> InputError:
    return InputError(
        f"the teacher has another vocabulary ({theirs} tokens) than the checkpoint ({ours} tokens), not a larger one",
        field="teacher",
        value=dense.source.reference,
        allowed="the dense model of the checkpoint, or one whose tokenizer has all of the checkpoint's tokens",
    )


def _ranks(settings: RecoverySettings, plan: PruningPlan | None, model: Any) -> tuple[int, ...]:
    method = method_of(settings)
    if not method.adapter:
        return ()
    if not method.by_importance:
        return (settings.rank,) * len(decoder_layers(model))
    if plan is None:
        raise InputError(
            f"ranks by importance need the checkpoint's {PLAN_FILE}, and there is none",
            field="method",
            value=settings.method,
            allowed="lora, full",
        )
    return importance_ranks([block.importance for block in plan.blocks if block.width], settings.rank)
