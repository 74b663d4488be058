"""recovery.json: what a recovered checkpoint was trained with, and how it went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cfsp.recovery.data import Sequences
from cfsp.recovery.settings import RecoverySettings
from cfsp.recovery.state import LossPoint, ValidationPoint

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
    """

    reference: str
    sha256: str
    n_sequences: int
    n_tokens: int
    n_learnt: int


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
        perplexity_before: Validation perplexity, untrained.
        perplexity_after: Validation perplexity of what was kept.
        tokens_seen: Input tokens trained on.
        seconds: Spent in training and validation.
        stopped_by: "budget", "patience" or "diverged".
    """

    KIND: ClassVar[str] = "recovery"
    SCHEMA_VERSION: ClassVar[int] = 1

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
    perplexity_before: float
    perplexity_after: float
    tokens_seen: int
    seconds: float
    stopped_by: str


def data_record(sequences: Sequences) -> DataRecord:
    """The record of one source."""
    return DataRecord(
        sequences.source,
        sequences.sha256,
        len(sequences.input_ids),
        sequences.n_tokens,
        sequences.n_learnt,
    )
