"""Go step by step until all is removed or a limit is missed; a run that was killed goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

from cfsp.errors import LimitError, PhonereadyError
from cfsp.evaluation.tasks import is_chat_file
from cfsp.files import write_text
from cfsp.models.checkpoint import read_checkpoint_info
from cfsp.progress import Progress
from cfsp.records import read_record, write_record
from cfsp.recovery.settings import NEXT_TOKEN, token_budget
from cfsp.settings import Settings
from cfsp.text.settings import BUILTIN_TEXT
from phoneready.publish.placing import place
from phoneready.release.stages import RUNNING, claim_folder, run_stages, stage_folder
from phoneready.settings.schema import RecoverConfig, ReleaseConfig
from phoneready.shrink.checks import check_before_work
from phoneready.shrink.foretold import foretell_stage
from phoneready.shrink.record import START, Shrunk, ShrunkStep
from phoneready.shrink.settings import ShrinkSettings
from phoneready.shrink.steps import DENSE, JUDGED, STEP_FILE, WORK, ShrinkSteps, kind_and_number
from phoneready.shrink.tables import format_shrunk

RESULT_FILE, TABLE_FILE, MODEL_FOLDER = "shrunk.json", "shrunk.md", "model"


class _EnoughError(Exception):
    """A step misses a limit, so that none is made after it."""


def shrink(
    config: ReleaseConfig,
    settings: ShrinkSettings,
    folder: Path,
    *,
    show: Callable[[str, str], None],
    progress: Callable[[], AbstractContextManager[Progress]],
    threads: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
    named: Collection[str] = (),
) -> Shrunk:
    """Prune and train in steps, judge every one, and keep the last that is good enough.

    Args:
        config: Model, seed, calibration, and how to train (`recover`).
        settings: How far, in what steps, what is judged, and where to stop.
        folder: Where; made when missing, continued when a run with the same settings was stopped.
        show: Told each stage's name and state.
        progress: Opens a progress display.
        threads: Threads outside torch; torch's number by default.
        tell: Told what each step came to.
        named: As `for_task`.

    Returns:
        The curve; it is in `folder` as shrunk.json and shrunk.md, and the checkpoint that is kept as model/.

    Raises:
        InputError: A setting or an input that cannot be used, or a folder that something else has made.
        MissingExtraError: Without the `recover` extra; `eval` for tasks of lm-evaluation-harness.
        LimitError: The model that the steps start from does the tasks so badly that nothing can be worse.
    """
    settings = _with_text(settings)
    config = for_task(config, settings, named)
    training = config.recover or RecoverConfig()
    check_before_work(config, training, settings, folder, (RESULT_FILE, TABLE_FILE, MODEL_FOLDER))
    with claim_folder(folder):
        steps = ShrinkSteps(config, settings, folder, threads)
        stages, judged = {stage.name: stage for stage in steps.stages}, list[ShrunkStep]()

        def shown(stage: str, state: str) -> None:
            show(stage, state)
            if state == RUNNING:
                foretell_stage(steps, stages[stage], tell)

        def check(stage: str) -> None:
            if kind_and_number(stage)[0] != JUDGED:
                return
            judged.append(read_record(ShrunkStep, stage_folder(folder, stage) / STEP_FILE))
            found = _found(config, settings, folder, judged)
            write_record(folder / RESULT_FILE, found)
            write_text(folder / TABLE_FILE, format_shrunk(found))
            tell(_line(judged[-1]))
            if problem := judged[START].cannot_start(settings):
                raise LimitError(problem)
            if found.missed is not None:
                raise _EnoughError

        with _kept(lambda: _keep(config, settings, folder, judged)):
            run_stages(
                tuple(stages.values()), folder, show=shown, progress=progress, check=check, threads=threads
            )
        for work in (folder / "stages").glob(f"*{WORK}"):
            shutil.rmtree(work, ignore_errors=True)
        return _found(config, settings, folder, judged)


@contextmanager
def _kept(keep: Callable[[], None]) -> Iterator[None]:
    """Keep the best step whether all were made, one was bad enough, or one could not be made."""
    try:
        yield
    except _EnoughError:
        pass
    except PhonereadyError:
        keep()
        raise
    keep()


def _keep(config: ReleaseConfig, settings: ShrinkSettings, folder: Path, judged: list[ShrunkStep]) -> None:
    if len(judged) > START + 1:
        place(folder / _found(config, settings, folder, judged).best.checkpoint, folder / MODEL_FOLDER)


def _with_text(settings: ShrinkSettings) -> ShrinkSettings:
    """With some text to measure on: chats that are tasks, or else the built-in text."""
    if settings.text or settings.chats:
        return settings
    chats = tuple(filter(is_chat_file, settings.tasks))
    return replace(settings, chats=chats, text=() if chats else (BUILTIN_TEXT,))


def for_task(config: ReleaseConfig, settings: ShrinkSettings, named: Collection[str]) -> ReleaseConfig:
    """The configuration, with the task's chats for calibration, counting and training, and their next tokens for the
    loss, where nothing else is named.

    Args:
        config: As it was asked for.
        settings: Which task, if any.
        named: `calibration`, `data` and `loss` where the user has named them, be it what they are without that.
    """
    if not settings.task:
        return config
    task, prune, recover = (settings.task,), config.prune, config.recover or RecoverConfig()

    def is_named(settings: Settings, field: str) -> bool:
        return field in named or getattr(settings, field) != getattr(type(settings), field)

    prune = replace(
        prune,
        calibration=prune.calibration if is_named(prune, "calibration") else task,
        vocabulary_text=prune.vocabulary_text or task,
    )
    recover = replace(
        recover,
        data=recover.data if is_named(recover, "data") else task,
        # What the task's answers are is in its chats, not in the dense model.
        loss=recover.loss if is_named(recover, "loss") else NEXT_TOKEN,
    )
    return config.model_copy(update={"prune": prune, "recover": recover})


def _found(config: ReleaseConfig, settings: ShrinkSettings, folder: Path, judged: list[ShrunkStep]) -> Shrunk:
    source = read_checkpoint_info(stage_folder(folder, DENSE) / MODEL_FOLDER).source
    missed = judged[-1].worse_than(judged[START], settings)
    assert config.recover is not None
    return Shrunk(
        source=config.model.reference,
        source_sha256=source.sha256,
        seed=config.seed,
        settings=settings,
        tokens=token_budget(config.recover.settings(config.seed)),
        steps=tuple(judged),
        kept=len(judged) - (1 if missed is None else 2),
        missed=missed,
    )


def _line(step: ShrunkStep) -> str:
    """What a step came to."""
    figures = [
        f"{text.bits_per_byte:.4f} bits a byte of {text.source}" for text in step.texts if text.bits_per_byte
    ]
    figures += [f"{one.task} {one.accuracy.value:.3f}" for one in step.tasks if one.accuracy is not None]
    line = f"{step.removed:.1%} of the channels removed, {step.parameters / 1e6:.1f} M parameters; {', '.join(figures)}"
    return line if step.shortcoming is None else f"{line}; {step.shortcoming}"
