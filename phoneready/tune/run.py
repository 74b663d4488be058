"""The search as a whole: an Optuna study that holds the trials, so that a killed search goes on."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cfsp.errors import InputError, LimitError, require_extra
from cfsp.files import write_text
from cfsp.progress import Progress, no_progress
from cfsp.records import write_record
from phoneready.evaluation.metrics import check_directions
from phoneready.figures.budgets import BudgetConfig
from phoneready.figures.figure_set import DENSE, PRUNED, check_same_model, same_figure
from phoneready.recipe import load_baseline, release_stages
from phoneready.release.stages import claim_folder
from phoneready.settings.release import check_sections
from phoneready.settings.schema import SIZE, ReleaseConfig, TuneConfig
from phoneready.tune.forecast import MeasuredPoint
from phoneready.tune.limits import QUALITY, Judged, Limits, family, objective_item
from phoneready.tune.predict import Prediction
from phoneready.tune.result import Outlook, TrialRow, TuneResult, format_result, pareto, release_toml
from phoneready.tune.search import Candidate, Searcher
from phoneready.tune.space import Point, Recipe, config_of, recipes_of
from phoneready.tune.study import Done, Study
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
        InputError: A configuration that cannot be searched over.
        LimitError: No point meets the budgets; the message has the one that comes closest.
        MissingExtraError: Optuna is not installed.
    """
    require_extra("optuna", "tune")
    require_extra("tomli_w", "tune", "optuna")
    settings = config.tune or TuneConfig()
    config = config.model_copy(update={"tune": settings})
    recipes = recipes_of(config)
    for recipe in recipes:
        check_sections(config_of(config, Point(recipe, settings.min_prune_ratio)), f"{recipe.describe()}: ")
    check_directions(config.budgets)
    limits = Limits(config, load_baseline(config))
    _check_goal(config, limits, recipes)
    with claim_folder(folder):
        key = _study_key(config, folder)
        runner = TrialRunner(config, folder / "state" / key[:12], threads, progress)
        if limits.baseline is not None and config.baseline is not None:
            source = runner.loaded.source
            check_same_model(limits.baseline, source.reference, source.sha256, config.baseline.file)
        search = _Search(config, limits, Bench(runner, limits), recipes, Study(folder / STUDY_FILE, key))
        try:
            result = search.run(show)
        except LimitError:
            _forget_choice(folder)
            raise
        write_record(folder / RESULT_FILE, result)
        write_text(folder / TABLE_FILE, format_result(result))
        runner.clear()
        best = result.best
        if best is None:
            _forget_choice(folder)
            raise LimitError(search.closest())
        recipe = Recipe(best.file, best.allocation, best.align, best.recover)
        write_text(folder / RELEASE_FILE, release_toml(config, Point(recipe, best.prune_ratio)))
    return result


def _forget_choice(folder: Path) -> None:
    """A choice within other budgets is none where nothing meets these."""
    (folder / RELEASE_FILE).unlink(missing_ok=True)


@dataclass
class _Search:
    config: ReleaseConfig
    limits: Limits
    bench: Bench
    recipes: tuple[Recipe, ...]
    study: Study
    failed: dict[Point, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.config.tune is not None
        self.settings = self.config.tune
        self.searcher = Searcher(self.bench, self.limits, self.recipes, self.settings)

    def run(self, show: Callable[[str], None]) -> TuneResult:
        """Try points until nothing better is expected, or the trials are spent."""
        hopeless = self.searcher.hopeless()
        if hopeless is not None:
            point, judged = hopeless
            raise LimitError(
                f"no point can meet the budgets; closest is {point.describe()}: {judged.describe()}"
            )
        while len(self.done()) + len(self.failed) < self.settings.trials:
            candidate = self._next()
            if candidate is None:
                break
            show(f"trial {len(self.done())}: {candidate.point.describe()} ({candidate.why})")
            self._try(candidate, show)
        return self._result()

    def closest(self) -> str:
        """What to say where no trial meets the budgets."""
        tried = self._tried()
        if not tried:
            reasons = "; ".join(f"{point.describe()}: {why}" for point, why in self.failed.items())
            return f"no point could be made: {reasons}"
        one = min(tried, key=lambda t: t.judged.violation)
        return (
            f"none of {len(tried)} points meets the budgets; closest is {one.point.describe()}: "
            f"{one.judged.describe()}"
        )

    def done(self) -> list[Done]:
        """Trials that say all that the budgets want to know."""
        return [one for one in self.study.done() if self._complete(one)]

    def _complete(self, one: Done) -> bool:
        if one.point.recipe not in self.recipes:
            return False
        sides = ((PRUNED, self.limits.wanted(one.point)), (DENSE, self.limits.relative(one.point)))
        known = {role: one.measured.figures.by_key(role) for role, _ in sides}
        missing = [
            key for role, keys in sides for key in keys if not any(same_figure(key, k) for k in known[role])
        ]
        return not missing and self._divergence(one) is not None

    def _tried(self) -> list[MeasuredPoint]:
        return [
            MeasuredPoint(
                one.point,
                one.measured.removed,
                one.measured.file_bytes,
                self._divergence(one) or 0.0,
                self._judged(one),
            )
            for one in self.done()
        ]

    def _judged(self, one: Done) -> Judged:
        return self.limits.judge(one.point, one.measured.figures.figures)

    def _divergence(self, one: Done) -> float | None:
        """The goal: the mean over all texts of the mean KL divergence."""
        item = objective_item(self.settings, one.point.recipe.item)
        found = [
            figure.value
            for figure in one.measured.figures.figures
            if figure.key.metric == "kl_mean" and figure.key.item == item and figure.value is not None
        ]
        return sum(found) / len(found) if found else None

    def _next(self) -> Candidate | None:
        tried = self._tried()
        known = {one.point for one in tried} | set(self.failed)
        found = self.searcher.next(tried, self.failed)
        if found is not None and found.point not in known:
            return found
        if len(tried) >= min(LEAST_TRIALS, self.settings.trials):
            return None
        best = self.searcher.best(tried) or min(tried, key=lambda t: t.judged.violation, default=None)
        failures = Counter(point.recipe for point in self.failed)
        recipe = best.point.recipe if best else min(self.recipes, key=lambda one: failures[one])
        point = self.searcher.least_known(recipe, known)
        if point is None:
            return None
        return Candidate(point, self.searcher.forecast(tried).divergence(point), 0.0, "to know the curve")

    def _try(self, candidate: Candidate, show: Callable[[str], None]) -> None:
        try:
            measured = self.bench.measure(candidate.point)
        except (InputError, LimitError) as error:
            self.failed[candidate.point] = str(error)
            show(f"  failed: {error}")
            return
        done = Done(0, candidate.point, measured, None)
        self.study.add(candidate.point, measured, self._divergence(done) or 0.0, _ends(candidate.objective))
        if not self._complete(done):
            self.failed[candidate.point] = "a budget wants what it has no figure of"
        show(f"  {measured.file_bytes / 1e6:.2f} MB in {measured.seconds:.0f} s")

    def _result(self) -> TuneResult:
        done, tried = self.done(), self._tried()
        rows = tuple(_row(one, point) for one, point in zip(done, tried, strict=True))
        best = self.searcher.best(tried)
        chosen = next((r.number for r, t in zip(rows, tried, strict=True) if t is best), None)
        following = self._pending(tried)
        source = self.bench.runner.loaded.source
        return TuneResult(
            source=source.reference,
            source_sha256=source.sha256,
            seed=self.config.seed,
            goal=self.settings.goal,
            judge=self.settings.judge,
            budgets=tuple(_describe(budget) for budget in self.config.budgets),
            trials=rows,
            failed=tuple(f"{point.describe()}: {why}" for point, why in self.failed.items()),
            pareto=pareto(rows),
            chosen=chosen,
            next=following,
            outlook=self._outlook(tried, best),
            calibrations=self.bench.runner.calibrations,
            seconds=round(sum(one.measured.seconds for one in done), 2),
        )

    def _pending(self, tried: Sequence[MeasuredPoint]) -> str | None:
        found = self.searcher.next(tried, self.failed)
        if found is None:
            return None
        expected = _ends(found.objective)
        text = found.point.describe()
        return (
            text if expected is None else text + ", expected KL {:.3f} ({:.3f} to {:.3f})".format(*expected)
        )

    def _outlook(self, tried: Sequence[MeasuredPoint], best: MeasuredPoint | None) -> tuple[Outlook, ...]:
        """Ratios around the best one."""
        if best is None:
            return ()
        forecast, recipe, found = self.searcher.forecast(tried), best.point.recipe, []
        low, high = self.settings.min_prune_ratio, self.settings.max_prune_ratio
        for step in range(_OUTLOOK):
            ratio = round(max(low, 0.02) + (high - max(low, 0.02)) * (step + 0.5) / _OUTLOOK, 2)
            expected = _ends(forecast.divergence(Point(recipe, ratio)))
            if expected is not None:
                size = self.bench.runner.file_bytes(recipe, ratio)
                others = {n: _three(p) for n, p in forecast.figures(Point(recipe, ratio)).items()}
                found.append(Outlook(ratio, size, expected, others))
        return tuple(found)


def _check_goal(config: ReleaseConfig, limits: Limits, recipes: Sequence[Recipe]) -> None:
    """Raise InputError where nothing holds the search back."""
    if not (*config.evaluate.text, *config.evaluate.chats):
        raise InputError("nothing to judge a model on", field="evaluate.text", allowed="a text or chats")
    if config.tune is None or config.tune.goal != SIZE:
        return
    for recipe in recipes:
        keys = limits.wanted(Point(recipe, config.tune.max_prune_ratio))
        if not any(family(key.metric) == QUALITY for key in keys):
            raise InputError(
                f"without a budget for the quality of {recipe.item} the smallest file is the worst one",
                field="budgets",
                allowed="such as kl_mean, perplexity_ratio or mean_accuracy",
            )


def _study_key(config: ReleaseConfig, folder: Path) -> str:
    """Hash of what trials depend on; not of budgets, goal or range, with which the same trials serve again."""
    free = {
        "prune": ("prune_ratio", "allocation", "align"),
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
    export = [config.export.imatrix, config.export.mixed_bytes]
    text = json.dumps([kept, *export, *projected], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _row(one: Done, tried: MeasuredPoint) -> TrialRow:
    recipe = one.point.recipe
    return TrialRow(
        number=one.number,
        prune_ratio=one.point.prune_ratio,
        removed=one.measured.removed,
        file=recipe.item,
        allocation=recipe.allocation,
        align=recipe.align,
        recover=recipe.recover,
        file_bytes=one.measured.file_bytes,
        divergence=tried.divergence,
        expected=one.expected,
        others={
            held.label: held.verdict.value
            for held in tried.judged.held
            if held.verdict.value is not None and held.budget.metric != "file_bytes"
        },
        meets=tried.judged.meets,
        is_open=tried.judged.is_open,
        missed=tried.judged.describe(),
        seconds=one.measured.seconds,
    )


def _ends(prediction: Prediction | None) -> tuple[float, float, float] | None:
    return None if prediction is None else _three(prediction)


def _three(prediction: Prediction) -> tuple[float, float, float]:
    return prediction.value, prediction.low, prediction.high


def _describe(budget: BudgetConfig) -> str:
    files = f" of {', '.join(budget.files)}" if budget.files else ""
    return f"{budget.metric}{files} {budget.describe()}"
