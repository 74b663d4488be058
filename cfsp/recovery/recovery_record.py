"""recovery.json: how a run went, kept with the checkpoint that it made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from cfsp.errors import InputError
from cfsp.recovery.settings import RecoverySettings
from cfsp.validation import WhereSet

RECOVERY_FILE = "recovery.json"


@dataclass(frozen=True)
class DataRecord:
    """One source of sequences."""

    reference: str  # as given
    sha256: str  # hash of ids and targets
    n_sequences: int  # number of sequences
    n_tokens: int  # positions in them
    n_learnt: int  # positions with a target
    n_loops: int = 0  # texts that the dense model wrote in loops, and that were left out


@dataclass(frozen=True)
class LossPoint:
    """A step, from 1; input tokens seen by then over all processes; mean objective over its labels, in nats."""

    step: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class ValidationPoint(LossPoint):
    """The same of the validation data (step 0 is untrained), and exp of its mean next-token loss."""

    perplexity: float


@dataclass(frozen=True)
class RecoveryRecord:
    """A recovery run."""

    KIND: ClassVar[str] = "recovery"
    SCHEMA_VERSION: ClassVar[int] = 4

    checkpoint: str  # what was recovered, then the hash of its weights
    checkpoint_sha256: str
    teacher: str | None  # the dense model, if the loss or the data needed one, then the hash of its weights
    teacher_sha256: str | None
    settings: RecoverySettings  # how it was trained
    learning_rate: float  # the peak that was used
    dtype: str  # of matrix products
    device: str  # kind of device, such as "cpu"
    processes: int  # number of processes
    ranks: tuple[int, ...]  # adapter rank of every block; empty if all weights were trained
    n_trainable: int  # number of weights trained
    training: tuple[DataRecord, ...]
    validation: tuple[DataRecord, ...]
    held_out: bool  # whether the validation data is a held-out share of the training data
    losses: tuple[LossPoint, ...]  # training curve
    validations: tuple[ValidationPoint, ...]  # validation curve; the first is the untrained state
    kept_step: int  # step whose weights were kept, the best validation's; 0 is the untrained state
    tokens_seen: int  # input tokens trained on
    seconds: float  # spent in training and validation
    stopped_by: str  # "budget", "patience" or "diverged"
    warnings: Annotated[tuple[str, ...], WhereSet] = ()  # settings that had no effect

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
        """In words, if training diverged or gained nothing."""
        kept = (
            f"the weights of step {self.kept_step} are kept"
            if self.kept_step
            else "no step was better than the untrained weights, which are kept"
        )
        if self.stopped_by == "diverged":
            return f"training diverged after step {self.losses[-1].step if self.losses else 0}; {kept}"
        return None if self.kept_step else f"training gained nothing on the validation data; {kept}"
