"""What each stage of shrinking does: learn a task, prune a little more, train, judge."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cfsp.errors import InputError, MissingExtraError
from cfsp.evaluation.tasks import (
    check_chat_tasks,
    load_chat_tasks,
    load_tasks,
    run_tasks,
    tasks_sha256,
)
from cfsp.evaluation.torch_model import TorchLanguageModel
from cfsp.models.architectures import model_shape
from cfsp.models.checkpoint import save_checkpoint
from cfsp.models.reference import load_model
from cfsp.models.source import LoadedModel
from cfsp.progress import Progress
from cfsp.pruning.prune import prune_model
from cfsp.pruning.settings import PruneSettings
from cfsp.records import write_record
from cfsp.scratch import LargeScratch
from cfsp.settings import pick
from cfsp.text.calibration import Calibration, check_seqlen
from cfsp.text.settings import SELF
from exporters.checkpoint_reader import read_config
from exporters.families import DEFAULT_FORMAT, required_multiple
from phoneready.evaluation.run import evaluate, text_windows
from phoneready.evaluation.settings import EvaluationSettings
from phoneready.recipe import model_settings, recovery_settings
from phoneready.release.identities import identities
from phoneready.release.pruning_budget import fitting_settings
from phoneready.release.stages import Stage, stage_folder
from phoneready.release.steps import load_stage, run_recovery, shortcoming_of
from phoneready.settings.schema import RecoverConfig, ReleaseConfig
from phoneready.shrink.record import BASE_QUANT, START, ShrunkStep
from phoneready.shrink.settings import ShrinkSettings, learning
from phoneready.sizes import Sizes
from phoneready.text import WRITERS, load_calibration

DENSE, LEARNT, PRUNED, TRAINED, JUDGED = "dense", "learn", "prune", "recover", "judge"
"""Kinds of stages; of the last three each step has one."""
STEP_FILE, WORK = "step.json", ".work"


def kind_and_number(stage: str) -> tuple[str, int]:
    """What a stage does, and for which step."""
    kind, _, number = stage.partition("-")
    return kind, int(number or START)


@dataclass(frozen=True)
class ShrinkSteps:
    """The stages' work.

    Attributes:
        config: Model, seed, calibration, and how to train.
        settings: How far, in what steps.
        folder: Where.
        threads: Threads outside torch; torch's number where None.
    """

    config: ReleaseConfig
    settings: ShrinkSettings
    folder: Path
    threads: int | None

    @property
    def start(self) -> str:
        """The stage whose model the others are held against, and learn from."""
        return LEARNT if self.settings.task else DENSE

    def trained(self, number: int) -> str:
        """The stage that leaves a step's model."""
        return f"{TRAINED}-{number}" if number != START else self.start

    def checkpoint(self, stage: str) -> Path:
        """The checkpoint that a stage left."""
        return stage_folder(self.folder, stage) / "model"

    @property
    def stages(self) -> list[Stage]:
        """All of them in order, with what their results depend on."""
        stages = [Stage(DENSE, self._of_dense, (), self.dense)]
        if self.settings.task:
            stages.append(Stage(LEARNT, lambda: self._of_training(LEARNT), (DENSE,), self.learn))
        stages.append(self._judgement(START))
        for number, share in enumerate(self.settings.shares, START + 1):
            before, pruned, name = self.trained(number - 1), f"{PRUNED}-{number}", self.trained(number)
            cut = functools.partial(self.prune, number, share)
            taught = functools.partial(self.recover, number)
            stages += [
                Stage(pruned, functools.partial(self._of_pruning, number, share), (DENSE, before), cut),
                Stage(name, functools.partial(self._of_training, name), (pruned, self.start), taught),
                self._judgement(number),
            ]
        return stages

    def _judgement(self, number: int) -> Stage:
        after = dict.fromkeys((DENSE, self.start, self.trained(number)))
        return Stage(
            f"{JUDGED}-{number}", self._of_judging, tuple(after), functools.partial(self.judge, number)
        )

    def how_trained(self, stage: str) -> RecoverConfig | None:
        """How a stage trains; None of one that does not."""
        kind, how = kind_and_number(stage)[0], self.config.recover
        if how is None or kind not in (LEARNT, TRAINED):
            return None
        if kind == TRAINED or self.settings.task is None:
            return how
        return learning(how, self.settings.task)

    def dense(self, output: Path, progress: Progress) -> None:
        """Keep the model as a checkpoint."""
        model = self.config.model
        loaded = load_model(
            model.reference,
            trust_remote_code=model.trust_remote_code,
            dtype=model.dtype,
            may_stream=True,
            progress=progress,
        )
        self._check(loaded, progress)
        save_checkpoint(loaded, output / "model", seed=self.config.seed)

    def _check(self, loaded: LoadedModel, progress: Progress) -> None:
        """What the model cannot be asked, and text that is too short, must not be found after hours of training."""
        model = TorchLanguageModel(loaded)
        check_chat_tasks(model, load_chat_tasks(self.settings))
        if self.config.recover is not None:
            check_seqlen(loaded, self.config.recover.seqlen)
        if SELF not in self.config.prune.calibration:
            self._drawn(loaded, progress)
        for _, source in self._judged_on.sources:
            if source != SELF:
                text_windows(source, model, self._judged_on, progress, WRITERS)

    def _drawn(self, loaded: LoadedModel, progress: Progress) -> Calibration:
        """The calibration windows in a model's tokens."""
        wanted = self.config.prune
        return load_calibration(
            wanted.calibration,
            loaded,
            nsamples=wanted.nsamples,
            seqlen=wanted.seqlen,
            seed=self.config.seed,
            progress=progress,
        )

    def learn(self, output: Path, progress: Progress) -> None:
        """Train the dense model for the task."""
        self._train(DENSE, LEARNT, None, output, progress)

    def prune(self, number: int, share: float, output: Path, progress: Progress) -> None:
        """Remove channels of the step before until `share` of the dense model's are gone; tokens in the first step."""
        loaded = self._load(self.trained(number - 1), progress)
        wanted, seed = self.config.prune, self.config.seed
        drawn = self._drawn(loaded, progress)
        there = sum(model_shape(loaded.model).ffn_widths)
        stay = round((1 - share) * sum(self._dense_widths))
        settings = replace(self.pruning(number), prune_ratio=max(0.0, 1 - stay / there))
        settings = fitting_settings(wanted, settings, loaded.model)
        result = prune_model(loaded, drawn, settings, counted=wanted.vocabulary_text, progress=progress)
        save_checkpoint(
            result.loaded, output / "model", plan=result.plan, input_moments=result.input_moments, seed=seed
        )

    def recover(self, number: int, output: Path, progress: Progress) -> None:
        """Train what was pruned."""
        teacher = self.checkpoint(self.start)
        self._train(f"{PRUNED}-{number}", self.trained(number), teacher, output, progress)

    def _train(self, source: str, name: str, teacher: Path | None, output: Path, progress: Progress) -> None:
        how = self.how_trained(name)
        assert how is not None
        run_recovery(
            self.checkpoint(source),
            output / "model",
            how,
            self.config.seed,
            teacher=teacher,
            work=stage_folder(self.folder, f"{name}{WORK}"),
            device=self.config.model.device,
            progress=progress,
        )

    def judge(self, number: int, output: Path, progress: Progress) -> None:
        """Measure a step's model beside the start's; the start's alone."""
        stage = self.trained(number)
        loaded = self._load(stage, progress)
        model = TorchLanguageModel(loaded)
        with ExitStack() as stack:
            tasks = stack.enter_context(load_tasks(self.settings)) if self.settings.tasks else None
            against = None if number == START else TorchLanguageModel(self._load(self.start, progress))
            texts = evaluate(model, against, self._judged_on, writers=WRITERS, progress=progress).texts
            done = run_tasks(model, tasks, progress=progress) if tasks else ()
        widths = model_shape(loaded.model).ffn_widths
        step = ShrunkStep(
            number,
            self.checkpoint(stage).relative_to(self.folder).as_posix(),
            1 - sum(widths) / sum(self._dense_widths),
            len(loaded.tokenizer),
            sum(weight.numel() for weight in loaded.model.parameters()),
            self._file_bytes(loaded),
            texts,
            done,
            shortcoming_of(self.checkpoint(stage)),
        )
        write_record(output / STEP_FILE, step)

    @property
    def _judged_on(self) -> EvaluationSettings:
        # Not the calibration's seed: chats that pruning has seen prove nothing.
        return pick(EvaluationSettings, self.settings, tasks=(), seed=self.config.seed + 1)

    def _file_bytes(self, loaded: LoadedModel) -> int | None:
        with LargeScratch("sizes") as scratch:
            count = self.threads or torch.get_num_threads()
            sizes = Sizes(loaded, scratch.path, False, self.config.seed, count, (BASE_QUANT,))
            try:
                return sizes.file_bytes(BASE_QUANT, model_shape(loaded.model))
            except (InputError, MissingExtraError):
                return None  # no GGUF file has such a shape, or nothing here makes one

    @functools.cached_property
    def _dense_widths(self) -> tuple[int, ...]:
        return read_config(self.checkpoint(DENSE)).shape.ffn_widths

    def pruning(self, number: int) -> PruneSettings:
        """How a step is pruned, but for the share."""
        plain = self.config.prune.settings(required_multiple((DEFAULT_FORMAT,)))
        return replace(plain, vocabulary=self.settings.vocabulary if number == START + 1 else 0)

    def _load(self, stage: str, progress: Progress) -> LoadedModel:
        return load_stage(self.checkpoint(stage), self.config.model, progress)

    def _of_dense(self) -> Mapping[str, Any]:
        return model_settings(self.config)

    def _of_training(self, stage: str) -> Mapping[str, Any]:
        how = self.how_trained(stage)
        assert how is not None
        return recovery_settings(how, self.config.seed)

    def _of_pruning(self, number: int, share: float) -> Mapping[str, Any]:
        prune = self.config.prune
        texts = {name: identities(getattr(prune, name)) for name in ("calibration", "vocabulary_text")}
        windows = {"windows": [prune.nsamples, prune.seqlen], "removed": share}
        return asdict(self.pruning(number)) | texts | windows

    def _of_judging(self) -> Mapping[str, Any]:
        settings = self.settings
        texts = {name: identities(getattr(settings, name)) for name in ("text", "chats")}
        tasks = [[name, tasks_sha256(name, settings.task_data)] for name in settings.tasks]
        much = [settings.seqlen, settings.max_windows, settings.limit, settings.num_fewshot]
        return texts | {"tasks": tasks, "much": much}
