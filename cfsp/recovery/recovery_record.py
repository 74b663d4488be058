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
    """A recovery run.

    Attributes:
        checkpoint: What was recovered, then the hash of its weights.
        teacher: The dense model, if the loss or the data needed one, then the hash of its weights.
        settings: How it was trained.
        learning_rate: The peak that was used.
        dtype: Of matrix products.
        device: Kind of device, such as "cpu".
        processes: Number of processes.
        ranks: Adapter rank of every block; empty if all weights were trained.
        n_trainable: Number of weights trained.
        held_out: Whether the validation data is a held-out share of the training data.
        losses: Training curve.
        validations: Validation curve; the first is the untrained state.
        kept_step: Step whose weights were kept, the best validation's; 0 is the untrained state.
        tokens_seen: Input tokens trained on.
        seconds: Spent in training and validation.
        stopped_by: "budget", "patience" or "diverged".
        warnings: Settings that had no effect.
    """

    KIND: ClassVar[str] = "recovery"
    SCHEMA_VERSION: ClassVar[int] = 4

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
        """In words, if training diverged or gained nothing."""
        kept = (
            f"the weights of step {self.kept_step} are kept"
            if self.kept_step
            else "no step was better than the untrained weights, which are kept"
        )
        if self.stopped_by == "diverged":
            return f"training diverged after step {self.losses[-1].step if self.losses else 0}; {kept}"
        return None if self.kept_step else f"training gained nothing on the validation data; {kept}"
