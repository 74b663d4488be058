"""Make a point and measure it: prune from one shared calibration, train, export, read texts, time."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import NonNegativeInt

from cfsp.devices import find_device
from cfsp.errors import InputError
from cfsp.evaluation.torch_model import RememberedModel
from cfsp.files import fsync_file, sha256_file
from cfsp.models.architectures import model_shape
from cfsp.models.checkpoint import save_checkpoint
from cfsp.models.offload import copied
from cfsp.models.reference import load_model
from cfsp.models.source import LoadedModel
from cfsp.precision import products_in
from cfsp.progress import Progress, no_progress
from cfsp.pruning.block_by_block import apply_plan
from cfsp.pruning.plan import PruningPlan, make_plan
from cfsp.pruning.prune import Removals, check_removals, counts_of, prune_model, statistics_for, trim
from cfsp.pruning.statistics import BlockStatistics, collect_input_moments, moment_windows, spread_windows
from cfsp.pruning.vocabulary import Counts, VocabularyPlan, plan_vocabulary
from cfsp.records import read_record, write_record
from cfsp.scratch import LargeScratch
from cfsp.text.calibration import Calibration, check_seqlen
from cfsp.text.settings import SELF
from cfsp.text.tokens import TokenWindows
from cfsp.units import megabytes
from exporters.checkpoint_reader import read_config
from exporters.gguf.family import GGUF
from exporters.gguf.files import draft_gguf
from exporters.provenance import file_stem
from phoneready.evaluation.run import JudgedText, measure_file, text_windows
from phoneready.evaluation.settings import EvaluationSettings
from phoneready.figures.budgets import INCONCLUSIVE, MISSED
from phoneready.release.fitting import fitting_settings
from phoneready.release.inputs import identities, identity, made_with
from phoneready.release.steps import load_stage, run_recovery, shortcoming_of
from phoneready.report.plots import speed_span
from phoneready.search.point import Held, Point, SearchSettings
from phoneready.search.record import EvaluatedPoint, Speed
from phoneready.settings.schema import ExportConfig, ModelConfig, PruneConfig, RecoverConfig
from phoneready.sizes import Sizes
from phoneready.text import WRITERS, load_calibration
from runtime_bench.devices.model_facts import ModelFacts, gguf_facts
from runtime_bench.devices.profile import find_profile, load_profiles
from runtime_bench.devices.projection import DEFAULT_CONTEXT, project
from runtime_bench.measuring.measure import run_bench
from runtime_bench.records.bench_record import DOES_NOT_FIT
from runtime_bench.records.fairness import has_speed
from runtime_bench.targets.table import open_target
from runtime_bench.workload import BenchSettings

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


@dataclass(frozen=True)
class Subject:
    """What a search is of.

    Attributes:
        model: The dense model.
        seed: Of everything drawn.
        prune: Calibration text; the rest is as `prune` has it.
        recover: How pruned models are trained; None: not.
    """

    model: ModelConfig
    seed: int
    prune: PruneConfig
    recover: RecoverConfig | None


@dataclass
class _Side:
    """The dense model, or what is left of it with fewer tokens, and what calibration finds out about it."""

    loaded: LoadedModel
    calibration: Calibration
    vocabulary: VocabularyPlan | None = None
    statistics: BlockStatistics | None = None
    sizes: Sizes | None = None
    removals: Removals | None = None


class Evaluator:
    """Makes and measures points, each once: records are kept in the folder under the points' keys.

    Args:
        subject: The model and its calibration.
        settings: What is measured on, and where.
        folder: Of the search.
        threads: Threads outside torch; torch's number where None.
        progress: Told about every step.
    """

    def __init__(
        self,
        subject: Subject,
        settings: SearchSettings,
        folder: Path,
        threads: int | None = None,
        progress: Progress = no_progress,
    ) -> None:
        self.subject, self.settings, self.folder = subject, settings, folder
        self.threads, self.progress = threads, progress
        prune, texts = subject.prune, [settings.text, settings.chats, subject.prune.calibration]
        depends = [
            made_with(), identity(subject.model.reference), subject.model.model_dump(mode="json"),
            subject.seed, asdict(prune), *map(identities, texts), settings.seqlen, settings.max_windows,
        ]  # fmt: skip
        self.key = hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:12]
        self.state = folder / "measured" / self.key
        recover = subject.recover
        learnt = (
            [asdict(recover), identities(recover.data), identities(recover.validation)] if recover else None
        )
        self.training = hashlib.sha256(json.dumps(learnt, sort_keys=True).encode()).hexdigest()[:8]
        self._trimmed: dict[int, _Side] = {}
        self._vocabularies: dict[int, VocabularyPlan] = {}
        self._plans: dict[tuple[int, float], PruningPlan] = {}

    # What is known before a point is made.

    @functools.cached_property
    def loaded(self) -> LoadedModel:
        """The dense model."""
        model = self.subject.model
        return load_model(
            model.reference,
            trust_remote_code=model.trust_remote_code,
            device=find_device(model.device),
            dtype=model.dtype,
            progress=self.progress,
        )

    @functools.cached_property
    def calibration(self) -> Calibration:
        """The windows that statistics are taken from and files are rounded for."""
        return self._drawn(self.loaded)

    def _drawn(self, loaded: LoadedModel) -> Calibration:
        prune, seed = self.subject.prune, self.subject.seed
        return load_calibration(
            prune.calibration, loaded, nsamples=prune.nsamples, seqlen=prune.seqlen, seed=seed,
            progress=self.progress,
        )  # fmt: skip

    def check(self) -> None:
        """Raise InputError for what the model or its texts cannot do, before anything is written."""
        settings, loaded = self.settings, self.loaded
        longest = int(getattr(loaded.model.config, "max_position_embeddings", None) or settings.seqlen)
        if settings.seqlen > longest:
            raise InputError(
                "longer than the model's context",
                field="seqlen",
                value=settings.seqlen,
                allowed=f"up to {longest}",
            )
        for share in settings.groups:
            check_removals(loaded.model, replace(self.subject.prune.settings(1), kv_groups=share))
        if self.subject.recover is not None:
            check_seqlen(loaded, self.subject.recover.seqlen)
        if not (self.state / "windows.json").is_file():
            _ = self._windows
        for size in filter(None, settings.vocabularies):
            self.vocabulary(size)

    @functools.cached_property
    def _windows(self) -> JudgedWindows:
        judged = EvaluationSettings(
            text=self.settings.text, chats=self.settings.chats, seqlen=self.settings.seqlen,
            max_windows=self.settings.max_windows, seed=self.subject.seed + 1,
        )  # fmt: skip
        drawn = [
            (kind, source, text_windows(source, self._dense, judged, self.progress, WRITERS))
            for kind, source in judged.sources
        ]
        return JudgedWindows(
            tuple(kind for kind, _, _ in drawn),
            tuple(source for _, source, _ in drawn),
            tuple(tuple(map(tuple, one.ids.tolist())) for _, _, one in drawn),
            tuple(one.sha256 for _, _, one in drawn),
        )

    @functools.cached_property
    def windows(self) -> JudgedWindows:
        """What every file is measured on: those of the first run in this folder.

        Raises:
            InputError: They are damaged, or of another model.
        """
        path = self.state / "windows.json"
        if not path.is_file():
            write_record(path, self._windows)
        kept = read_record(JudgedWindows, path)
        largest = max(token for text in kept.ids for window in text for token in window)
        if largest >= self.loaded.model.get_input_embeddings().weight.shape[0]:
            raise InputError(f"{path}: the model has no token {largest}")
        return kept

    @functools.cached_property
    def _dense(self) -> RememberedModel:
        return RememberedModel(self.loaded)

    def vocabulary(self, size: int) -> VocabularyPlan:
        """Which tokens a vocabulary of that size keeps; no forward pass is needed.

        Raises:
            InputError: There is no such vocabulary.
        """
        if size not in self._vocabularies:
            sources = self._counted or self.calibration.sources
            self._vocabularies[size] = plan_vocabulary(self.loaded, self._counts, size, sources=sources)
        return self._vocabularies[size]

    @property
    def _counted(self) -> tuple[str, ...]:
        """Text whose tokens are counted: all of the calibration text, unless the model writes it."""
        return () if SELF in self.subject.prune.calibration else self.subject.prune.calibration

    @functools.cached_property
    def _counts(self) -> Counts:
        self.progress("counting tokens", 0, 1)
        counts = counts_of(self.loaded, self.calibration, self._counted)
        self.progress("counting tokens", 1, 1)
        return counts

    def _side(self, vocabulary: int) -> _Side:
        """The model with all of its tokens, or with so many; of the latter the latest is kept."""
        if vocabulary not in self._trimmed:
            for other in [size for size in self._trimmed if size]:
                del self._trimmed[other]
            if vocabulary:
                twin = replace(self.loaded, model=copied(self.loaded.model))
                kept = self.vocabulary(vocabulary)
                left = trim(
                    twin, self.calibration, kept, self.subject.prune.settings(1), progress=self.progress
                )
                self._trimmed[vocabulary] = _Side(*left, kept)
            else:
                self._trimmed[vocabulary] = _Side(self.loaded, self.calibration)
        return self._trimmed[vocabulary]

    def plan(self, point: Point) -> PruningPlan:
        """A point's plan: that of its vocabulary and groups at another ratio; the first one calibrates.

        Raises:
            InputError: Widths in multiples of the alignment cannot meet the ratio.
        """
        key = (point.vocabulary, point.groups)
        if key not in self._plans:
            path = (
                self.state
                / "plans"
                / f"{replace(point, ratio=0.0, recovered=False, steps=()).checkpoint}.json"
            )
            if not path.is_file():
                side = self._side(point.vocabulary)
                side.removals = side.removals or Removals(side.loaded.model, side.calibration, self.progress)
                wanted = replace(
                    self.subject.prune.settings(1),
                    prune_ratio=0.0,
                    vocabulary=point.vocabulary,
                    kv_groups=point.groups,
                )
                plan = make_plan(
                    side.loaded, self._statistics(side), side.calibration, wanted, *side.removals.of(wanted)
                )
                write_record(path, replace(plan, vocabulary=side.vocabulary))
            self._plans[key] = read_record(PruningPlan, path)
        base = self._plans[key]
        settings = fitting_settings(
            replace(base.settings, align=point.align), self.loaded.model, (point.quant,)
        )
        return replace(base, settings=settings).at_ratio(point.ratio)

    def _statistics(self, side: _Side) -> BlockStatistics:
        if side.statistics is None:
            side.statistics = statistics_for(
                side.loaded.model, side.calibration, self.subject.prune.settings(1), progress=self.progress
            )
        return side.statistics

    def foretold(self, point: Point) -> tuple[int | None, list[Held]]:
        """The size of a file that is not made, if the shape tells, and the limits it or its least size is held to."""
        if point.steps or (self.settings.max_size is None and self.settings.device is None):
            return None, []
        side, is_sized = self._side(point.vocabulary), GGUF.find(point.quant).is_sized
        side.sizes = side.sizes or self._sizes(side.loaded, self.work / "sizes")
        shape = model_shape(self.loaded.model) if point.is_dense else self.plan(point).shape
        size = side.sizes.least_bytes(point.quant, shape, dense=point.is_dense)
        held = list(self.settings.held(size=size))
        if self.settings.device is not None and is_sized:
            held += self._held_by_speed(self._projected(side.sizes.facts(point.quant, shape)))
        return size if is_sized else None, held

    def _sizes(self, loaded: LoadedModel, folder: Path) -> Sizes:
        sized = tuple(name for name in self.settings.quants if GGUF.find(name).is_sized)
        return Sizes(loaded, folder, True, self.subject.seed, self._n_threads, sized)

    def check_size(self) -> None:
        """Raise InputError if even the smallest of all files is larger than it may be; nothing is measured for that."""
        settings = self.settings
        if settings.max_size is None:
            return
        fewest, share = min(filter(None, settings.vocabularies), default=0), max(settings.groups)
        ratio, left = max(settings.ratios), self.loaded
        if fewest:
            plain = replace(self.subject.prune.settings(1), reconstruct="none")
            twin = replace(left, model=copied(left.model))
            left, _ = trim(twin, self.calibration, self.vocabulary(fewest), plain)
        shape = model_shape(left.model)
        with LargeScratch("sizes") as scratch:
            sizes, each = self._sizes(left, scratch.path), list[int]()
            for quant in settings.quants:
                step = Point(quant, ratio=ratio).align
                # Widths and groups are rounded: by one step less, no file is smaller.
                widths = [max(step, int(w * (1 - ratio) // step * step)) for w in shape.ffn_widths]
                cut = shape.with_ffn_widths(widths) if ratio else shape
                if share:
                    cut = cut.with_kv_groups(
                        [
                            max(1, int(one.kv_groups * (1 - share))) if one.kv_groups else 0
                            for one in cut.blocks
                        ]
                    )
                each.append(sizes.least_bytes(quant, cut, dense=not (fewest or ratio or share)))
        if (least := min(each)) > settings.max_size:
            raise InputError(
                "no file is so small",
                field="--max-size",
                value=megabytes(settings.max_size),
                allowed=f"{least} bytes or more (less with fewer --vocabularies, higher --ratios or fewer bits)",
            )

    def held(self, one: EvaluatedPoint) -> tuple[Held, ...]:
        """How a file stands to the limits."""
        rows = [*self.settings.held(size=one.file_bytes, kl=one.kl_mean, bits=one.bits_ratio)]
        rows += self._held_by_speed(one.speed) if one.speed else ()
        known = {row.limit for row in rows}
        why = (one.speed and one.speed.failure) or "not measured"
        outcome = MISSED if why.startswith(DOES_NOT_FIT) else INCONCLUSIVE
        return (
            *rows,
            *(Held(limit, why, outcome, 1.0) for limit in self.settings.limits if limit not in known),
        )

    def _held_by_speed(self, speed: Speed) -> tuple[Held, ...]:
        span = None if speed.low is None or speed.high is None else (speed.low, speed.high)
        return tuple(self.settings.held(memory=speed.peak_bytes, fits=speed.fits, speed=span))

    # Making and measuring.

    def find(self, point: Point) -> EvaluatedPoint | None:
        """What is known of a point, if that is all that was asked for."""
        known, settings = self._kept(point), self.settings
        where = settings.device or settings.place
        if known is None or where is None:
            return known
        speed = known.speed
        if (
            speed is None
            or speed.place != where
            or (speed.failure and not speed.failure.startswith(DOES_NOT_FIT))
        ):
            return None
        return known if settings.device or self.threads in (None, speed.n_threads) else None

    def keep(self, one: EvaluatedPoint) -> None:
        """Keep the record of a point."""
        write_record(self._record(one.point), one)

    def _kept(self, point: Point) -> EvaluatedPoint | None:
        path = self._record(point)
        return read_record(EvaluatedPoint, path) if path.is_file() else None

    def _record(self, point: Point) -> Path:
        how = f"-{self.training}" if point.recovered else ""
        return self.state / "points" / f"{point.key}{how}.json"

    def evaluate(self, point: Point, expected: int | None) -> EvaluatedPoint:
        """Make a file, measure it, and leave it in the folder of the search.

        Raises:
            InputError: It cannot be made or measured.
            LimitError: It gives no finite logits.
        """
        began = time.monotonic()
        made = self.export(point)
        checkpoint = self._checkpoint(point)
        known = self._kept(point)
        if known is None:
            shapes = read_config(checkpoint).shape, model_shape(self.loaded.model)
            left, whole = (sum(shape.ffn_widths) for shape in shapes)
            tokenizer = self._side(point.vocabulary).loaded.tokenizer
            known = EvaluatedPoint(
                file=made.name,
                file_bytes=made.stat().st_size,
                texts=measure_file(
                    made,
                    self._dense,
                    tokenizer,
                    self.windows.texts,
                    threads=self.threads,
                    progress=self.progress,
                ),
                point=point,
                sha256=sha256_file(made),
                removed=1 - left / whole,
                expected_bytes=expected,
                speed=None,
                seconds=0.0,
                shortcoming=shortcoming_of(checkpoint),
            )
        if self.settings.device is not None:
            known = replace(known, speed=self._projected(gguf_facts(made)))
        elif self.settings.place is not None:
            known = replace(known, speed=self._timed(made, self.settings.place))
        known = replace(known, seconds=round(known.seconds + time.monotonic() - began, 2))
        self.keep(known)
        return known

    def export(self, point: Point) -> Path:
        """A point's file, in the folder of the search.

        Raises:
            InputError: It cannot be made.
        """
        checkpoint = self._checkpoint(point)
        drafts = self.work / "files"
        shutil.rmtree(drafts, ignore_errors=True)
        drafts.mkdir(parents=True)
        export, row = ExportConfig(), GGUF.find(point.quant)
        text = spread_windows(self._side(point.vocabulary).calibration.input_ids, export.rounding_windows)
        options = export.options(
            text if "calibration" in row.reads else None,
            name=file_stem(f"{self.loaded.source.name}-{point.checkpoint}"),
            must_fit=not point.is_dense,
            device=str(self.loaded.model.device),
            dtype=self.subject.model.dtype,
            n_threads=self._n_threads,
            progress=self.progress,
        )
        ((_, made),) = draft_gguf(checkpoint, drafts, (point.quant,), options).items()
        fsync_file(made)
        return made.replace(self.folder / made.name)

    def _checkpoint(self, point: Point) -> Path:
        """Prune, train if the point says so, and save; only the latest of each kind is kept."""
        untrained = replace(point, recovered=False)
        pruned = f"pruned-{untrained.checkpoint}"
        if point.is_dense:
            return self._once("dense", lambda path: self._save(self._side(0), path))
        if not point.recovered:
            return self._once(pruned, lambda path: self._prune(point, path))

        assert self.subject.recover is not None
        name = f"recovered-{point.checkpoint}-{self.training}"
        if (self.work / name).is_dir():
            return self.work / name
        # Before older checkpoints go: it may be pruned from one of them.
        start, teacher = self._checkpoint(untrained), self._checkpoint(Point(point.quant))
        recover, seed, device = self.subject.recover, self.subject.seed, self.subject.model.device
        return self._once(
            name,
            lambda path: run_recovery(
                start,
                path,
                recover,
                seed,
                teacher=teacher,
                work=path.with_name(f"{name}.training"),
                device=device,
                progress=self.progress,
            ),
        )

    def _once(self, name: str, make: Callable[[Path], None]) -> Path:
        """A checkpoint, made unless it is the latest of its kind; what was half trained goes on."""
        path = self.work / name
        if not path.is_dir():
            for old in self.work.glob(f"{name.partition('-')[0]}-*"):
                if old.name != f"{name}.training":
                    shutil.rmtree(old, ignore_errors=True)
            make(path)
        return path

    def _prune(self, point: Point, path: Path) -> None:
        if point.steps:
            before = replace(point, ratio=point.steps[-1], recovered=True, steps=point.steps[:-1])
            loaded = load_stage(self._checkpoint(before), self.subject.model, self.progress)
            # Of what is left.
            ratio = 1 - (1 - point.ratio) / (1 - before.ratio)
            settings = replace(self.subject.prune.settings(point.align), prune_ratio=ratio)
            settings = fitting_settings(settings, loaded.model, (point.quant,))
            made = prune_model(loaded, self._drawn(loaded), settings, progress=self.progress)
            save_checkpoint(
                made.loaded, path, plan=made.plan, input_moments=made.input_moments, seed=self.subject.seed
            )
            return
        plan, side = self.plan(point), self._side(point.vocabulary)
        model = copied(side.loaded.model)
        apply_plan(
            model,
            plan,
            statistics=side.statistics,
            input_ids=side.calibration.input_ids,
            progress=self.progress,
        )
        self._save(replace(side, loaded=replace(side.loaded, model=model)), path, plan)

    def _save(self, side: _Side, path: Path, plan: PruningPlan | None = None) -> None:
        """A checkpoint, with the activation moments that 4-bit types are rounded for."""
        with products_in(self.subject.prune.dtype, side.loaded.model.device.type):
            windows = moment_windows(side.calibration.input_ids)
            moments = collect_input_moments(side.loaded.model, windows, progress=self.progress)
        save_checkpoint(side.loaded, path, plan=plan, input_moments=moments, seed=self.subject.seed)

    def _projected(self, facts: ModelFacts) -> Speed:
        assert self.settings.device is not None
        profile = find_profile(self.settings.device, load_profiles()).profile
        found = project(profile, facts, DEFAULT_CONTEXT)
        low, high = (found.decode.low, found.decode.high) if found.decode else (None, None)
        return Speed(profile.id, low, high, found.memory.needed, found.fits)

    def _timed(self, path: Path, place: str) -> Speed:
        """How fast a file decodes at a place, each sample in a process of its own."""
        settings = BenchSettings(
            n_prompt=(),
            n_gen=(_GENERATED,),
            ttft=(),
            load=False,
            n_threads=(self.threads,) if self.threads else (),
            check_text=False,
            seed=self.subject.seed,
        )
        (record,) = run_bench([path], settings, self.progress, target=open_target(place))
        _, low, high = speed_span(record) if has_speed(record) else (None, None, None)
        return Speed(
            place,
            low,
            high,
            record.peak_rss_bytes,
            n_threads=record.n_threads,
            failure=record.failure,
        )

    def misses(self, held: list[Held]) -> str:
        """What is missed, in words; empty where nothing is."""
        return "; ".join(f"{one.limit} ({one.figure})" for one in held if one.outcome == MISSED)

    @property
    def work(self) -> Path:
        """Scratch: checkpoints, drafts; what a killed search goes on from."""
        return self.state / "work"

    @property
    def _n_threads(self) -> int:
        return self.threads or torch.get_num_threads()
