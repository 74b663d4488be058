"""One trial: make a point, measure what budgets and the goal ask of it, nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cfsp.evaluation.answers import PROMPTS
from cfsp.evaluation.language_model import LanguageModel
from cfsp.evaluation.torch_model import TorchLanguageModel, logits_from_hidden
from cfsp.models.reference import load_model
from cfsp.models.shape import ModelShape
from cfsp.models.source import LoadedModel
from phoneready.evaluation.figures import evaluation_figures
from phoneready.evaluation.models import OpenSettings, open_language_model, runtime_for
from phoneready.evaluation.run import evaluate
from phoneready.evaluation.settings import EvaluationSettings
from phoneready.figures.figure_set import DENSE, PRUNED, Figure, FigureSet
from phoneready.figures.metrics import (
    ANY_MEMBER,
    CHECKPOINT,
    PROJECTION,
    TASK,
    FigureKey,
    metric_of,
    metrics_from,
)
from phoneready.release.artifact import Artifact
from phoneready.release.collect import (
    benchmark_figures,
    projected_figures,
    size_figure,
)
from phoneready.settings.schema import TuneConfig
from phoneready.tune.limits import QUALITY, Limits, family, objective_item
from phoneready.tune.space import Point, config_of
from phoneready.tune.trial_runner import TrialRunner
from runtime_bench.files import files_of
from runtime_bench.measuring.measure import run_bench
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
    """

    removed: float
    shape: ModelShape
    file_bytes: int
    figures: FigureSet
    seconds: float


@dataclass
class Bench:
    """Measures points.

    Attributes:
        runner: Where points are made.
        limits: What has to be known of them.
    """

    runner: TrialRunner
    limits: Limits
    _dense: _Remembered | None = field(default=None, repr=False)
    _dense_files: dict[str, Artifact] = field(default_factory=dict, repr=False)

    def exact_figures(self, point: Point) -> tuple[Figure, ...]:
        """Sizes and projections of a GGUF file that is not made; nothing of other formats."""
        if not point.recipe.is_sized:
            return ()
        config, item = config_of(self.limits.config, point), point.recipe.item
        sides = [(PRUNED, self.runner.plan(point.recipe, point.prune_ratio).shape)]
        if self.limits.relative(point):
            sides.append((DENSE, self.runner.dense_shape))
        found: list[Figure] = []
        for role, shape in sides:
            sizes = self.runner.sizes
            found.append(size_figure(role, item, item, sizes.file_bytes(item, shape, dense=role == DENSE)))
            if config.bench.devices:
                found += projected_figures(config, role, item, item, sizes.facts(item, shape))
        return tuple(found)

    def measure(self, point: Point) -> Measured:
        """Make a point and measure it.

        Raises:
            InputError: It cannot be made.
            LimitError: Its recovery diverged, or an ONNX graph is not what the checkpoint computes.
        """
        began = time.monotonic()
        plan = self.runner.plan(point.recipe, point.prune_ratio)
        checkpoint = self.runner.make(point)
        file = self.runner.export(checkpoint, point.recipe.item, _file_name(self.runner, point))
        n_bytes = sum(path.stat().st_size for path in files_of(file.path))
        found = [size_figure(PRUNED, point.recipe.item, file.name, n_bytes)]
        found += self._dense_sizes(point)
        found += self._projections(point, file)
        found += self._judgements(point, checkpoint, file)
        found += self._benchmarks(point, file)
        source = self.runner.loaded.source
        figures = FigureSet(source.reference, source.sha256, self.limits.config.seed, tuple(found))
        seconds = round(time.monotonic() - began, 2)
        return Measured(1 - plan.keep_ratio, plan.shape, n_bytes, figures, seconds)

    def _dense_sizes(self, point: Point) -> Iterator[Figure]:
        if any(key.metric == "file_bytes" for key in self.limits.relative(point)):
            file = self._dense_file(point)
            n_bytes = sum(path.stat().st_size for path in files_of(file.path))
            yield size_figure(DENSE, point.recipe.item, file.name, n_bytes)

    def _projections(self, point: Point, file: Artifact) -> Iterator[Figure]:
        config, item = config_of(self.limits.config, point), point.recipe.item
        if item not in config.export.projected:
            return
        yield from projected_figures(config, PRUNED, item, file.name, file.facts)
        if any(metric_of(key.metric).source == PROJECTION for key in self.limits.relative(point)):
            dense = self._dense_file(point)
            yield from projected_figures(config, DENSE, item, dense.name, dense.facts)

    def _judgements(self, point: Point, checkpoint: Path, file: Artifact) -> Iterator[Figure]:
        config = self.limits.config
        tune = config.tune or TuneConfig()
        wanted = [key for key in self.limits.wanted(point) if family(key.metric) == QUALITY]
        for item in dict.fromkeys((objective_item(tune, point.recipe.item), *(key.item for key in wanted))):
            metrics = {key.metric for key in wanted if key.item == item}
            settings = self._judgement_settings(metrics)
            if item == CHECKPOINT:
                model = TorchLanguageModel(load_model(checkpoint, progress=self.runner.progress))
                yield from self._judge(item, CHECKPOINT, model, settings)
                continue
            opening = OpenSettings(config.evaluate.seqlen, threads=self.runner.threads)
            root = str(file.root)
            with open_language_model(root, runtime_for(root), opening) as opened:
                yield from self._judge(item, file.name, opened, settings)

    def _judgement_settings(self, metrics: set[str]) -> EvaluationSettings:
        """What a release judges on, less what no budget asks for."""
        config = self.limits.config
        chosen = config.evaluate
        prompts = (chosen.prompts or PROMPTS) if "degenerate" in metrics else ()
        own = tuple(name for name in chosen.metrics if name + ANY_MEMBER in metrics)
        # As a release does: not the calibration's seed.
        settings = replace(chosen.settings(config.seed + 1, prompts), metrics=own)
        return settings if metrics & {*metrics_from(TASK)} else replace(settings, tasks=())

    def _judge(
        self, item: str, name: str, model: LanguageModel, settings: EvaluationSettings
    ) -> Iterator[Figure]:
        if self._dense is None:
            self._dense = _Remembered(self.runner.loaded)
        found = evaluate(model, self._dense, settings, progress=self.runner.progress)
        yield from evaluation_figures(item, name, found)

    def _benchmarks(self, point: Point, file: Artifact) -> Iterator[Figure]:
        config, item = config_of(self.limits.config, point), point.recipe.item
        keys = [key for key in self.limits.wanted(point) if key.place in config.bench.targets]
        relative = {key for key in self.limits.relative(point) if key.place}
        for place in dict.fromkeys(key.place for key in keys if key.place):
            here = [key for key in keys if key.place == place]
            files = [file] + ([self._dense_file(point)] if relative & set(here) else [])
            names = {str(one.path): one.name for one in files}
            settings = _needed(config.bench.settings(config.seed), here)
            records = run_bench(
                [one.path for one in files], settings, self.runner.progress, target=open_place(place)
            )
            named = [replace(r, model_filename=names[r.model_filename]) for r in records]
            roles = {one.name: (one.role, item) for one in files}
            yield from benchmark_figures(config, place, named, roles)

    def _dense_file(self, point: Point) -> Artifact:
        """Of the latest quantization or variant only, as disks are finite."""
        item = point.recipe.item
        if self._dense_files.get(item) is None:
            name = f"{self.runner.loaded.source.name}-dense"
            made = self.runner.export(self.runner.checkpoint(DENSE), item, name)
            self._dense_files = {item: made}
        return self._dense_files[item]


class _Remembered(TorchLanguageModel):
    """The dense model, run once over every window: what it is judged against at every point.

    The last hidden states are kept, not the logits, which are some hundred times larger.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded)
        self._hidden: dict[bytes, torch.Tensor] = {}

    @torch.inference_mode()
    def next_token_logits(self, window: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """See `LanguageModel`."""
        key, model = window.numpy().tobytes(), self.loaded.model
        if key not in self._hidden:
            found = model.get_decoder()(input_ids=window[None], use_cache=False)
            self._hidden[key] = found.last_hidden_state[0]
        yield from logits_from_hidden(model, self._hidden[key])


def _file_name(runner: TrialRunner, point: Point) -> str:
    """As a release calls it, so that the file is the same to the byte."""
    percent = f"{100 * point.prune_ratio:g}".replace(".", "_")
    return f"{runner.loaded.source.name}-pruned{percent}{'-recovered' if point.recipe.recover else ''}"


def _needed(settings: BenchSettings, keys: Sequence[FigureKey]) -> BenchSettings:
    """Only the workloads that are asked for; of memory all, as any may need most."""
    asked = {key.metric for key in keys}
    if "peak_rss_bytes" in asked:
        return settings
    sizes: dict[str, Any] = {
        field: tuple(n for n in getattr(settings, field) if f"{test}{n}" in asked)
        for field, test in (("n_prompt", "pp"), ("n_gen", "tg"), ("ttft", "ttft"))
    }
    return replace(settings, **sizes, load="load" in asked)
