"""The training loop on accelerate, with checkpoints that can be trusted after a kill.

inputs.json              what the run is: another run's folder is refused
checkpoint-<step>/       weights, optimizer, random states, curves, and last of all COMPLETE
best-<step>.safetensors  trainable weights of the best validation
"""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from torch.optim.lr_scheduler import LambdaLR

from cfsp.devices import exact_device
from cfsp.errors import InputError
from cfsp.evaluation.loss import bounded_exp
from cfsp.files import (
    atomic_file,
    fsync_directory,
    fsync_file,
    no_space_as_input_error,
    remove_directory,
    remove_stale_temporaries,
    write_text,
)
from cfsp.progress import Progress
from cfsp.reading import as_input_error
from cfsp.records import read_record, write_record
from cfsp.recovery.data import IGNORED, Sequences, TrainingMix
from cfsp.recovery.recovery_record import LossPoint, ValidationPoint
from cfsp.recovery.settings import RecoverySettings, learning_rate
from cfsp.recovery.student import Student

_COMPLETE = "COMPLETE"
_STATE = "recovery_state.json"
_WEIGHTS = "trainable.safetensors"
_OPTIMIZER = "optimizer.pt"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_VALIDATIONS = 10
"""Most validations of a run whose settings do not say how often."""
_DIVERGENCE_FACTOR = 2.0
"""A validation loss whose exponential is so many times the best's means that training diverges."""


@dataclass
class RunState:
    """What a run's checkpoints keep beside the weights."""

    KIND: ClassVar[str] = "recovery_state"
    SCHEMA_VERSION: ClassVar[int] = 1

    losses: list[LossPoint] = field(default_factory=list)  # training curve
    # validation curve, the untrained state first.
    validations: list[ValidationPoint] = field(default_factory=list)
    best_step: int = 0  # step of the best validation; 0 is the untrained state
    without_improvement: int = 0  # validations since then
    seconds: float = 0.0  # spent in training, over all resumed parts
    stopped_by: str | None = None  # why training ended; None while it goes on

    def add_validation(self, point: ValidationPoint, patience: int) -> bool:
        """Note a validation and decide whether the run goes on; returns whether it is the best so far."""
        if not math.isfinite(point.loss):
            self.stopped_by = "diverged"
            return False
        best = min((each.loss for each in self.validations), default=math.inf)
        self.validations.append(point)
        if point.loss < best:
            self.best_step, self.without_improvement = point.step, 0
            return True
        self.without_improvement += 1
        if point.loss > best + math.log(_DIVERGENCE_FACTOR):
            self.stopped_by = "diverged"
        elif patience and self.without_improvement >= patience:
            self.stopped_by = "patience"
        return False


@dataclass(frozen=True)
class RunInputs:
    """Everything that a run's result depends on; a run is resumed only if all of it is the same.

    `hashes` are SHA-256 by name (checkpoint, teacher, data).
    """

    KIND: ClassVar[str] = "recovery_inputs"
    SCHEMA_VERSION: ClassVar[int] = 1

    settings: dict[str, Any]
    hashes: dict[str, str]
    processes: int


class WorkFolder:
    """One run's work folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, inputs: RunInputs, *, force: bool) -> None:
        """Make the folder this run's: anew, or as a killed run of the same inputs left it.

        Raises InputError: it is another run's and `force` is not set, or no work folder at all.
        """
        if self.refuse_other(inputs, force=force):
            self.remove()
        if not (self.path / "inputs.json").is_file():
            self.path.mkdir(parents=True, exist_ok=True)
            write_record(self.path / "inputs.json", inputs)
        remove_stale_temporaries(self.path)
        for checkpoint in self._checkpoints().values():
            self.discard(checkpoint)

    def refuse_other(self, inputs: RunInputs, *, force: bool) -> bool:
        """Whether the folder is another run's, which is an InputError without `force`; no hashes compare as equal."""
        if not self.path.exists() or not any(self.path.iterdir()):
            return False
        file = self.path / "inputs.json"
        if not file.is_file():
            raise InputError(
                f"{self.path} is no work folder of recovery; name another one with --set work, or remove it"
            )
        there = read_record(RunInputs, file)
        ours = {**inputs.settings, **(inputs.hashes or there.hashes), "processes": inputs.processes}
        theirs = {**there.settings, **there.hashes, "processes": there.processes}
        keys = sorted(ours.keys() | theirs.keys())
        different = [key for key in keys if ours.get(key) != theirs.get(key)]
        if different and not force:
            raise InputError(
                f"{self.path} belongs to a run with other inputs (different: {', '.join(different)}); "
                "--force starts over, --set work names another folder"
            )
        return bool(different)

    def last_checkpoint(self) -> Path | None:
        """The latest complete checkpoint."""
        complete = {step: p for step, p in self._checkpoints().items() if (p / _COMPLETE).is_file()}
        return complete[max(complete)] if complete else None

    def complete(self, checkpoint: Path, state: RunState) -> None:
        """Mark a checkpoint as complete, after everything in it is on disk, and drop older ones."""
        write_record(checkpoint / _STATE, state)
        for file in checkpoint.iterdir():
            fsync_file(file)
        fsync_directory(checkpoint)
        write_text(checkpoint / _COMPLETE, "")
        for other in self._checkpoints().values():
            if other != checkpoint:
                shutil.rmtree(other, ignore_errors=True)
        for file in self.path.glob("best-*.safetensors"):
            if file != self.best_file(state.best_step):
                file.unlink()

    def best_file(self, step: int) -> Path:
        """Trainable weights of a best step; earlier ones stay until a checkpoint is complete."""
        return self.path / f"best-{step}.safetensors"

    def remove(self) -> None:
        """Delete the folder, if possible in one step."""
        if not self.path.exists():
            return
        try:
            remove_directory(self.path)
        except OSError:  # a mount point, or a parent that cannot be written
            shutil.rmtree(self.path, ignore_errors=True)

    def discard(self, checkpoint: Path) -> None:
        """Delete a checkpoint that could not be completed."""
        if not (checkpoint / _COMPLETE).is_file():
            shutil.rmtree(checkpoint, ignore_errors=True)

    def _checkpoints(self) -> dict[int, Path]:
        entries = self.path.iterdir() if self.path.is_dir() else iter(())
        matches = ((_CHECKPOINT.fullmatch(p.name), p) for p in entries if p.is_dir())
        return {int(match[1]): p for match, p in matches if match}


def start_accelerator(settings: RecoverySettings, work: Path, device: torch.device) -> Any:
    """accelerate's view of the processes that a launcher started; joins them, if there are several.

    The first of them may write text for hours, which is longer than torch waits by default.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    if device.index and device.type == "cuda":
        torch.cuda.set_device(device)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",  # the student casts what it multiplies
        device_placement=False,
        log_with=[name for name in settings.report_to if name != "none"] or None,
        project_dir=f"{work}.runs",
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(days=1)),
            DistributedDataParallelKwargs(find_unused_parameters=False),
        ],
    )


class _Checkpoints:
    """What a run keeps on the disk, and goes on from."""

    def __init__(
        self, student: Student, work: WorkFolder, accelerator: Any, optimizer: Any, schedule: Any
    ) -> None:
        self.trained, self.work, self.accelerator = dict(student.trainable()), work, accelerator
        self.optimizer, self.schedule = optimizer, schedule
        self.device = next(iter(self.trained.values())).device
        self.random_file = f"random_{accelerator.process_index}.pt"

    def save_weights(self, file: Path) -> None:
        """Write the trainable weights, in the main process."""
        if self.accelerator.is_main_process:
            tensors = {name: p.detach().cpu().contiguous() for name, p in self.trained.items()}
            with atomic_file(file) as temporary:
                safetensors.torch.save_file(tensors, temporary)

    def load_weights(self, file: Path) -> None:
        """Read them; raises InputError for a damaged file."""
        with (
            as_input_error(f"{file} is damaged or cut short"),
            torch.no_grad(),
            safetensors.safe_open(file, "pt") as stored,
        ):
            for name, parameter in self.trained.items():
                parameter.copy_(stored.get_tensor(name))

    def save(self, step: int, state: RunState) -> None:
        """Write a checkpoint, which counts once all of it is there; InputError for a full disk."""
        folder = self.work.path / f"checkpoint-{step}"
        try:
            with no_space_as_input_error(folder):
                folder.mkdir(exist_ok=True)
                random = {"cpu": torch.get_rng_state()}
                if self.device.type == "cuda":
                    random["cuda"] = torch.cuda.get_rng_state()
                torch.save(random, folder / self.random_file)
                self.save_weights(folder / _WEIGHTS)
                if self.accelerator.is_main_process:
                    states = {
                        "optimizer": self.optimizer.state_dict(),
                        "schedule": self.schedule.state_dict(),
                    }
                    torch.save(states, folder / _OPTIMIZER)
                self.accelerator.wait_for_everyone()
                if self.accelerator.is_main_process:
                    self.work.complete(folder, state)
        except Exception as error:
            if self.accelerator.is_main_process:
                self.work.discard(folder)
            if isinstance(error, InputError):
                last = self.work.last_checkpoint()
                kept = f"the last complete checkpoint is {last}" if last else "no checkpoint was complete yet"
                raise InputError(f"{error}; {kept}") from error
            raise

    def resume(self) -> RunState | None:
        """Take everything back from the last complete checkpoint; InputError if that is damaged."""
        if (last := self.work.last_checkpoint()) is None:
            return None
        try:
            state = read_record(RunState, last / _STATE)
            self.load_weights(last / _WEIGHTS)
            with as_input_error("its optimizer"):
                stored = torch.load(last / _OPTIMIZER, map_location=self.device, weights_only=True)
                self.optimizer.load_state_dict(stored["optimizer"])
                self.schedule.load_state_dict(stored["schedule"])
                random = torch.load(last / self.random_file, weights_only=True)
                torch.set_rng_state(random["cpu"])
                if self.device.type == "cuda":
                    torch.cuda.set_rng_state(random["cuda"])
        except InputError as error:
            raise InputError(f"{last} is damaged; remove the work folder to start over: {error}") from error
        return state


def learning_rate_share(warmup_ratio: float, steps: int, step: int) -> float:
    """Share of the peak learning rate at step t of T; it rises linearly, then falls as a cosine, and is never zero.

    (t + 1) / (w + 1)  for t < w = floor(warmup_ratio * T),    (1 + cos(pi (t - w) / (T - w))) / 2  from there
    """
    warmup = int(warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def train(
    student: Student,
    settings: RecoverySettings,
    mix: TrainingMix,
    validation: Sequence[Sequences],
    work: WorkFolder,
    accelerator: Any,
    device: torch.device,
    progress: Progress,
) -> RunState:
    """Train until the budget is used, patience ends or the loss diverges; resumes from the work folder.

    Afterwards the main process's student has the weights of the best validation. Of every step's sequences each
    process takes its own batches; the loss is the mean over the labels of all of them. Raises InputError: the disk is
    full (the last complete checkpoint is kept), or a checkpoint is damaged.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    batch, passes = settings.batch_size, settings.gradient_accumulation_steps
    per_step = batch * passes * world
    n_steps, tokens_per_step = len(mix) // per_step, per_step * settings.seqlen
    held = [part[row] for part in validation for row in range(len(part.input_ids))]
    # A tenth of all steps, and enough to learn as much as a validation reads.
    every = settings.eval_every or max(math.ceil(n_steps / _VALIDATIONS), math.ceil(len(held) / per_step))
    clock = time.monotonic()

    student.to(device)
    if student.teacher is not None:
        student.teacher.to(device)
    model = accelerator.prepare(student)
    trained = [parameter for _, parameter in student.trainable()]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate(settings),
        fused=device.type in ("cpu", "cuda"),
    )
    schedule = LambdaLR(optimizer, partial(learning_rate_share, settings.warmup_ratio, n_steps))
    checkpoints = _Checkpoints(student, work, accelerator, optimizer, schedule)
    if settings.report_to:
        accelerator.init_trackers("phoneready")

    def validate(step: int) -> None:
        """Mean losses on the validation sequences, shared among the processes; keeps the best weights."""
        student.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        own = held[rank::world]
        for done, item in enumerate(own, 1):
            sums += student.sums({name: ids[None].to(device) for name, ids in item.items()})
            progress("validating", done, len(own))
        loss, next_token, count = accelerator.reduce(sums.to(exact_device(device)), "sum").tolist()
        point = ValidationPoint(step, step * tokens_per_step, loss / count, bounded_exp(next_token / count))
        if state.add_validation(point, settings.patience):
            checkpoints.save_weights(work.best_file(step))
        accelerator.log({"eval_loss": point.loss, "eval_perplexity": point.perplexity}, step)

    if (resumed := checkpoints.resume()) is not None:
        state = resumed
    else:
        state = RunState()
        validate(0)
    first, began = state.losses[-1].step if state.losses else 0, time.monotonic()
    for step in range(first + 1, n_steps + 1) if state.stopped_by is None else ():
        student.train()
        batches = []
        for number in range((step - 1) * passes, step * passes):
            start = (number * world + rank) * batch
            items = [mix[index] for index in range(start, start + batch)]
            batches.append({key: torch.stack([item[key] for item in items]).to(device) for key in items[0]})
        n_labels = torch.stack([(one["labels"] != IGNORED).sum() for one in batches]).sum()
        n_labels = accelerator.reduce(n_labels, "sum").clamp_min(1)
        total = torch.zeros((), device=device)
        for number, one in enumerate(batches, 1):
            with nullcontext() if number == passes else accelerator.no_sync(model):
                loss = model(**one)
                # DistributedDataParallel averages gradients over the processes, hence the factor.
                accelerator.backward(loss * (world / n_labels))
                total += loss.detach()
        mean = float(accelerator.reduce(total, "sum") / n_labels)
        norm = accelerator.clip_grad_norm_(trained, settings.max_grad_norm)
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if math.isfinite(mean):
            state.losses.append(LossPoint(step, step * tokens_per_step, mean))
        else:
            state.stopped_by = "diverged"
        minutes = (time.monotonic() - began) * (n_steps - step) / (step - first) / 60
        told = {"loss": mean, "learning_rate": rate, "grad_norm": float(norm), "minutes_left": minutes}
        accelerator.log(told, step)
        progress(f"training: loss {mean:.3f}", step, n_steps)
        if state.stopped_by is None and (step % every == 0 or step == n_steps):
            validate(step)
            if state.stopped_by != "diverged":
                state.seconds, clock = state.seconds + time.monotonic() - clock, time.monotonic()
                checkpoints.save(step, state)
        if state.stopped_by:
            break

    if settings.report_to:
        accelerator.end_training()
    state.seconds += time.monotonic() - clock
    state.stopped_by = state.stopped_by or "budget"
    if accelerator.is_main_process:
        checkpoints.load_weights(work.best_file(state.best_step))
    return state
