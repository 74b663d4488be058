"""What a trainer works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cfsp.progress import Progress
from cfsp.recovery.data import Sequences, TrainingMix
from cfsp.recovery.settings import RecoverySettings
from cfsp.recovery.state import RunState
from cfsp.recovery.student import Student
from cfsp.recovery.work import WorkFolder


@dataclass
class Run:
    """What a trainer works on.

    Attributes:
        student: The model with its loss.
        mix: Training sequences, exactly as many as the budget asks for.
        validation: Validation sequences.
        settings: How to train.
        work: Where checkpoints go.
        tokens_per_step: Input tokens of one optimizer step, over all processes.
        progress: Told about every step.
        state: Curves and the best state.
    """

    student: Student
    mix: TrainingMix
    validation: Sequence[Sequences]
    settings: RecoverySettings
    work: WorkFolder
    tokens_per_step: int
    progress: Progress
    state: RunState = field(default_factory=RunState)

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return len(self.mix) * self.settings.seqlen // self.tokens_per_step
