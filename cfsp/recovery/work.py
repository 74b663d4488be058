"""What a trainer works on, and its folder: checkpoints that count only once they are complete, and the best weights.

inputs.json              what the run is: another run's folder is refused
checkpoint-<step>/       weights, optimizer, schedule, random states, and last of all COMPLETE
best-<step>.safetensors  trainable weights of the best validation
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from cfsp.errors import InputError
from cfsp.files import fsync_directory, fsync_file, remove_stale_temporaries, write_text
from cfsp.progress import Progress
from cfsp.records import read_record, write_record
from cfsp.recovery.data import Sequences, TrainingMix
from cfsp.recovery.recovery_record import RunState
from cfsp.recovery.settings import RecoverySettings
from cfsp.recovery.student import Student

_MARKER = "COMPLETE"
_STATE = "recovery_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class RunInputs:
    """Everything that a run's result depends on; a run is resumed only where all of it is the same.

    Attributes:
        settings: The settings, as JSON.
        hashes: What of, to SHA-256: checkpoint, teacher, data.
        processes: Number of processes.
    """

    KIND: ClassVar[str] = "recovery_inputs"
    SCHEMA_VERSION: ClassVar[int] = 1

    settings: dict[str, Any]
    hashes: dict[str, str]
    processes: int

    def differences(self, other: RunInputs) -> list[str]:
        """Names of what is not the same in two runs."""
        mine, others = (run.settings | run.hashes | {"processes": run.processes} for run in (self, other))
        return sorted(key for key in mine.keys() | others.keys() if mine.get(key) != others.get(key))


@dataclass(frozen=True)
class WorkFolder:
    """One run's work folder."""

    path: Path

    def check_settings(self, settings: dict[str, Any], processes: int, *, force: bool) -> None:
        """Refuse, before anything is read, what `open` would refuse for that alone; raises as `open`."""
        if (there := self._inputs()) is None or force:
            return
        if different := replace(there, settings=settings, processes=processes).differences(there):
            raise self._of_another(different)

    def open(self, inputs: RunInputs, *, force: bool) -> None:
        """Make the folder this run's: anew, or as a killed run of the same inputs left it.

        Raises:
            InputError: It is another run's and `force` is not set, or no work folder at all.
        """
        if (there := self._inputs()) is not None and (different := inputs.differences(there)):
            if not force:
                raise self._of_another(different)
            self.remove()
        if not self._inputs_file.is_file():
            self.path.mkdir(parents=True, exist_ok=True)
            write_record(self._inputs_file, inputs)
        remove_stale_temporaries(self.path)
        for checkpoint in self._checkpoints().values():
            self.discard(checkpoint)

    def _inputs(self) -> RunInputs | None:
        """The run that it is of; None of no folder or an empty one."""
        if not self.path.exists() or not any(self.path.iterdir()):
            return None
        if not self._inputs_file.is_file():
            raise InputError(
                f"{self.path} is no work folder of recovery; name another one with --work, or remove it"
            )
        return read_record(RunInputs, self._inputs_file)

    @property
    def _inputs_file(self) -> Path:
        return self.path / "inputs.json"

    def _of_another(self, different: Sequence[str]) -> InputError:
        return InputError(
            f"{self.path} belongs to a run with other inputs (different: {', '.join(different)}); "
            "--force starts over, --work names another folder"
        )

    def last_checkpoint(self) -> Path | None:
        """The latest complete checkpoint."""
        complete = {step: p for step, p in self._checkpoints().items() if (p / _MARKER).is_file()}
        return complete[max(complete)] if complete else None

    def complete(self, checkpoint: Path, state: RunState) -> None:
        """Mark a checkpoint as complete, after everything in it is on disk, and drop what it makes needless."""
        write_record(checkpoint / _STATE, state)
        for file in checkpoint.iterdir():
            fsync_file(file)
        fsync_directory(checkpoint)
        write_text(checkpoint / _MARKER, "")
        for other in self._checkpoints().values():
            if other != checkpoint:
                shutil.rmtree(other, ignore_errors=True)
        for file in self.path.glob("best-*.safetensors"):
            if file != self.best_file(state.best_step):
                file.unlink()

    def read_state(self, checkpoint: Path) -> RunState:
        """The run's state at a complete checkpoint."""
        return read_record(RunState, checkpoint / _STATE)

    def best_file(self, step: int) -> Path:
        """Where the trainable weights of a best step are kept; those of earlier ones until a checkpoint is complete."""
        return self.path / f"best-{step}.safetensors"

    def kept(self) -> str:
        """In words: what a failed run leaves."""
        last = self.last_checkpoint()
        return f"the last complete checkpoint is {last}" if last else "no checkpoint was complete yet"

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def discard(self, checkpoint: Path) -> None:
        """Delete a checkpoint that could not be completed."""
        if not (checkpoint / _MARKER).is_file():
            shutil.rmtree(checkpoint, ignore_errors=True)

    def _checkpoints(self) -> dict[int, Path]:
        entries = self.path.iterdir() if self.path.is_dir() else iter(())
        matches = ((_CHECKPOINT.fullmatch(p.name), p) for p in entries if p.is_dir())
        return {int(match[1]): p for match, p in matches if match}


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
        held_bytes: Of weights and optimizer state, that this process held in the end.
    """

    student: Student
    mix: TrainingMix
    validation: Sequence[Sequences]
    settings: RecoverySettings
    work: WorkFolder
    tokens_per_step: int
    progress: Progress
    state: RunState = field(default_factory=RunState)
    held_bytes: int = 0

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return len(self.mix) * self.settings.seqlen // self.tokens_per_step
