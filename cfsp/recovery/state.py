"""What a run knows about itself: curves, the best state so far, and why it stopped."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

DIVERGENCE_FACTOR = 2.0
"""A validation loss whose exponential is so many times the best's means that training diverges."""


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
