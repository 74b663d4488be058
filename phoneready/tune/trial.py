"""One trial: make a point, measure what budgets and the goal ask of it, nothing else."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cfsp.evaluation.language_model import PROMPTS
from cfsp.evaluation.torch_model import RememberedModel
from cfsp.models.shape import ModelShape
from phoneready.evaluation.figures import evaluation_figures
from phoneready.evaluation.models import OpenSettings, open_language_model, runtime_for
from phoneready.evaluation.run import evaluate
from phoneready.evaluation.settings import EvaluationSettings
from phoneready.figures.figure_set import DENSE, PRUNED, Figure, FigureSet
from phoneready.figures.metrics import (
    ANSWERS,
    ANY_MEMBER,
    CHECKPOINT,
    ENERGY_OF,
    TASK,
    FigureKey,
    metric_of,
    metrics_from,
)
from phoneready.release.artifact import Artifact
from phoneready.release.collect import benchmark_figures, projected_figures, size_figure
from phoneready.release.steps import bench_named, shortcoming_of
from phoneready.text import WRITERS
from phoneready.tune.limits import Limits
from phoneready.tune.space import Point, config_of
from phoneready.tune.trial_runner import TrialRunner
from runtime_bench.files import size_of
from runtime_bench.targets.places import open_place
from runtime_bench.workload import BenchSettings


@dataclass(frozen=True)
class Measured:
    """What a trial found out.

    Attributes:
        removed: Share of FFN channels that went, after alignment.
        shape: Of the pruned model.
        file_bytes: Size of the file.
        figures: What budgets limit and the goal is.
        seconds: Time it took.
        shortcoming: Of its training, in words; None where it gained something, or where nothing was trained.
    """

    removed: float
    shape: ModelShape
    file_bytes: int
    figures: FigureSet
    seconds: float
    shortcoming: str | None = None


@dataclass
class Bench:
    """Measures points.

    Attributes:
        runner: Where points are made.
        limits: What has to be known of them.
    """

    runner: TrialRunner
    limits: Limits
    _dense_files: dict[str, Artifact] = field(default_factory=dict, repr=False)

    def exact_figures(self, point: Point) -> Iterator[Figure]:
        """Sizes and projections of a GGUF file that is not made; nothing of other formats."""
        if not point.recipe.is_sized:
            return
        recipe, item = point.recipe, point.recipe.item
        sides = [(PRUNED, recipe.vocabulary, self.runner.plan(point).shape)]
        if self.limits.wanted(point, "dense"):
            sides.append((DENSE, 0, self.runner.dense_shape))
        for role, vocabulary, shape in sides:
            sizes = self.runner.sizes(vocabulary)
            yield size_figure(role, item, item, sizes.file_bytes(item, shape, dense=role == DENSE))
            yield from projected_figures(self.limits.config, role, item, item, sizes.facts(item, shape))

    def measure(self, point: Point) -> Measured:
        """Make a point and measure it.

        Raises:
            InputError: It cannot be made.
            LimitError: An ONNX graph is not what the checkpoint computes.
        """
        began = time.monotonic()
        plan = self.runner.plan(point)
        checkpoint = self.runner.make(point)
        file = self.runner.export(point, PRUNED)
        files = [file]
        if any(not metric_of(key.metric).is_quality for key in self.limits.wanted(point, "dense")):
            files.append(self._dense_file(point))
        measured = [
            *self._sizes(point, files),
            *self._judgements(point, checkpoint, file),
            *self._benchmarks(point, files),
        ]
        source = self.runner.loaded.source
        figures = FigureSet(source.reference, source.sha256, self.limits.config.seed, tuple(measured))
        seconds = round(time.monotonic() - began, 2)
        size, shortcoming = size_of(file.path), shortcoming_of(checkpoint)
        return Measured(1 - plan.keep_ratio, plan.shape, size, figures, seconds, shortcoming)

    def _sizes(self, point: Point, files: Sequence[Artifact]) -> Iterator[Figure]:
        config = config_of(self.limits.config, point)
        for one in files:
            yield size_figure(one.role, one.item, one.name, size_of(one.path))
            if one.item in config.export.projected:
                yield from projected_figures(config, one.role, one.item, one.name, one.facts)

    def _judgements(self, point: Point, checkpoint: Path, file: Artifact) -> Iterator[Figure]:
        opening = OpenSettings(
            self.limits.config.evaluate.seqlen,
            threads=self.runner.threads,
            device=self.runner.loaded.model.device,
        )
        wanted = [key for key in self.limits.wanted(point) if metric_of(key.metric).is_quality]
        for item in dict.fromkeys((self.limits.objective_item(point), *(key.item for key in wanted))):
            settings = self._judgement_settings({key.metric for key in wanted if key.item == item})
            name = CHECKPOINT if item == CHECKPOINT else file.name
            reference = str(checkpoint if item == CHECKPOINT else file.root)
            with open_language_model(
                reference, runtime_for(reference), opening, progress=self.runner.progress
            ) as model:
                evaluation = evaluate(
                    model, self._dense, settings, writers=WRITERS, progress=self.runner.progress
                )
            yield from evaluation_figures(item, name, evaluation)

    @functools.cached_property
    def _dense(self) -> RememberedModel:
        return RememberedModel(self.runner.loaded)

    def _judgement_settings(self, metrics: set[str]) -> EvaluationSettings:
        """What a release judges on, less what no budget asks for."""
        config = self.limits.config
        chosen = config.evaluate
        prompts = (chosen.prompts or PROMPTS) if metrics & {*metrics_from(ANSWERS)} else ()
        own = tuple(name for name in chosen.metrics if name + ANY_MEMBER in metrics)
        # As a release does: not the calibration's seed.
        settings = replace(
            chosen.settings(config.seed + 1, prompts), metrics=own, sampled="degenerate_sampled" in metrics
        )
        return settings if metrics & {*metrics_from(TASK)} else replace(settings, tasks=())

    def _benchmarks(self, point: Point, files: Sequence[Artifact]) -> Iterator[Figure]:
        """Of the dense file, where there is one, only at the places where a budget is relative to it."""
        config = config_of(self.limits.config, point)
        relative = {key.place for key in self.limits.wanted(point, "dense")}
        roles = {one.name: (one.role, one.item) for one in files}
        for place in config.bench.targets:
            here = [key for key in self.limits.wanted(point) if key.place == place]
            if not here:
                continue
            names = {str(one.path): one.name for one in files if one.role == PRUNED or place in relative}
            settings = _needed(config.bench.settings(config.seed), here)
            records = bench_named(names, config.bench, settings, open_place(place), self.runner.progress)
            yield from benchmark_figures(config, place, records, roles)

    def _dense_file(self, point: Point) -> Artifact:
        """Of the latest quantization or variant only, as disks are finite."""
        item = point.recipe.item
        if item not in self._dense_files:
            self._dense_files = {item: self.runner.export(point, DENSE)}
        return self._dense_files[item]


def _needed(settings: BenchSettings, keys: Sequence[FigureKey]) -> BenchSettings:
    """Only the workloads that are asked for, and energy where its figures are; of memory all: any may need most."""
    names = {key.metric for key in keys}
    asked = {name.removeprefix(ENERGY_OF) for name in names}
    if asked == names:
        settings = replace(settings, energy=False, idle_s=BenchSettings.idle_s)
    if "peak_rss_bytes" in asked:
        return settings
    sizes: dict[str, Any] = {
        field: tuple(n for n in getattr(settings, field) if f"{test}{n}" in asked)
        for field, test in (("n_prompt", "pp"), ("n_gen", "tg"), ("ttft", "ttft"))
    }
    return replace(settings, **sizes, load="load" in asked)
