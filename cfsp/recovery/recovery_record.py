"""How a run goes: its state, which its own checkpoints keep, and recovery.json, which the recovered one keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from cfsp.errors import InputError
from cfsp.recovery.data import Sequences
from cfsp.recovery.settings import RecoverySettings
from cfsp.validation import WhereSet

RECOVERY_FILE = "recovery.json"
DIVERGENCE_FACTOR = 2.0
"""A validation loss whose exponential is so many times the best's means that training diverges."""


@dataclass(frozen=True)
class DataRecord:
    """One source of sequences.

    Attributes:
        reference: As given.
        sha256: Hash of ids and targets.
        n_sequences: Number of sequences.
        n_tokens: Positions in them.
        n_learnt: Positions with a target.
        n_loops: Texts that the dense model wrote in loops, and that were left out.
    """

    reference: str
    sha256: str
    n_sequences: int
    n_tokens: int
    n_learnt: int
    n_loops: int = 0


@dataclass(frozen=True)
class LossPoint:
    """Training loss of one step.

    Attributes:
        step: Optimizer step, from 1.
        tokens: Input tokens seen by then, over all processes.
        loss: Mean objective over the step's labelled positions, in nats.
    """

    step: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class ValidationPoint:
    """One validation.

    Attributes:
        step: Optimizer step; 0 is before training.
        tokens: Input tokens seen by then.
        loss: Mean objective over the labelled validation positions, in nats.
        perplexity: exp of the mean next-token loss over the same positions.
    """

    step: int
    tokens: int
    loss: float
    perplexity: float


@dataclass(frozen=True)
class RecoveryRecord:
    """A recovery run.

    Attributes:
        checkpoint: What was recovered.
        checkpoint_sha256: Of its weights.
        teacher: The dense model, where the loss or the data needed one.
        teacher_sha256: Of its weights.
        settings: How it was trained.
        learning_rate: The peak that was used.
        dtype: The dtype that the matrix products were computed in.
        device: Kind of device, such as "cpu".
        processes: Number of processes.
        ranks: Adapter rank of every block; empty where all weights were trained.
        n_trainable: Number of weights trained.
        training: Training data.
        validation: Validation data.
        held_out: Whether the validation data is a held-out share of the training data.
        losses: Training curve.
        validations: Validation curve; the first is the untrained state.
        kept_step: Step whose weights were kept, the best validation's; 0 is the untrained state.
        tokens_seen: Input tokens trained on.
        seconds: Spent in training and validation.
        stopped_by: "budget", "patience" or "diverged".
        warnings: What was asked for and has had no effect.
    """

    KIND: ClassVar[str] = "recovery"
    SCHEMA_VERSION: ClassVar[int] = 3

    checkpoint: str
    checkpoint_sha256: str
    teacher: str | None
    teacher_sha256: str | None
    settings: RecoverySettings
    learning_rate: float
    dtype: str
    device: str
    processes: int
    ranks: tuple[int, ...]
    n_trainable: int
    training: tuple[DataRecord, ...]
    validation: tuple[DataRecord, ...]
    held_out: bool
    losses: tuple[LossPoint, ...]
    validations: tuple[ValidationPoint, ...]
    kept_step: int
    tokens_seen: int
    seconds: float
    stopped_by: str
    warnings: Annotated[tuple[str, ...], WhereSet] = ()

    def __post_init__(self) -> None:
        if not self.validations or self.kept_step not in [point.step for point in self.validations]:
            raise InputError("no validation is of it", field="kept_step", value=self.kept_step)

    @property
    def before(self) -> ValidationPoint:
        """Untrained."""
        return self.validations[0]

    @property
    def after(self) -> ValidationPoint:
        """Of what was kept."""
        return next(point for point in self.validations if point.step == self.kept_step)

    @property
    def change(self) -> str:
        """Validation loss and perplexity, untrained and of what was kept, in words."""
        before, after = self.before, self.after
        return (
            f"loss {before.loss:.4f} before, {after.loss:.4f} after; "
            f"perplexity {before.perplexity:.2f} before, {after.perplexity:.2f} after"
        )

    @property
    def shortcoming(self) -> str | None:
        """In words, where training diverged or gained nothing; None where it went well."""
        kept = (
            f"the weights of step {self.kept_step} are kept"
            if self.kept_step
            else "no step was better than the untrained weights, which are kept"
        )
        if self.stopped_by == "diverged":
            return f"training diverged after step {self.losses[-1].step if self.losses else 0}; {kept}"
        return None if self.kept_step else f"training gained nothing on the validation data; {kept}"


def data_record(sequences: Sequences) -> DataRecord:
    """The record of one source."""
    return DataRecord(
        sequences.source,
        sequences.sha256,
        len(sequences.input_ids),
        sequences.n_tokens,
        sequences.n_learnt,
        sequences.n_loops,
    )


@dataclass
class RunState:
    """Everything about a run that its checkpoints keep beside the weights.

    Attributes:
        losses: Training curve.
        validations: Validation curve, the untrained state first.
        best_step: Step of the best validation; 0 is the untrained state.
        without_improvement: Validations since then.
        seconds: Spent in training, over all resumed parts.
        stopped_by: Why training ended; None while it goes on.
    """

    KIND: ClassVar[str] = "recovery_state"
    SCHEMA_VERSION: ClassVar[int] = 1

    losses: list[LossPoint] = field(default_factory=list)
    validations: list[ValidationPoint] = field(default_factory=list)
    best_step: int = 0
    without_improvement: int = 0
    seconds: float = 0.0
    stopped_by: str | None = None

    @property
    def best(self) -> ValidationPoint:
        """The best validation."""
        return next(point for point in self.validations if point.step == self.best_step)

    def add_loss(self, point: LossPoint) -> None:
        """Note a step's training loss; one that is not finite ends the run as diverged and is not kept."""
        if math.isfinite(point.loss):
            self.losses.append(point)
        else:
            self.stopped_by = "diverged"

    def add_validation(self, point: ValidationPoint, patience: int | None) -> bool:
        """Note a validation and decide whether the run goes on; returns whether it is the best so far.

        Without `patience`, None or 0, no lack of improvement ends the run.
        """
        if not math.isfinite(point.loss):
            self.stopped_by = "diverged"
            return False
        self.validations.append(point)
        if len(self.validations) == 1 or point.loss < self.best.loss:
            self.best_step, self.without_improvement = point.step, 0
            return True
        self.without_improvement += 1
        if point.loss > self.best.loss + math.log(DIVERGENCE_FACTOR):
            self.stopped_by = "diverged"
        elif patience and self.without_improvement >= patience:
            self.stopped_by = "patience"
        return False
