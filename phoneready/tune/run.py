"""The search as a whole: an Optuna study that holds the trials, so that a killed search goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean

from cfsp.errors import InputError, LimitError, require_extra
from cfsp.files import write_text
from cfsp.progress import Progress, no_progress
from cfsp.records import write_record
from cfsp.text.calibration import check_seqlen
from exporters.families import FAMILIES
from phoneready.evaluation.metrics import check_directions
from phoneready.figures.budgets import BudgetConfig
from phoneready.figures.figure_set import DENSE, PRUNED, check_same_model, same_figure
from phoneready.figures.metrics import metric_of
from phoneready.recipe import load_baseline, release_stages
from phoneready.release.before_work import check_inputs
from phoneready.release.stages import claim_folder
from phoneready.settings.release import check_sections
from phoneready.settings.schema import SIZE, ReleaseConfig
from phoneready.settings.structures import STRUCTURES
from phoneready.tune.forecast import Forecast, MeasuredPoint
from phoneready.tune.limits import Limits
from phoneready.tune.result import (
    Outlook,
    TrialRow,
    TuneResult,
    format_expected,
    format_result,
    pareto,
    release_toml,
)
from phoneready.tune.search import Candidate, Searcher
from phoneready.tune.space import Point, Recipe, config_of, recipes_of
from phoneready.tune.study import Study, Trial
from phoneready.tune.trial import Bench
from phoneready.tune.trial_runner import TrialRunner
from runtime_bench.devices.profile import find_profile, load_profiles

RESULT_FILE, TABLE_FILE, RELEASE_FILE = "tune.json", "tune.md", "release.toml"
STUDY_FILE = "study.jsonl"
LEAST_TRIALS = 4
"""Trials that are made even where nothing better is expected: fewer say little of other ratios."""
_OUTLOOK = 5


def tune(
    config: ReleaseConfig,
    folder: Path,
    *,
    show: Callable[[str], None],
    progress: Progress = no_progress,
    threads: int | None = None,
) -> TuneResult:
    """Search, and write tune.json, tune.md and the release.toml of the chosen point.

    A search in the same folder goes on with the trials that are there, as long as they were measured in the same way;
    budgets, goal and range may have changed.

    Args:
        config: Its [tune] says what may vary, its budgets what has to be met.
        folder: Where; made when missing.
        show: Told every trial in a line.
        progress: Told about every step.
        threads: Threads outside torch and the benchmark; torch's number by default.

    Raises:
        InputError: A configuration that cannot be searched over, or a vocabulary that cannot be.
        LimitError: No point meets the budgets; the message has the one that comes closest.
        MissingExtraError: Optuna is not installed.
    """
    require_extra("optuna", "tune")
    require_extra("tomli_w", "tune", "optuna")
    limits, recipes = Limits(config, load_baseline(config)), recipes_of(config)
    for recipe in recipes:
        least = Point(recipe, limits.tune.min_prune_ratio)
        check_sections(config_of(config, least), f"{recipe.describe()}: ")
    check_directions(config.budgets)
    check_inputs(config)
    _check_goal(limits, recipes)
    with claim_folder(folder):
        key = study_key(config, folder)
        runner = TrialRunner(config, folder / "state" / key[:12], threads, progress)
        if limits.baseline is not None and config.baseline is not None:
            source = runner.loaded.source
            check_same_model(limits.baseline, source.reference, source.sha256, config.baseline.file)
        if config.recover is not None:
            check_seqlen(runner.loaded, config.recover.seqlen)
        for recipe in recipes:
            runner.check(recipe)
        for size in {recipe.vocabulary for recipe in recipes} - {0}:
            runner.vocabulary(size)
        search = _Search(Bench(runner, limits), recipes, Study(folder / STUDY_FILE, key))
        try:
            result, best = search.run(show)
            write_record(folder / RESULT_FILE, result)
            write_text(folder / TABLE_FILE, format_result(result))
            runner.clear()
            if best is None:
                raise LimitError(search.closest())
        except LimitError:
            # A choice within other budgets is none where nothing meets these.
            (folder / RELEASE_FILE).unlink(missing_ok=True)
            raise
        write_text(folder / RELEASE_FILE, release_toml(config, best))
    return result


@dataclass
class _Search:
    bench: Bench
    recipes: tuple[Recipe, ...]
    study: Study
    failed: dict[Point, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.limits, self.settings = self.bench.limits, self.bench.limits.tune
        self.searcher = Searcher(self.bench, self.recipes)

    def run(self, show: Callable[[str], None]) -> tuple[TuneResult, Point | None]:
        """Try points until nothing better is expected, or the trials are spent; what was found, and the best point."""
        self.left_out = self.searcher.leave_out()
        for why in self.left_out:
            show(f"left out: {why}")
        self.searcher.check_hope()
        tried = self._tried()
        while len(tried) + len(self.failed) < self.settings.trials:
            candidate = self.searcher.next(tried, self.failed)
            if candidate is None and len(tried) < min(LEAST_TRIALS, self.settings.trials):
                candidate = self.searcher.least_known(tried, self.failed)
            if candidate is None:
                break
            show(f"trial {len(tried)}: {candidate.point.describe()} ({candidate.why})")
            self._try(candidate, show)
            tried = self._tried()
        best = self.searcher.best(tried)
        return self._result(tried, best), best.point if best else None

    def closest(self) -> str:
        """What to say where no trial meets the budgets."""
        tried = self._tried()
        if not tried:
            return f"no point could be made: {'; '.join(self._failures())}"
        one = min(tried, key=lambda t: t.judged.violation)
        return (
            f"none of {len(tried)} points meets the budgets; closest is {one.point.describe()}: "
            f"{one.judged.describe()}"
        )

    def _tried(self) -> list[MeasuredPoint]:
        """Trials that say all that the budgets want to know."""
        judged = (self._judged(number, trial) for number, trial in enumerate(self.study.trials()))
        return [one for one in judged if one is not None]

    def _judged(self, number: int, trial: Trial) -> MeasuredPoint | None:
        """A trial held against the budgets; None where they want what it has no figure of."""
        point, measured, divergence = trial.point, trial.measured, self._divergence(trial)
        if point.recipe not in self.recipes or divergence is None:
            return None
        for role, relative_to in ((PRUNED, None), (DENSE, "dense")):
            known = measured.figures.by_key(role)
            for key in self.limits.wanted(point, relative_to):
                if not any(same_figure(key, other) for other in known):
                    return None
        recipe, judged = point.recipe, self.limits.judge(point, measured.figures.figures)
        row = TrialRow(
            number=number,
            prune_ratio=point.prune_ratio,
            removed=measured.removed,
            file=recipe.item,
            allocation=recipe.allocation,
            align=recipe.align,
            recover=recipe.recover,
            file_bytes=measured.file_bytes,
            divergence=divergence,
            expected=trial.expected,
            others={
                held.label: held.verdict.value
                for held in judged.held
                if held.verdict.value is not None and held.budget.metric != "file_bytes"
            },
            meets=judged.meets,
            is_open=judged.is_open,
            missed=judged.describe(),
            seconds=measured.seconds,
            bits_ratio=self._bits_ratio(trial),
            **recipe.plain,
        )
        return MeasuredPoint(row, judged)

    def _divergence(self, trial: Trial) -> float | None:
        """The goal: the mean over all texts of the mean KL divergence."""
        divergences = self._of_texts(trial, "kl_mean", PRUNED)
        return fmean(divergences.values()) if divergences else None

    def _bits_ratio(self, trial: Trial) -> float | None:
        """The mean over all texts of bits per byte over the dense model's, which any vocabulary has."""
        ours, dense = (self._of_texts(trial, "bits_per_byte", role) for role in (PRUNED, DENSE))
        ratios = [value / dense[text] for text, value in ours.items() if text in dense]
        return fmean(ratios) if ratios else None

    def _of_texts(self, trial: Trial, metric: str, role: str) -> dict[str | None, float]:
        """A figure of what the goal is of, by text."""
        item = self.limits.objective_item(trial.point)
        return {
            key.on: figure.value
            for key, figure in trial.measured.figures.by_key(role).items()
            if key.metric == metric and key.item == item and figure.value is not None
        }

    def _try(self, candidate: Candidate, show: Callable[[str], None]) -> None:
        try:
            measured = self.bench.measure(candidate.point)
        except (InputError, LimitError) as error:
            self.failed[candidate.point] = str(error)
            show(f"  failed: {error}")
            return
        trial = Trial(candidate.point, measured, candidate.expected)
        self.study.add(trial, self._divergence(trial) or 0.0)
        if self._judged(0, trial) is None:
            self.failed[candidate.point] = "a budget wants what it has no figure of"
        made = f"{measured.file_bytes / 1e6:.2f} MB in {measured.seconds:.0f} s"
        show("  " + "; ".join(filter(None, (made, measured.shortcoming))))

    def _failures(self) -> tuple[str, ...]:
        failed = (f"{point.describe()}: {why}" for point, why in self.failed.items())
        return (*self.left_out, *failed)

    def _result(self, tried: Sequence[MeasuredPoint], best: MeasuredPoint | None) -> TuneResult:
        rows = tuple(one.row for one in tried)
        source = self.bench.runner.loaded.source
        return TuneResult(
            source=source.reference,
            source_sha256=source.sha256,
            seed=self.limits.config.seed,
            goal=self.settings.goal,
            judge=self.settings.judge,
            budgets=tuple(_describe(budget) for budget in self.limits.config.budgets),
            trials=rows,
            failed=self._failures(),
            pareto=pareto(rows),
            chosen=best.row.number if best else None,
            next=self._pending(tried),
            outlook=self._outlook(Forecast(tried), best.point.recipe) if best else (),
            calibrations=self.bench.runner.calibrations,
            seconds=round(sum(row.seconds for row in rows), 2),
        )

    def _pending(self, tried: Sequence[MeasuredPoint]) -> str | None:
        candidate = self.searcher.next(tried, self.failed)
        if candidate is None:
            return None
        expected = format_expected(candidate.expected)
        return candidate.point.describe() + (f", expected KL {expected}" if expected else "")

    def _outlook(self, forecast: Forecast, recipe: Recipe) -> tuple[Outlook, ...]:
        low, high = max(self.settings.min_prune_ratio, 0.02), self.settings.max_prune_ratio
        outlooks = []
        for step in range(_OUTLOOK):
            point = Point(recipe, round(low + (high - low) * (step + 0.5) / _OUTLOOK, 2))
            expected = forecast.divergence(point)
            if expected is not None:
                size = self.bench.runner.file_bytes(point)
                others = dict[str, tuple[float, float, float]](forecast.figures(point))
                outlooks.append(
                    Outlook(point.prune_ratio, size, expected, others, forecast.bits_ratio(point))
                )
        return tuple(outlooks)


def _check_goal(limits: Limits, recipes: Sequence[Recipe]) -> None:
    """Raise InputError where nothing holds the search back."""
    if not (*limits.config.evaluate.text, *limits.config.evaluate.chats):
        raise InputError("nothing to judge a model on", field="evaluate.text", allowed="a text or chats")
    if limits.tune.goal != SIZE:
        return
    for recipe in recipes:
        keys = limits.wanted(Point(recipe, limits.tune.max_prune_ratio))
        metrics = [metric_of(key.metric) for key in keys]
        if not any(metric.is_quality and not metric.fixed for metric in metrics):
            raise InputError(
                f"without a budget for the quality of {recipe.item} the smallest file is the worst one",
                field="budgets",
                allowed="such as kl_mean, perplexity_ratio or mean_accuracy",
            )


def study_key(config: ReleaseConfig, folder: Path) -> str:
    """Hash of what trials depend on; not of budgets, goal or range, with which the same trials serve again."""
    free = {
        "prune": ("prune_ratio", "allocation", "align", *STRUCTURES),
        "dense": ("moments",),
        "evaluate": ("metrics",),
    }
    kept = {
        stage.name: {
            key: value for key, value in stage.settings.items() if key not in free.get(stage.name, ())
        }
        for stage in release_stages(config, folder)
        if stage.name in ("dense", "prune", "recover", "evaluate") or stage.name.startswith("bench")
    }
    profiles = load_profiles()
    devices = {
        name: find_profile(name, profiles).profile.model_dump(mode="json") for name in config.bench.devices
    }
    projected = [config.bench.n_ctx, devices]
    formats = {family.setting for family in FAMILIES.values()}
    export = {name: value for name, value in asdict(config.export).items() if name not in formats}
    text = json.dumps([kept, export, *projected], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _describe(budget: BudgetConfig) -> str:
    files = f" of {', '.join(budget.files)}" if budget.files else ""
    return f"{budget.metric}{files} {budget.describe()}"
