"""transformers' Trainer with our loss, our validation and checkpoints that can be trusted after a kill.

Importing this module needs accelerate; `cfsp.recovery.recover` does so only when it trains.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import distributed
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from cfsp.devices import exact_device
from cfsp.errors import InputError
from cfsp.evaluation.perplexity import bounded_exp
from cfsp.files import atomic_file, no_space_as_input_error
from cfsp.models.architectures import decoder_layers
from cfsp.models.weights import quiet_transformers, save_in_turn
from cfsp.processes import PATIENCE
from cfsp.reading import as_input_error, one_line
from cfsp.recovery.optimizer import MuonAndAdamW
from cfsp.recovery.recovery_record import LossPoint, ValidationPoint
from cfsp.recovery.settings import (
    ADAMW,
    RecoverySettings,
    learning_rate,
    learning_rate_share,
    plain_rate,
    trackers,
    validation_interval,
)
from cfsp.recovery.sharding import (
    give,
    held_bytes,
    is_sharded,
    load_own_state,
    own_state,
    put_back,
    whole,
)
from cfsp.recovery.work import Run

logger = logging.getLogger(__name__)

_WEIGHTS = "trainable.safetensors"
_TRAINER_STATE = "trainer_state.json"


class _Arguments(TrainingArguments):  # type: ignore[misc]
    @property
    def n_gpu(self) -> int:
        """Several GPUs in a process would mean DataParallel, which averages losses wrongly: accelerate launch does."""
        return min(int(super().n_gpu), 1)

    @property
    def device(self) -> torch.device:
        """The GPU that was asked for: of several transformers takes the first."""
        found: torch.device = super().device
        alone = self.world_size == 1 and found.type == "cuda"
        return torch.device("cuda", torch.cuda.current_device()) if alone else found


def training_arguments(settings: RecoverySettings, work: Path, *, device: torch.device) -> Any:
    """TrainingArguments of a run, steps and intervals still open; joins the other processes, if any."""
    _join_on_cpu(device)
    arguments = _Arguments(
        output_dir=str(work),
        use_cpu=device.type == "cpu",
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        num_train_epochs=1,
        learning_rate=learning_rate(settings),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        data_seed=settings.seed,
        average_tokens_across_devices=True,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        eval_strategy="no",
        save_strategy="no",
        report_to=list(trackers(settings)) or "none",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        ddp_timeout=int(PATIENCE.total_seconds()),
    )
    if device.index and arguments.world_size == 1:
        torch.cuda.set_device(device)
    return arguments


def _join_on_cpu(device: torch.device) -> None:
    """Join the other processes: on CPUs transformers does so with torch's half an hour, whatever its arguments say.

    One process may write the text for longer than that while the others wait.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if device.type == "cpu" and not alone and not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=PATIENCE)


def train(run: Run, arguments: Any) -> None:
    """Train until the budget is used, patience ends or the loss diverges; resumes from the work folder.

    Afterwards `run.state` says how it went, and the student of the main process holds the weights of the best
    validation, unless it is sharded: then a file of the work folder has them.

    Raises:
        InputError: The disk is full; the last complete checkpoint is kept.
    """
    settings, steps = run.settings, run.n_steps
    held = sum(len(part.input_ids) for part in run.validation)
    every = validation_interval(settings, steps, run.tokens_per_step // settings.seqlen, held)
    arguments.eval_strategy = arguments.save_strategy = transformers.trainer_utils.IntervalStrategy.STEPS
    arguments.eval_steps, arguments.save_steps = every, settings.save_every or every
    with quiet_transformers():
        with _tensorboard_folder(Path(f"{run.work.path}.runs")):
            trainer = RecoveryTrainer(run, arguments)
        started = run.work.last_checkpoint()
        if started is not None:
            run.state = run.work.read_state(started)
            with _resuming(started):
                transformers.TrainerState.load_from_json(str(started / _TRAINER_STATE))
        else:
            trainer.validate()
        if run.state.stopped_by is None and (not run.state.losses or run.state.losses[-1].step < steps):
            trainer.train(resume_from_checkpoint=None if started is None else str(started))
    trainer.note_time()
    run.state.stopped_by = run.state.stopped_by or "budget"
    run.held_bytes = trainer.count_held()
    trainer.load_best()


def check_trackers(names: Sequence[str]) -> None:
    """Raise InputError for a tracker that transformers does not know or whose package is missing."""
    try:
        for tracker in transformers.integrations.get_reporting_integration_callbacks(list(names)):
            tracker()
    except (ValueError, RuntimeError, ImportError) as error:
        raise InputError(
            f"a tracker cannot be used: {one_line(error)}", field="report_to", value=list(names)
        ) from error


@contextmanager
def _tensorboard_folder(folder: Path) -> Iterator[None]:
    """Where TensorBoard's files go unless the user says it: the work folder, transformers' choice, is removed."""
    name = "TENSORBOARD_LOGGING_DIR"
    with ExitStack() as stack:
        if name not in os.environ:
            os.environ[name] = str(folder)
            stack.callback(os.environ.pop, name)
        yield


class _Watcher(TrainerCallback):  # type: ignore[misc]
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


class RecoveryTrainer(Trainer):  # type: ignore[misc]
    """Trainer over a `Student`; trainable weights alone are saved, as safetensors.

    It overrides six private methods, as Trainer has no public way to say what a checkpoint's weights are, when a
    checkpoint is complete, and in which order examples come; a test holds the signatures that they must have.
    """

    control: Any
    lr_scheduler: Any
    optimizer: Any

    def __init__(self, run: Run, arguments: Any) -> None:
        super().__init__(
            model=run.student,
            args=arguments,
            train_dataset=run.mix,
            eval_dataset=[],
            data_collator=_stack,
            callbacks=[_Watcher(run)],
        )
        self.remove_callback(transformers.trainer_callback.PrinterCallback)
        self.run = run
        if is_sharded(run.student):
            # Or accelerate would put DistributedDataParallel around it.
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self._clock = time.monotonic()
        if run.student.teacher is not None:
            run.student.teacher.model.to(arguments.device)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, or what the settings ask for."""
        settings, student = self.run.settings, self.run.student
        if self.optimizer is not None or settings.optimizer == ADAMW:
            return super().create_optimizer(*args, **kwargs)
        blocks = {
            id(p) for layer in decoder_layers(student.causal_lm) for p in layer.parameters() if p.ndim == 2
        }
        trained = [parameter for _, parameter in student.trainable()]
        self.optimizer = MuonAndAdamW(
            [parameter for parameter in trained if id(parameter) in blocks],
            [parameter for parameter in trained if id(parameter) not in blocks],
            rate=learning_rate(settings),
            other_rate=plain_rate(settings),
            weight_decay=settings.weight_decay,
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of `learning_rate_share`: transformers' own spends its first step at a rate of zero."""
        if self.lr_scheduler is None:
            share = partial(learning_rate_share, self.run.settings.warmup_ratio, num_training_steps)
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, share)
        return self.lr_scheduler

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """The batch's loss sum over the labels of ALL accumulated batches of all processes.

        Gradients are averaged over processes afterwards, hence the factor.
        """
        total: torch.Tensor = model(**inputs)
        loss: torch.Tensor = total * (self.accelerator.num_processes / num_items_in_batch)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate, tell trackers, and keep the weights where they are the best so far."""
        point = self.validate()
        metrics = {"eval_loss": point.loss, "eval_perplexity": point.perplexity}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def validate(self) -> ValidationPoint:
        """Mean losses on the validation sequences, which are shared out among the processes."""
        student, run = self.run.student, self.run
        student.eval()
        rows = [item for part in run.validation for item in part.items()]
        world, passes = self.args.world_size, math.ceil(len(rows) / self.args.world_size)
        sums = torch.zeros(3, dtype=torch.float64)
        for done in range(passes):
            number = done * world + self.args.process_index
            item = rows[number % len(rows)]
            found = student.sums({name: ids[None].to(self.args.device) for name, ids in item.items()})
            # All processes make as many passes, as they have sharded weights together; none counts twice.
            if number < len(rows):
                sums += found
            run.progress("validating", done + 1, passes)
        put_back(student)
        total = self.accelerator.reduce(sums.to(exact_device(self.args.device)), reduction="sum").tolist()
        step = self.state.global_step
        point = ValidationPoint(
            step,
            step * run.tokens_per_step,
            total[0] / total[2],
            bounded_exp(total[1] / total[2]),
        )
        if run.state.add_validation(point, run.settings.patience):
            self._save_weights(run.work.best_file(step))
        return point

    def load_best(self) -> None:
        """Give the main process's student, the one that is saved, the weights of the best validation."""
        if self.is_world_process_zero() and not is_sharded(self.run.student):
            self._load_weights(self.run.work.best_file(self.run.state.best_step))

    def count_held(self) -> int:
        """Bytes of weights and optimizer state in this process."""
        student = self.run.student
        models = [student] if student.teacher is None else [student, student.teacher]
        state = self.optimizer.state.values() if self.optimizer is not None else ()
        of_weights = held_bytes(parameter for model in models for parameter in model.parameters())
        return of_weights + held_bytes(tensor for of_one in state for tensor in of_one.values())

    def note_time(self) -> None:
        """Add the time since the last call to the run's."""
        now = time.monotonic()
        self.run.state.seconds += now - self._clock
        self._clock = now

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trainable weights."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._save_weights(folder / _WEIGHTS)

    def _save_weights(self, file: Path) -> None:
        """Write the trainable weights in the main process; of sharded ones the others tell it, one after the other."""
        named = dict(self.run.student.trainable())
        tensors = map(whole, named.values())
        if self.is_world_process_zero():
            with atomic_file(file) as temporary:
                save_in_turn(temporary, named, tensors)
        elif is_sharded(self.run.student):
            deque(tensors, maxlen=0)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with no_space_as_input_error(folder):
                super()._save_checkpoint(model, trial)
                self.note_time()
                self.accelerator.wait_for_everyone()
                if self.is_world_process_zero():
                    self.run.work.complete(folder, self.run.state)
        except Exception as error:
            if self.is_world_process_zero():
                self.run.work.discard(folder)
            if isinstance(error, InputError):
                raise InputError(f"{error}; {self.run.work.kept()}") from error
            raise

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _resuming(resume_from_checkpoint):
            self._load_weights(Path(resume_from_checkpoint) / _WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.run.student):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = {"optimizer": own_state(self.optimizer), "schedule": self.lr_scheduler.state_dict()}
        torch.save(state, self._own_file(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _resuming(checkpoint):
            if checkpoint is None or not is_sharded(self.run.student):
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            state = torch.load(self._own_file(checkpoint), map_location="cpu", weights_only=True)
            load_own_state(self.optimizer, state["optimizer"])
            self.lr_scheduler.load_state_dict(state["schedule"])

    def _own_file(self, checkpoint: str) -> Path:
        """Of this process's part of the optimizer's state."""
        return Path(checkpoint) / f"optimizer_{self.args.process_index}.pt"

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _resuming(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_weights(self, file: Path) -> None:
        with as_input_error(f"{file} is damaged or cut short"), safetensors.safe_open(file, "pt") as stored:
            for name, parameter in self.run.student.trainable():
                give(parameter, stored.get_tensor(name))

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        # The mix has its own order, which depends on the seed alone.
        return SequentialSampler(self.run.mix)


def _resuming(checkpoint: object) -> AbstractContextManager[None]:
    return as_input_error(f"{checkpoint} is damaged; remove the work folder to start over")


def _stack(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}
