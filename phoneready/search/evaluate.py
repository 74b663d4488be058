"""Make a point and measure it, by the stages of a release: each is done once, and a search that was killed goes on."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from cfsp.errors import InputError
from cfsp.evaluation.torch_model import RememberedModel, TorchLanguageModel
from cfsp.files import atomic_file, sha256_file, write_json
from cfsp.models.architectures import model_shape
from cfsp.models.reference import load_tokenizer
from cfsp.models.source import LoadedModel
from cfsp.progress import Progress, no_progress
from cfsp.pruning.vocabulary import VocabularyPlan, plan_vocabulary
from cfsp.reading import read_json
from cfsp.records import read_record, write_record
from cfsp.text.respelling import respelling
from cfsp.text.tokens import TokenWindows, tokens_sha256
from exporters.export_record import ExportManifest, ExportRecord
from exporters.families import GGUF
from exporters.gguf.files import type_losses
from exporters.job import MANIFEST_FILE
from exporters.quantize.mixture import Option
from phoneready.evaluation.figures import text_figures
from phoneready.evaluation.run import measure_file, measure_text, text_windows
from phoneready.evaluation.settings import EvaluationSettings
from phoneready.figures.bench_figures import bench_figures
from phoneready.figures.figures import DENSE, SHIPPED, BudgetVerdict, Figure, FigureKey, metric_of, select
from phoneready.figures.gate import judge
from phoneready.release.inputs import identities
from phoneready.release.stages import Stage, explain_stages, run_stages, stage_folder
from phoneready.release.steps import Steps, load_stage
from phoneready.releasing import checkpoint_stages
from phoneready.search.point import GENERATED, LEAST_SHARE, LEAST_TOKENS, STEP, Point, SearchSettings
from phoneready.search.predict import Losses, Predictor, Sizes
from phoneready.search.record import EvaluatedPoint
from phoneready.settings.schema import ReleaseConfig
from phoneready.text import WRITERS
from runtime_bench.devices import DEFAULT_CONTEXT, Band, find_profile, gguf_facts, load_profiles, project
from runtime_bench.measuring.measure import run_bench
from runtime_bench.measuring.text_check import check_text
from runtime_bench.records.bench_record import DOES_NOT_FIT, BenchRecord
from runtime_bench.records.jsonl import append_jsonl, read_jsonl
from runtime_bench.targets.table import open_target, target_details, target_slug
from runtime_bench.workload import BenchSettings

_POINT, _TEXTS, _PROBE, _TYPES, _BENCH = (
    "point.json",
    "texts.safetensors",
    "probe.json",
    "types.json",
    "bench.jsonl",
)
_PROBE_WINDOWS = 4
"""Windows of each text by which fewer tokens are judged before files are made."""
_CHECK_S = 300.0


class Evaluator:
    """Makes and measures points in the folder of a search; `base` says of which model, text and seed.

    `threads` are those outside torch; torch's number by default.
    """

    def __init__(
        self,
        base: ReleaseConfig,
        settings: SearchSettings,
        folder: Path,
        threads: int | None = None,
        progress: Progress = no_progress,
    ) -> None:
        self.base, self.settings, self.folder = base, settings, folder
        self.threads, self.progress = threads, progress
        self._stages: dict[Point, list[Stage]] = {}

    def config(self, point: Point) -> ReleaseConfig:
        """The release that ships a point."""
        prune = replace(self.base.prune, vocabulary=point.vocabulary, prune_ratio=point.ratio)
        made = replace(self.base.quantize, to=(point.quant,))
        return self.base.model_copy(update={"prune": prune, "quantize": made})

    def steps(self, point: Point) -> Steps:
        return Steps(self.config(point), self.folder, self.threads, point.which)

    @functools.cached_property
    def _dense_stages(self) -> list[Stage]:
        """The dense model, and the windows that all files are measured on."""
        (dense,) = checkpoint_stages(self.steps(Point("Q8_0")))
        settings = self.settings
        named = {"text": identities(settings.text), "chats": identities(settings.chats)}
        told = named | {"windows": [settings.eval_seqlen, settings.max_windows]}
        return [dense, Stage("texts", lambda: told, ("dense",), self._draw)]

    def run(self, stages: Sequence[Stage]) -> None:
        """Do what is not done of them; those before the last are only done for its sake."""
        reasons = explain_stages(stages, self.folder)
        if reasons[stages[-1].name]:
            quiet = lambda name, state: None  # noqa: E731
            run_stages(stages, self.folder, show=quiet, progress=lambda: nullcontext(self.progress))

    def begin(self) -> None:
        """The dense model as a checkpoint, and all text; raises InputError for what cannot be used."""
        self.run(self._dense_stages[:1])
        self.run(self._dense_stages)

    @functools.cached_property
    def loaded(self) -> LoadedModel:
        """The dense model."""
        return load_stage(stage_folder(self.folder, "dense") / "model", self.base.model, self.progress)

    @functools.cached_property
    def dense(self) -> RememberedModel:
        return RememberedModel(self.loaded)

    @property
    def vocabulary(self) -> int:
        return int(self.loaded.model.get_input_embeddings().weight.shape[0])

    def _draw(self, output: Path, progress: Progress) -> None:
        settings, longest = self.settings, self.dense.context_length
        if settings.eval_seqlen is not None and settings.eval_seqlen > longest:
            raise InputError(
                "longer than the model's context", field="--set eval_seqlen", value=settings.eval_seqlen,
                allowed=f"up to {longest}",
            )  # fmt: skip
        judged = EvaluationSettings(
            text=settings.text, chats=settings.chats, seqlen=settings.eval_seqlen or min(1024, longest),
            max_windows=settings.max_windows, seed=self.base.seed + 1,
        )  # fmt: skip
        drawn = {
            str(number): text_windows(source, self.dense, judged, progress, WRITERS).ids.contiguous()
            for number, (_, source) in enumerate(settings.sources)
        }
        with atomic_file(output / _TEXTS) as temporary:
            safetensors.torch.save_file(drawn, temporary)

    @functools.cached_property
    def texts(self) -> tuple[tuple[str, TokenWindows], ...]:
        """What every file is measured on: windows of the dense model's ids."""
        kept = safetensors.torch.load_file(stage_folder(self.folder, "texts") / _TEXTS)
        rows = (
            (kind, source, kept[str(number)]) for number, (kind, source) in enumerate(self.settings.sources)
        )
        return tuple((kind, TokenWindows(ids, source, tokens_sha256(ids))) for kind, source, ids in rows)

    # What is known before a file is made.

    @functools.cached_property
    def sizes(self) -> Sizes:
        named = self.settings.quants or ("Q8_0",)
        sized = [name for name in named if GGUF.find(name).is_sized]
        threads = self.threads or torch.get_num_threads()
        return Sizes(self.loaded, self.folder / "sizes", self.base.seed, threads, sized)

    def predictor(self) -> Predictor:
        """What mixtures will lose: what types cost the dense model is measured now, what fewer tokens do by `probe`."""
        steps = self.steps(Point("mixed:1GB"))

        def measure(output: Path, progress: Progress) -> None:
            options = steps.export_options(SHIPPED, progress)
            write_json(output / _TYPES, type_losses(steps.exported(SHIPPED), output, options))

        told = asdict(self.base.quantize) | {"to": []}
        self.run([*self._dense_stages, Stage("types", lambda: told, ("dense",), measure)])
        rows = read_json(stage_folder(self.folder, "types") / _TYPES)
        return Predictor(
            {tensor: [Option(*one) for one in each] for tensor, each in rows.items()},
            self.vocabulary,
            lambda tokens: self.overhead(tokens),
        )

    def overhead(self, tokens: int) -> int:
        """Bytes of a mixture of so many tokens that are no quantized tensor: linear in the tokens."""
        few, (low, high) = self.fewest, self._rests
        return low + (high - low) * (tokens - few) // max(1, self.vocabulary - few)

    @functools.cached_property
    def _rests(self) -> tuple[int, int]:
        """Those of the fewest tokens, and of all."""
        shape = model_shape(self.loaded.model)
        few = self.uncounted(self.fewest) if self.fewest < self.vocabulary else None
        return self.sizes.rest_bytes(shape, few), self.sizes.rest_bytes(shape, None)

    @property
    def fewest(self) -> int:
        """The smallest vocabulary that is tried."""
        named = [size for size in self.settings.vocabularies if size]
        return min(
            named or [max(LEAST_TOKENS, int(LEAST_SHARE * self.vocabulary) // STEP * STEP), self.vocabulary]
        )

    def uncounted(self, tokens: int) -> VocabularyPlan:
        """A vocabulary of so many tokens before text is counted: those that merging learned first."""
        return plan_vocabulary(self.loaded, np.zeros(self.vocabulary), tokens, sources=())

    def probe(self, tokens: int) -> Losses:
        """What a vocabulary costs the model in float32, on the first windows of each text."""
        steps = self.steps(point := Point("mixed:1GB", tokens))

        def measure(output: Path, progress: Progress) -> None:
            small = TorchLanguageModel(load_stage(steps.checkpoint(steps.pruned), self.base.model, progress))
            spelling = respelling(self.dense.tokenizer, small.tokenizer)
            few = [
                (kind, TokenWindows(text.ids[:_PROBE_WINDOWS], text.source, text.sha256))
                for kind, text in self.texts
            ]
            found = [
                measure_text(kind, small, self.dense, text, spelling, progress=progress) for kind, text in few
            ]
            distances = [one.distance for one in found if one.distance]
            tokens = sum(sum(one.n_tokens) for one in distances)
            kl = sum(sum(one.kl) for one in distances) / tokens
            more = sum(sum(one.nats) - sum(one.against_nats) for one in found)
            write_json(
                output / _PROBE, {"kl": kl, "nats": more / sum(sum(one.against_n_tokens) for one in found)}
            )

        stages = [*checkpoint_stages(steps), self._dense_stages[1]]
        name = f"probe{point.which}"
        self.run([*stages, Stage(name, dict, ("texts", steps.pruned), measure)])
        return Losses(**read_json(stage_folder(self.folder, name) / _PROBE))

    # Making and measuring.

    def stages(self, point: Point) -> list[Stage]:
        """What makes a point's file, and measures it."""
        if point in self._stages:
            return self._stages[point]
        steps = self.steps(point)
        export = Stage(
            f"export-{point.key}",
            lambda: asdict(steps.config.quantize),
            (steps.final,),
            lambda output, progress: self._export(point, output, progress),
        )
        last = Stage(
            f"point-{point.key}",
            dict,
            ("texts", export.name),
            lambda output, progress: self._measure(point, output, progress),
        )
        self._stages[point] = [*checkpoint_stages(steps), self._dense_stages[1], export, last]
        return self._stages[point]

    def is_known(self, point: Point) -> bool:
        """Whether what a point loses is known."""
        return not explain_stages(self.stages(point), self.folder)[f"point-{point.key}"]

    def evaluate(self, point: Point) -> EvaluatedPoint:
        """A point's figures, taken now unless they are known; a file that is made stays in the folder."""
        if not self.is_known(point):
            self.run(self.stages(point))
            one = self._read(point)
            self._made(point)[0].replace(self.folder / one.file)
        one = self._read(point)
        place, device = self.settings.place, self.settings.device
        if device is not None:
            path = self.folder / (one if self.is_here(one) else self.make_again(one)).file
            return replace(one, projected=self._projected(path, one))
        if place is None:
            return one
        told = {"sha256": one.sha256, "details": target_details(place), "threads": self.threads}
        name = f"bench-{point.key}-{target_slug(place)}"
        measure = functools.partial(self._bench, one, place)
        bench = Stage(name, lambda: told, (), measure, _is_measured)
        if explain_stages([bench], self.folder)[name]:
            if not self.is_here(one):
                one = self.make_again(one)
            self.run([bench])
        return replace(one, bench=read_bench(stage_folder(self.folder, name)))

    def is_here(self, one: EvaluatedPoint) -> bool:
        """Whether the file that was measured is in the folder."""
        path = self.folder / one.file
        return path.is_file() and sha256_file(path) == one.sha256

    def make_again(self, one: EvaluatedPoint) -> EvaluatedPoint:
        """A file that is not in the folder any more, by its recipe; one that differs is measured again."""
        *before, last = self.stages(one.point)
        (self.folder / one.file).unlink(missing_ok=True)
        self.run(before)
        if self._made(one.point)[1].sha256 != one.sha256:
            shutil.rmtree(stage_folder(self.folder, last.name))
            self.run([*before, last])
            one = self._read(one.point)
        self._made(one.point)[0].replace(self.folder / one.file)
        return one

    def _read(self, point: Point) -> EvaluatedPoint:
        return read_record(EvaluatedPoint, stage_folder(self.folder, f"point-{point.key}") / _POINT)

    def verdicts(self, one: EvaluatedPoint) -> tuple[BudgetVerdict, ...]:
        """How a file stands to the limits: what a release says of the same figures."""
        dense = self.base.model.reference
        of_text = list(text_figures(one.point.quant, one.file, dense, one.texts))
        size = Figure(FigureKey("file_bytes", one.point.quant), SHIPPED, one.file, "bytes", one.file_bytes)
        found = [size, *of_text, *one.projected]
        if one.bench is not None:
            items = {one.bench.model_filename: (SHIPPED, one.point.quant)}
            found += bench_figures(str(self.settings.place), [one.bench], items, any_threads=True)
        ours, theirs = ({f.key: f for f in found if f.role == role} for role in (SHIPPED, DENSE))
        return tuple(
            judge(budget, ours[key], theirs.get(key))
            for budget in self.settings.budgets
            for key in select(budget, ours)
        )

    def _made(self, point: Point) -> tuple[Path, ExportRecord]:
        """The file in the folder of its export, and its record."""
        folder = stage_folder(self.folder, f"export-{point.key}") / GGUF.name
        (record,) = read_record(ExportManifest, folder / MANIFEST_FILE).exports
        return folder / record.file, record

    def _export(self, point: Point, output: Path, progress: Progress) -> None:
        steps = self.steps(point)
        options = replace(steps.export_options(SHIPPED, progress), must_fit=not point.is_dense)
        GGUF.export(steps.exported(SHIPPED), output / GGUF.name, (point.quant,), options)

    def _measure(self, point: Point, output: Path, progress: Progress) -> None:
        steps = self.steps(point)
        path, record = self._made(point)
        tokenizer = load_tokenizer(steps.exported(SHIPPED))
        texts = measure_file(path, self.dense, tokenizer, self.texts, threads=self.threads, progress=progress)
        left, whole = (sum(shape.ffn_widths) for shape in (record.shape, model_shape(self.loaded.model)))
        name = f"{path.stem.removesuffix(f'-{record.quant}')}{point.which}-{record.quant}.gguf"
        write_record(
            output / _POINT,
            EvaluatedPoint(
                file=name,
                file_bytes=record.file_bytes,
                texts=texts,
                point=point,
                sha256=record.sha256,
                export=record,
                removed=1 - left / whole,
                broken=check_text(path, _CHECK_S).degenerate,
            ),
        )

    def _bench(self, one: EvaluatedPoint, place: str, output: Path, progress: Progress) -> None:
        """How fast it decodes and in what memory, each sample in a process of its own."""
        timing = BenchSettings(
            n_prompt=(), n_gen=(GENERATED,), ttft=(), load=False, n_threads=(self.threads,) if self.threads else (),
            seed=self.base.seed,
        )  # fmt: skip
        target = open_target(place)
        append_jsonl(output / _BENCH, run_bench([self.folder / one.file], timing, progress, target=target))

    def _projected(self, path: Path, one: EvaluatedPoint) -> tuple[Figure, ...]:
        """Memory and speed on the device of the settings."""
        assert self.settings.device is not None
        profile = find_profile(self.settings.device, load_profiles()).profile
        found = project(profile, gguf_facts(path), DEFAULT_CONTEXT)
        needed = float(found.memory.needed)
        bands = {"projected_memory_bytes": Band(needed, needed), "projected_tg": found.decode}
        return tuple(
            Figure(
                FigureKey(metric, one.point.quant, profile.id), SHIPPED, one.file, metric_of(metric).unit,
                None if band is None else math.sqrt(band.low * band.high), kind="projected", target=profile.id,
                low=band and band.low, high=band and band.high, failure="; ".join(found.assumptions),
            )
            for metric, band in bands.items()
        )  # fmt: skip


def _is_measured(output: Path) -> bool:
    row = read_bench(output)
    return row.ok or row.memory_verdict == DOES_NOT_FIT


def read_bench(output: Path) -> BenchRecord:
    (row,) = read_jsonl(output / _BENCH)
    return row
