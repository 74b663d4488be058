"""The callback that notes losses, reports progress, and ends training where the run's state says so.

Importing this module needs accelerate, as transformers' Trainer does.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from cfsp.recovery.run import Run
from cfsp.recovery.state import LossPoint


class Watcher(TrainerCallback):  # type: ignore[misc]
    """Notes losses, reports progress, and ends training where the run's state says so."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> Any:
        if logs and "loss" in logs:
            step = state.global_step
            self.run.state.add_loss(LossPoint(step, step * self.run.tokens_per_step, float(logs["loss"])))
            self.run.progress(f"training: loss {logs['loss']:.3f}", step, self.run.n_steps)
            if self.run.state.stopped_by:
                control.should_training_stop = True
                control.should_evaluate = control.should_save = False
        return control

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step >= self.run.n_steps:
            control.should_evaluate = True
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.run.state.stopped_by:
            control.should_training_stop = True
            if self.run.state.stopped_by == "diverged":
                control.should_save = False
        return control
