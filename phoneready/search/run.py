"""Choose points, evaluate them, and keep the record; a search that was killed goes on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cfsp.devices import find_device
from cfsp.errors import InconclusiveError, InputError, LimitError, require_extra
from cfsp.files import no_space_as_input_error, sha256_file, write_text
from cfsp.progress import Progress, no_progress
from cfsp.records import record_from_json, record_to_json, write_record
from cfsp.recovery.data import check_readable
from cfsp.text.settings import BUILTIN_TEXT
from cfsp.units import megabytes
from exporters.families import GGUF
from phoneready.evaluation.measured_file import DOMINATED, standing
from phoneready.evaluation.run import check_texts
from phoneready.evaluation.settings import EvaluationSettings
from phoneready.figures.figures import INCONCLUSIVE, MISSED, PASS
from phoneready.release.inputs import check_training
from phoneready.release.stages import claim_folder
from phoneready.room import check_room, drawing_needs
from phoneready.search.evaluate import Evaluator, Subject
from phoneready.search.point import AUTO, BISECT, GRID, OPTUNA, STEPS, Point, SearchSettings
from phoneready.search.record import EvaluatedPoint, SearchRecord, format_search, outcome_of

RESULT_FILE, TABLE_FILE, PLOT_FILE = "search.json", "search.md", "search.html"
_LOCK = ".search.lock"
_PROPOSALS = 20
"""Proposals for each file that is measured, before a sampler gives up: many may be too large, or known."""


class _EnoughError(Exception):
    """As many files are made as may be."""


class _NoFileError(Exception):
    """A proposal of which there is no file within the limits."""


def search(
    subject: Subject,
    settings: SearchSettings,
    folder: Path,
    *,
    show: Callable[[str], None] = lambda line: None,
    progress: Progress = no_progress,
    threads: int | None = None,
) -> SearchRecord:
    """Evaluate the points that the strategy chooses; search.json and search.md are written after every file.

    A search that is in the folder already goes on. `threads` are those outside torch. Raises InputError for what cannot
    be used, before anything is written, MissingExtraError, and LimitError if no file could be measured.
    """
    settings.check()
    GGUF.require()
    if not (settings.text or settings.chats):
        settings = replace(settings, text=(BUILTIN_TEXT,))
    check_texts(EvaluationSettings(text=settings.text, chats=settings.chats))
    if (training := subject.recover) is not None:
        if settings.strategy == STEPS and training.for_quant is not None:
            raise InputError(
                "a step's file is not what the next step prunes", field="for_quant", value=training.for_quant,
                allowed="none with --set strategy=steps",
            )  # fmt: skip
        check_training(training)
    learnt = () if training is None else training.texts
    check_readable((*learnt, *subject.prune.calibration, *settings.text, *settings.chats))
    if not (folder / RESULT_FILE).exists():
        check_room(
            "search", (subject.model.reference,), drawing_needs, folder,
            device=find_device(subject.model.device), kept=subject.model.dtype, progress=progress,
        )  # fmt: skip
    with claim_folder(folder, _LOCK, "search"), no_space_as_input_error(folder):
        evaluator = Evaluator(subject, settings, folder, threads, progress)
        rows = int(evaluator.loaded.model.get_input_embeddings().weight.shape[0])
        settings = evaluator.settings = settings.settled(rows)
        grid, strategy = list(settings.points()), settings.strategy
        most = min(settings.max_points or len(grid), len(grid))
        if strategy == AUTO:
            strategy = OPTUNA if most < len(grid) else GRID
        if settings.storage or strategy == OPTUNA:
            require_extra("optuna", "search")
        evaluator.check()
        _ = evaluator.texts
        dense, lines = [point for point in grid if point.is_dense], settings.bisected()
        counts = {
            BISECT: len(dense) + sum(len(line).bit_length() for line in lines),
            STEPS: len(dense) + sum(point.recovered and point.ratio > 0 for point in grid),
        }
        count = min(counts.get(strategy, most), settings.max_points or sys.maxsize)
        show(f"{count} files at most; how long they take is said after the first")
        run = _Run(evaluator, settings, folder, show, strategy, count)
        try:
            if settings.storage or (strategy == OPTUNA and most < len(grid)):
                _share(run, grid, most)
            else:
                for point in dense if strategy in (BISECT, STEPS) else grid:
                    run.evaluate(point)
            if strategy == BISECT:
                for line in lines:
                    _bisect(run, line)
            elif strategy == STEPS:
                _steps(run, grid)
        except _EnoughError:
            pass
        result = run.write(last=True)
        shutil.rmtree(evaluator.work, ignore_errors=True)
    if not result.points:
        raise LimitError(f"no file could be measured: {'; '.join((*result.failed, *result.left_out))}")
    return result


@dataclass
class _Run:
    """What is known so far of a search; `count` is the most files that it makes."""

    evaluator: Evaluator
    settings: SearchSettings
    folder: Path
    show: Callable[[str], None]
    strategy: str
    count: int
    known: dict[Point, EvaluatedPoint] = field(default_factory=dict)
    left_out: dict[Point, str] = field(default_factory=dict)
    failed: dict[Point, str] = field(default_factory=dict)
    made: int = 0

    def evaluate(self, point: Point) -> EvaluatedPoint | None:
        """A point's figures, taken now unless they are known; None if it fails or surely misses a limit."""
        if point in self.failed or point in self.left_out:
            return None
        if point not in self.known and (found := self.evaluator.find(point)) is not None:
            self.known[point] = found
        if point in self.known:
            return self.known[point]
        if self.settings.max_points is not None and len(self.known) >= self.settings.max_points:
            raise _EnoughError
        try:
            size, held = self.evaluator.expected(point)
            if missed := [one for one in held if one.outcome == MISSED]:
                self.left_out[point] = "; ".join(f"{one.limit} ({one.figure})" for one in missed)
                return None
            self.show(f"{point.label}{f', {megabytes(size)} expected' if size else ''}")
            one = self.evaluator.evaluate(point, size)
        except (InputError, LimitError) as error:
            self.failed[point] = str(error)
            self.show(f"  {point.label} failed: {error}")
            return None
        self.known[point] = one
        self.made += 1
        self.write()
        done = len(self.known) + len(self.left_out) + len(self.failed)
        minutes = one.seconds * max(0, self.count - done) / 60
        left = f"; {minutes:.0f} min for all at this pace" if self.made == 1 and minutes >= 1 else ""
        self.show(
            f"  {megabytes(one.file_bytes)}, {one.bits_per_byte:.4f} bits a byte, {one.seconds:.0f} s{left}"
        )
        return one

    def write(self, last: bool = False) -> SearchRecord:
        """Write search.json and search.md; only files to keep stay, of which the best is made again at the `last`."""
        evaluator, subject = self.evaluator, self.evaluator.subject
        points = sorted(self.known.values(), key=lambda one: (one.file_bytes, one.file))
        held = [evaluator.held(one) for one in points]
        standings = [standing(one, points) for one in points]
        within = [one for one, rows in zip(points, held, strict=True) if outcome_of(rows) == PASS]

        def objective(one: EvaluatedPoint) -> tuple[float, float, str]:
            # Within a limit on what it takes the least loss, else the smallest.
            cost, loss = float(one.file_bytes), one.bits_per_byte
            return (loss, cost, one.file) if self.settings.limits_cost else (cost, loss, one.file)

        limited = self.settings.limits_cost or self.settings.limits_quality
        best = min(within, key=objective, default=None) if limited else None
        dense = min((one for one in within if one.is_dense), key=objective, default=None) if limited else None
        wanted = {best.file} if best else set()
        if not limited:
            wanted = {one.file for one in standings if one.verdict != DOMINATED}
        for one in points:
            path = self.folder / one.file
            if one.file not in wanted or (last and path.is_file() and sha256_file(path) != one.sha256):
                path.unlink(missing_ok=True)  # else of a search with other settings
            if last and one is best and not path.is_file():
                self.show(f"{one.label} is made again")
                evaluator.export(one.point)
        result = SearchRecord(
            source=subject.model.reference,
            source_sha256=evaluator.loaded.source.sha256,
            seed=subject.seed,
            calibration=subject.prune.calibration,
            strategy=self.strategy,
            limits=self.settings.limits,
            points=tuple(points),
            held=tuple(held),
            standings=tuple(standings),
            best=best.file if best else None,
            best_dense=dense.file if dense else None,
            left_out=tuple(f"{point.label}: {why}" for point, why in self.left_out.items()),
            failed=tuple(f"{point.label}: {why}" for point, why in self.failed.items()),
            kept=tuple(one.file for one in points if (self.folder / one.file).is_file()),
            recovery=subject.recover,
        )
        write_record(self.folder / RESULT_FILE, result)
        write_text(self.folder / TABLE_FILE, format_search(result))
        return result


def _bisect(run: _Run, line: Sequence[Point]) -> None:
    """The least ratio that meets the limits on what a file takes; without any the largest within those on its loss."""
    by_cost = run.settings.limits_cost
    quality = {held.limit for held in run.settings.held(kl=0, bits=0)}

    def met(point: Point) -> bool:
        if by_cost:
            try:
                _, expected = run.evaluator.expected(point)
            except (InputError, LimitError) as error:
                run.failed[point] = str(error)
                return False
            if any(held.outcome == MISSED for held in expected):
                return False
            measured = run.settings.place is not None or not GGUF.find(point.quant).is_sized
            if expected and not measured:
                return True
        one = run.evaluate(point)
        return one is not None and all(
            held.outcome != MISSED
            for held in run.evaluator.held(one)
            if (held.limit not in quality) == by_cost
        )

    if by_cost:
        index = bisect_left(line, True, key=met)
        found = line[index : index + 1]
    else:
        index = bisect_left(line, True, key=lambda point: not met(point))
        found = line[max(0, index - 1) : index]
    for point in found:
        run.evaluate(point)


def _steps(run: _Run, grid: Sequence[Point]) -> None:
    """Prune and train from ratio to ratio; for each vocabulary and share of groups until all files lose too much."""
    settings, ratios = run.settings, sorted({ratio for ratio in run.settings.ratios if ratio})
    chains: dict[tuple[int, float, int], dict[str, None]] = {}
    for point in grid:
        if point.ratio and point.recovered:
            chains.setdefault((point.vocabulary, point.groups, point.align), {})[point.quant] = None
    for (vocabulary, groups, _), quants in chains.items():
        for number, ratio in enumerate(ratios):
            before = tuple(ratios[:number])
            made = [run.evaluate(Point(one, vocabulary, ratio, groups, True, before)) for one in quants]
            quality = [list(settings.held(kl=one.kl_mean, bits=one.bits_ratio)) for one in made if one]
            if all(any(held.outcome == MISSED for held in rows) for rows in quality):
                break


def _share(run: _Run, grid: Sequence[Point], most: int) -> None:
    """Ask and tell an Optuna study until `most` points are measured; with a storage, other processes do so, too."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    settings, evaluator, name = run.settings, run.evaluator, run.settings.storage
    axes: dict[str, list[Any]] = {
        "quant": list(settings.quants),
        "vocabulary": sorted(set(settings.vocabularies)),
        "ratio": sorted(set(settings.ratios)),
        "groups": sorted(set(settings.groups)),
        "recovered": [False, True] if settings.recover else [False],
    }
    seed = evaluator.subject.seed
    if run.strategy == GRID or len(grid) <= most:
        sampler: Any = optuna.samplers.GridSampler(axes, seed=seed)
    else:
        # Workers must not propose the same; what others are at work on counts as bad.
        sampler = optuna.samplers.TPESampler(
            seed=seed + os.getpid() if name else seed,
            n_startup_trials=max(4, most // 3),
            constant_liar=True,
            constraints_func=lambda trial: trial.user_attrs.get("over", [0.0]),
        )
    told = (axes, settings.limits, settings.device or settings.place, evaluator.threads)
    described = json.dumps([evaluator.key, evaluator.training, *told])
    try:
        storage: Any = None
        if name and "://" in name:
            retry = optuna.storages.RetryFailedTrialCallback()  # of a worker whose heartbeat stopped
            storage = optuna.storages.RDBStorage(name, heartbeat_interval=60, failed_trial_callback=retry)
        elif name:
            storage = optuna.storages.JournalStorage(JournalFileBackend(name))
        study = optuna.create_study(
            storage=storage,
            sampler=sampler,
            study_name=f"phoneready-{hashlib.sha256(described.encode()).hexdigest()[:12]}",
            directions=["minimize", "minimize"],
            load_if_exists=True,
        )
    except Exception as error:  # of a driver, a server or a file: there is no one class
        raise InputError(
            f"cannot be opened as an Optuna storage: {error}", field="--set storage", value=name
        ) from error
    windows = [text.sha256 for _, text in evaluator.texts]
    if study.user_attrs.get("windows", windows) != windows:
        raise InputError(
            "another machine at work on it measures on other windows of text", field="--set storage"
        )
    study.set_user_attr("windows", windows)

    def figures(one: EvaluatedPoint) -> tuple[list[float], dict[str, Any]]:
        over = [held.over for held in evaluator.held(one)] or [0.0]
        return [float(one.file_bytes), one.bits_per_byte], {"point": record_to_json(one), "over": over}

    for point in grid if name is None else ():
        if (one := evaluator.find(point)) is not None:  # of an earlier run
            values, attributes = figures(one)
            study.add_trial(
                optuna.trial.create_trial(
                    params={axis: getattr(point, axis) for axis in axes},
                    distributions={
                        axis: optuna.distributions.CategoricalDistribution(choices)
                        for axis, choices in axes.items()
                    },
                    values=values,
                    user_attrs=attributes,
                )
            )

    def learn() -> bool:
        """What all workers have measured; whether that is all there may be."""
        for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)):
            one = record_from_json(EvaluatedPoint, trial.user_attrs["point"], where="a trial of the study")
            if one.point not in run.known:
                run.known[one.point] = one
                evaluator.keep(one)
        return len(run.known) >= most

    def objective(trial: Any) -> list[float]:
        learn()
        point = Point(**{axis: trial.suggest_categorical(axis, values) for axis, values in axes.items()})
        one = run.evaluate(replace(point, recovered=point.recovered and not point.is_dense))
        if one is None:
            raise _NoFileError
        values, attributes = figures(one)
        for attribute, value in attributes.items():
            trial.set_user_attr(attribute, value)
        return values

    if not learn():
        ended = [lambda study, _: study.stop() if learn() else None]
        study.optimize(objective, n_trials=_PROPOSALS * most, callbacks=ended, catch=(_NoFileError,))
        learn()


def check_search(found: SearchRecord) -> None:
    """Raise what the gate would if no file is within all limits."""
    if found.outcome == MISSED:
        raise LimitError(f"no file is within {', '.join(found.limits)}")
    if found.outcome == INCONCLUSIVE:
        raise InconclusiveError(
            f"whether a file is within {', '.join(found.limits)} cannot be told from its samples"
        )
