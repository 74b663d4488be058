"""Measure dense and pruned files on the same windows, point by point; a run that was killed goes on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import NonNegativeInt

from cfsp.errors import InputError, LimitError, require_extra
from cfsp.evaluation.task_results import TaskResult
from cfsp.evaluation.tasks import TaskSet, load_tasks, run_tasks
from cfsp.evaluation.torch_model import RememberedModel
from cfsp.files import fsync_file, write_text
from cfsp.progress import Progress, no_progress
from cfsp.records import read_record, write_record
from cfsp.text.calibration import check_seqlen
from cfsp.text.settings import BUILTIN_TEXT
from cfsp.text.tokens import TokenWindows
from cfsp.units import megabytes
from exporters.gguf.family import GGUF
from phoneready.evaluation.dominance import DOMINATED, choose, standing, telling_sizes
from phoneready.evaluation.models import OpenSettings, open_language_model, runtime_for
from phoneready.evaluation.run import check_texts, text_windows
from phoneready.evaluation.settings import EvaluationSettings
from phoneready.evaluation.side_by_side import JudgedText, measure_file
from phoneready.figures.figure_set import DENSE
from phoneready.frontier.folder import RESULT_FILE, STATE, STUDY_FILE, TABLE_FILE, check_folder, claim, join
from phoneready.frontier.measure import measure_speed
from phoneready.frontier.points import (
    Batch,
    batches_of,
    bits_of,
    make_point,
    point_label,
    point_name,
    role_of,
)
from phoneready.frontier.record import Frontier, FrontierPoint, choose_by_speed
from phoneready.frontier.search import Search
from phoneready.frontier.settings import BASE_QUANT, FrontierSettings
from phoneready.frontier.tables import format_frontier
from phoneready.settings.schema import RecoverConfig, ReleaseConfig
from phoneready.settings.structures import Structures
from phoneready.text import WRITERS
from phoneready.tune.run import study_key
from phoneready.tune.space import Point
from phoneready.tune.study import drop_torn_line
from phoneready.tune.trial_runner import TrialRunner
from runtime_bench.workload import BenchSettings

WINDOWS_FILE = "windows.json"
_GENERATED = 64


@dataclass(frozen=True)
class JudgedWindows:
    """The windows of every text, so that a later run measures on the same ones.

    Attributes:
        kinds: `text` or `chats` of each.
        sources: Its reference.
        ids: Its windows of the dense model's token ids.
        sha256: Hash of these.
    """

    KIND: ClassVar[str] = "judged-windows"
    SCHEMA_VERSION: ClassVar[int] = 1

    kinds: tuple[str, ...]
    sources: tuple[str, ...]
    ids: tuple[tuple[tuple[NonNegativeInt, ...], ...], ...]
    sha256: tuple[str, ...]

    def __post_init__(self) -> None:
        rows = {len(self.kinds), len(self.sources), len(self.ids), len(self.sha256)}
        lengths = [set(map(len, windows)) for windows in self.ids]
        if len(rows) != 1 or not lengths or any(len(one) != 1 or min(one) < 2 for one in lengths):
            raise InputError("every text has windows, of one length", field="ids")

    @property
    def texts(self) -> tuple[JudgedText, ...]:
        """As they are measured on."""
        rows = zip(self.kinds, self.sources, self.ids, self.sha256, strict=True)
        return tuple(JudgedText(k, TokenWindows(torch.tensor(i), s, h)) for k, s, i, h in rows)


def measure_frontier(
    config: ReleaseConfig,
    settings: FrontierSettings,
    folder: Path,
    *,
    show: Callable[[str], None],
    progress: Progress = no_progress,
    threads: int | None = None,
) -> Frontier:
    """Measure what is not measured yet; write frontier.json and frontier.md after every file.

    Args:
        config: Model, seed, calibration and how to prune.
        settings: Which files, and on what.
        folder: Where; made when missing, continued when it holds a frontier.
        show: Told every file in a line.
        progress: Told about every step.
        threads: Threads outside torch; torch's number by default.

    Raises:
        InputError: A text, a vocabulary or a folder that cannot be used; nothing was written then.
        LimitError: No file could be measured.
        MissingExtraError: llama-cpp-python is not installed.
    """
    GGUF.require()
    if settings.trials:
        require_extra("optuna", "tune")
    if not (settings.text or settings.chats):
        settings = replace(settings, text=(BUILTIN_TEXT,))
    config = _release_of(config, settings)
    check_texts(config.evaluate.settings(0, ()))
    check_folder(folder)
    state = folder / STATE / _key(config, folder)[:12]
    runner = TrialRunner(config, state, threads, progress)
    # What cannot be used is found before anything is written; texts that a run has begun with can be.
    for gone in settings.combined(Structures()):
        runner.check(gone)
    if config.recover is not None:
        check_seqlen(runner.loaded, config.recover.seqlen)
    windows = None if (state / WINDOWS_FILE).is_file() else _windows(runner, settings)
    with ExitStack() as stack:
        tasks = stack.enter_context(load_tasks(settings)) if settings.tasks else None
        alone = join(folder, state, alone=lambda: drop_torn_line(folder / STUDY_FILE))
        runner.work = stack.enter_context(alone)
        if windows is not None:
            write_record(state / WINDOWS_FILE, windows)
        windows = read_record(JudgedWindows, state / WINDOWS_FILE)
        largest = max(token for text in windows.ids for window in text for token in window)
        if largest >= runner.loaded.model.get_input_embeddings().weight.shape[0]:
            raise InputError(f"{state / WINDOWS_FILE}: the model has no token {largest}")
        run = _Run(runner, settings, folder, windows, tasks)
        result = run.finish(show)
    if not result.points:
        raise LimitError(f"no file could be measured: {'; '.join((*result.failed, *result.left_out))}")
    return result


@dataclass
class _Run:
    runner: TrialRunner
    settings: FrontierSettings
    folder: Path
    windows: JudgedWindows
    tasks: TaskSet | None = None
    failed: dict[Point, str] = field(default_factory=dict)
    left_out: dict[Point, str] = field(default_factory=dict)
    search: Search | None = None

    def __post_init__(self) -> None:
        config = self.runner.config
        self.batches = batches_of(self.settings, config.prune.allocation)
        if self.settings.trials:
            self.search = Search(
                self.folder,
                self.runner.folder,
                self.runner.work,
                self.settings,
                config.prune.allocation,
                config.seed,
            )

    def finish(self, show: Callable[[str], None]) -> Frontier:
        """Measure what is left to measure and nobody else is measuring, and say what was found."""
        for batch in self.batches:
            with claim(self.runner.folder, batch.name) as ours:
                for point, expected in self._missing(batch) if ours else ():
                    if self._is_enough():
                        return self._write()
                    self._measure(point, expected, show)
        if self.search is not None:
            self.search.run(lambda point: self._proposed(point, show), self._is_enough)
        return self._write()

    def _is_enough(self, under_way: int = 0) -> bool:
        most = self.settings.max_points
        return (
            most is not None and under_way + sum(self._found(one) is not None for one in self._points) >= most
        )

    def _proposed(self, point: Point, show: Callable[[str], None]) -> FrontierPoint | None:
        """A point of a search, which another run may have measured."""
        with claim(self.runner.folder, point_name(point), timeout=-1):
            for missing, expected in self._missing(Batch((point,))):
                self._measure(missing, expected, show)
        return self._found(point)

    @property
    def _points(self) -> list[Point]:
        grid = [point for batch in self.batches for point in batch.points]
        return list(dict.fromkeys((*grid, *(self.search.points() if self.search else ()))))

    def _missing(self, batch: Batch) -> Iterator[tuple[Point, int | None]]:
        """What of a checkpoint is to be measured, the fewest bits first; with its size, where that is limited."""
        points = [point for point in batch.points if self._found(point) is None]
        for point in sorted(points, key=lambda point: bits_of(point.recipe.item)):
            if (most := self.settings.max_size) is None:
                yield point, None
                continue
            try:
                size = self.runner.file_bytes(point, role_of(point))
            except InputError as error:
                self.failed[point] = str(error)
                continue
            if size is not None and size > most:
                self.left_out[point] = megabytes(size)
            else:
                yield point, size

    def _known(self, point: Point) -> FrontierPoint | None:
        """What was measured of a point, all of it or not."""
        path = self._record(point)
        return read_record(FrontierPoint, path) if path.is_file() else None

    def _found(self, point: Point) -> FrontierPoint | None:
        """A point of which all is known that was asked for."""
        known = self._known(point)
        whole = known is not None and self._is_timed(known) and self._has_tasks(known)
        return known if whole else None

    def _is_timed(self, known: FrontierPoint) -> bool:
        if not self.settings.speed or known.speed is None:
            return not self.settings.speed
        speed = known.speed
        return speed.in_turns and speed.n_threads in (self._bench.n_threads or (speed.n_threads,))

    def _has_tasks(self, known: FrontierPoint) -> bool:
        return self.tasks is None or self.tasks.is_what(known.tasks)

    def _record(self, point: Point) -> Path:
        how = f"-{_digest(self.runner.config.recover)}" if point.recipe.recover else ""
        return self.runner.folder / "points" / f"{point_name(point)}{how}.json"

    @property
    def _bench(self) -> BenchSettings:
        counts = (self.runner.threads,) if self.runner.threads else ()
        seed = self.runner.config.seed
        return BenchSettings(
            n_prompt=(),
            n_gen=(_GENERATED,),
            ttft=(),
            load=False,
            n_threads=counts,
            check_text=False,
            seed=seed,
        )

    def _measure(self, point: Point, expected: int | None, show: Callable[[str], None]) -> None:
        show(f"{point_label(point)}{f', {megabytes(expected)} expected' if expected else ''}")
        try:
            file = self._measured(point, expected)
        except (InputError, LimitError) as error:
            self.failed[point] = str(error)
            show(f"  failed: {error}")
            return
        write_record(self._record(point), file)
        self._write()
        show(f"  {megabytes(file.file_bytes)}, {file.bits_per_byte:.4f} bits a byte, {file.seconds:.0f} s")

    def _measured(self, point: Point, expected: int | None) -> FrontierPoint:
        """Make a file, measure it, and leave it in the folder until it is known to be dominated."""
        began, runner, known = time.monotonic(), self.runner, self._known(point)
        base = self._base if self.settings.speed else None
        recipe, role = point.recipe, role_of(point)
        made = runner.export(point, role)
        side = runner.side(recipe.vocabulary)
        if known is None:
            known = FrontierPoint(
                file=made.path.name,
                quant=recipe.item,
                prune_ratio=point.prune_ratio,
                removed=0.0 if role == DENSE else 1 - runner.plan(point).keep_ratio,
                **recipe.plain,
                allocation=recipe.allocation,
                align=recipe.align,
                file_bytes=made.path.stat().st_size,
                expected_bytes=expected,
                texts=measure_file(
                    made.path, self._dense, side.loaded.tokenizer, self.windows.texts,
                    threads=runner.threads, progress=runner.progress,
                ),
                speed=None,
                seconds=0.0,
                recovered=recipe.recover,
            )  # fmt: skip
        if not self._has_tasks(known):
            known = replace(known, tasks=self._done(made.path))
        if base is not None and not self._is_timed(known):
            is_base = role == DENSE and recipe.item == BASE_QUANT
            path = base if is_base else made.path
            known = replace(known, speed=measure_speed(path, base, self._bench, runner.progress))
        fsync_file(made.path)
        made.path.replace(self.folder / made.path.name)
        return replace(known, seconds=round(known.seconds + time.monotonic() - began, 2))

    @cached_property
    def _base(self) -> Path:
        """The dense file that speeds are relative to, kept beside the plans."""
        path = self.runner.folder / f"dense-{BASE_QUANT}.gguf"
        if not path.is_file():
            allocation = self.runner.config.prune.allocation
            point = make_point(self.settings, allocation, BASE_QUANT, 0.0, Structures(), recover=False)
            made = self.runner.export(point, DENSE).path
            fsync_file(made)
            made.replace(path)
        return path

    def _done(self, path: Path) -> tuple[TaskResult, ...]:
        """What a file does of the tasks."""
        assert self.tasks is not None
        opening, progress = OpenSettings(2, threads=self.runner.threads), self.runner.progress
        with open_language_model(str(path), runtime_for(str(path)), opening, progress=progress) as model:
            return run_tasks(model, self.tasks, progress=progress)

    @cached_property
    def _dense(self) -> RememberedModel:
        return RememberedModel(self.runner.loaded)

    def _write(self) -> Frontier:
        """frontier.json and frontier.md of what is known now; files that others dominate are deleted."""
        with claim(self.runner.folder, "result", timeout=-1):
            result = self._result()
            if not self.settings.keep:
                for one in result.standings:
                    if one.verdict == DOMINATED:
                        (self.folder / one.file).unlink(missing_ok=True)
            there = tuple(p.file for p in result.points if (self.folder / p.file).is_file())
            result = replace(result, kept=there)
            write_record(self.folder / RESULT_FILE, result)
            write_text(self.folder / TABLE_FILE, format_frontier(result))
        return result

    def _result(self) -> Frontier:
        config, known = self.runner.config, {point: self._known(point) for point in self._points}
        measured = sorted((p for p in known.values() if p), key=lambda p: (p.file_bytes, p.file))
        sizes = self.settings.at or telling_sizes(measured)
        settled = {**self.failed, **self.left_out}
        return Frontier(
            source=config.model.reference,
            source_sha256=self.runner.loaded.source.sha256,
            seed=config.seed,
            calibration=config.prune.calibration,
            vocabulary_text=config.prune.vocabulary_text,
            points=tuple(measured),
            standings=tuple(standing(point, measured) for point in measured),
            choices=tuple(choose(measured, size) for size in sorted(sizes)) if measured else (),
            left_out=tuple(f"{point_label(point)}: {why}" for point, why in self.left_out.items()),
            failed=tuple(f"{point_label(point)}: {why}" for point, why in self.failed.items()),
            open=tuple(point_label(p) for p, file in known.items() if not file and p not in settled),
            kept=(),
            speed_choices=choose_by_speed(measured, self.settings.at_speed),
            recovery=config.recover,
        )


def _release_of(config: ReleaseConfig, settings: FrontierSettings) -> ReleaseConfig:
    """The configuration with what the settings ask for."""
    judged = {name: getattr(settings, name) for name in ("text", "chats", "seqlen", "max_windows")}
    return config.model_copy(
        update={
            "evaluate": replace(config.evaluate, **judged),
            "export": replace(config.export, quants=settings.chosen_quants),
            "bench": replace(config.bench, targets=()),
        }
    )


def _key(config: ReleaseConfig, folder: Path) -> str:
    """Hash of what figures depend on, beside what a point says itself and how it is trained."""
    # Another list of quantizations makes no other files.
    plain = config.model_copy(update={"export": replace(config.export, quants=("f32",)), "recover": None})
    return study_key(plain, folder)


def _digest(training: RecoverConfig | None) -> str:
    """Of how models are trained."""
    text = json.dumps(asdict(training) if training else None, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _windows(runner: TrialRunner, settings: FrontierSettings) -> JudgedWindows:
    """The windows of every text; vocabularies and calibration are looked at, too."""
    config, dense = runner.config, RememberedModel(runner.loaded)
    judged: EvaluationSettings = config.evaluate.settings(config.seed + 1, ())
    windows = [text_windows(source, dense, judged, runner.progress, WRITERS) for _, source in judged.sources]
    longest = int(getattr(runner.loaded.model.config, "max_position_embeddings", None) or settings.seqlen)
    if settings.seqlen > longest:
        raise InputError(
            "longer than the model's context",
            field="seqlen",
            value=settings.seqlen,
            allowed=f"up to {longest}",
        )
    _ = runner.calibration  # read, or written by the model, before anything is kept
    for size in filter(None, settings.vocabularies):
        runner.vocabulary(size)
    return JudgedWindows(
        tuple(kind for kind, _ in judged.sources),
        tuple(source for _, source in judged.sources),
        tuple(tuple(map(tuple, one.ids.tolist())) for one in windows),
        tuple(one.sha256 for one in windows),
    )
