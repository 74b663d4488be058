"""Make a point and measure it: prune from one shared calibration, train, export, read texts, time."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch

from cfsp.devices import find_device
from cfsp.errors import InputError
from cfsp.evaluation.torch_model import RememberedModel
from cfsp.files import LargeScratch, atomic_file, fsync_file, sha256_file
from cfsp.models.architectures import block_linears, model_shape
from cfsp.models.checkpoint import save_checkpoint
from cfsp.models.gguf_file import looked_up_alone
from cfsp.models.offload import at_hand, copied
from cfsp.models.reference import load_model
from cfsp.models.shape import ModelShape
from cfsp.models.source import LoadedModel
from cfsp.precision import products_in
from cfsp.progress import Progress, no_progress
from cfsp.pruning.block_by_block import apply_plan
from cfsp.pruning.parts import Removal, choose_removals, counted_removals
from cfsp.pruning.plan import BlockPlan, PruningPlan, make_plan
from cfsp.pruning.prune import counts_of, prune_model, trim
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.statistics import (
    BlockStatistics,
    collect_input_moments,
    collect_statistics,
    moment_windows,
    spread_windows,
)
from cfsp.pruning.surgery import cut_to_shape
from cfsp.pruning.vocabulary import Counts, VocabularyPlan, cut_vocabulary, plan_vocabulary
from cfsp.reading import as_input_error
from cfsp.records import read_record, write_record
from cfsp.recovery.recovery_record import RECOVERY_FILE, RecoveryRecord
from cfsp.text.calibration import Calibration, check_seqlen
from cfsp.text.settings import SELF
from cfsp.text.tokens import TokenWindows, tokens_sha256
from cfsp.units import megabytes
from exporters.checkpoint_reader import read_config
from exporters.families import GGUF
from exporters.family import ExportOptions
from exporters.gguf.architecture import ChosenLayout, read_layout
from exporters.gguf.files import TYPES, draft_gguf
from exporters.gguf.quants import block_of, find_quant
from exporters.gguf.tensors import SizeTemplate, padded, size_template, tensor_specs
from exporters.job import file_stem
from phoneready.evaluation.run import measure_file, text_windows
from phoneready.evaluation.settings import EvaluationSettings
from phoneready.figures.figures import INCONCLUSIVE, MISSED
from phoneready.release.inputs import identities, identity, made_with
from phoneready.release.steps import fitting_settings, load_stage, run_recovery
from phoneready.report.plots import speed_span
from phoneready.search.point import Held, Point, SearchSettings
from phoneready.search.record import EvaluatedPoint, Speed
from phoneready.settings.schema import ModelConfig, PruneConfig, QuantizeConfig, RecoverConfig
from phoneready.text import WRITERS, load_calibration
from runtime_bench.devices import (
    DEFAULT_CONTEXT,
    ModelFacts,
    find_profile,
    gguf_facts,
    load_profiles,
    project,
)
from runtime_bench.measuring.measure import run_bench
from runtime_bench.records.bench_record import DOES_NOT_FIT
from runtime_bench.records.fairness import has_speed
from runtime_bench.targets.table import open_target
from runtime_bench.workload import BenchSettings

_GENERATED = 64


class Subject(NamedTuple):
    """What a search is of: the dense model, its calibration, and how pruned ones are trained, if they are."""

    model: ModelConfig
    seed: int
    prune: PruneConfig
    recover: RecoverConfig | None


class Evaluator:
    """Makes and measures points, each once: what is known of them stays in the search's folder.

    `threads` are those outside torch; torch's number by default.
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
        self.work = self.state / "work"  # checkpoints and drafts: what a killed search goes on from
        how = subject.recover
        learnt = [asdict(how), identities(how.data), identities(how.validation)] if how else None
        self.training = hashlib.sha256(json.dumps(learnt, sort_keys=True).encode()).hexdigest()[:8]
        self._n_threads = threads or torch.get_num_threads()
        self._trimmed: dict[int, tuple[LoadedModel, Calibration]] = {}
        self._statistics: dict[int, BlockStatistics] = {}
        self._vocabularies: dict[int, VocabularyPlan] = {}
        self._plans: dict[tuple[int, float], PruningPlan] = {}

    # What is known before a point is made.

    @functools.cached_property
    def loaded(self) -> LoadedModel:
        model = self.subject.model
        return load_model(
            model.reference,
            device=find_device(model.device),
            dtype=model.dtype,
            progress=self.progress,
        )

    @functools.cached_property
    def calibration(self) -> Calibration:
        """The windows that statistics are taken from and files are rounded for."""
        prune, seed = self.subject.prune, self.subject.seed

        def draw() -> list[torch.Tensor]:
            drawn = load_calibration(
                prune.calibration, self.loaded, nsamples=prune.nsamples, seqlen=prune.seqlen, seed=seed,
                progress=self.progress,
            )  # fmt: skip
            return [drawn.input_ids]

        (ids,) = self._drawn_once("calibration", draw)
        return Calibration(ids, prune.calibration, seed, tokens_sha256(ids))

    @functools.cached_property
    def texts(self) -> tuple[tuple[str, TokenWindows], ...]:
        """What every file is measured on: windows of the dense model's ids."""
        judged = EvaluationSettings(
            text=self.settings.text, chats=self.settings.chats, seqlen=self.settings.seqlen,
            max_windows=self.settings.max_windows, seed=self.subject.seed + 1,
        )  # fmt: skip

        def draw() -> list[torch.Tensor]:
            sources = [source for _, source in judged.sources]
            return [text_windows(one, self._dense, judged, self.progress, WRITERS).ids for one in sources]

        rows = zip(judged.sources, self._drawn_once("texts", draw), strict=True)
        return tuple((kind, TokenWindows(ids, source, tokens_sha256(ids))) for (kind, source), ids in rows)

    def _drawn_once(self, name: str, draw: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        """Windows of token ids, those of the first run in this folder: text that a model writes takes minutes."""
        path = self.state / f"{name}.safetensors"
        if not path.is_file():
            drawn = {str(number): ids.contiguous() for number, ids in enumerate(draw())}
            with atomic_file(path) as temporary:
                safetensors.torch.save_file(drawn, temporary)
        with as_input_error(f"{path} is damaged; remove it"):
            kept = safetensors.torch.load_file(path)
            rows, found = self._rows, [kept[str(number)] for number in range(len(kept))]
            if any(ids.dtype != torch.int64 or ids.min() < 0 or ids.max() >= rows for ids in found):
                raise ValueError("the model has no such tokens")
        return found

    @property
    def _rows(self) -> int:
        return int(self.loaded.model.get_input_embeddings().weight.shape[0])

    @functools.cached_property
    def _dense(self) -> RememberedModel:
        return RememberedModel(self.loaded)

    def check(self) -> None:
        """Raise InputError for what the model cannot do, and if all files would be too large; no text is read."""
        settings, loaded, ratio = self.settings, self.loaded, max(self.settings.ratios)
        longest = int(getattr(loaded.model.config, "max_position_embeddings", None) or settings.seqlen)
        if settings.seqlen > longest:
            raise InputError(
                "longer than the model's context",
                field="seqlen",
                value=settings.seqlen,
                allowed=f"up to {longest}",
            )
        for share in settings.groups:
            counted_removals(loaded.model, replace(self.subject.prune.settings(1), kv_groups=share))
        if self.subject.recover is not None:
            check_seqlen(loaded, self.subject.recover.seqlen)
        # Without counts the tokens that merging learned first stay.
        uncounted = functools.partial(plan_vocabulary, loaded, np.zeros(self._rows), sources=())
        sizes, fewest, share = set(filter(None, settings.vocabularies)), None, max(settings.groups)
        if sizes:
            fewest = uncounted(min(sizes))
            if max(sizes) > self._rows:
                uncounted(max(sizes))
        if settings.max_size is None:
            return
        # At least: which tokens stay, only text can say, so of as many the shortest are counted, in their merges too.
        longer = 0
        if fewest is not None:
            lengths = {index: len(token.encode()) for token, index in loaded.tokenizer.get_vocab().items()}
            kept = [lengths[index] for index in fewest.kept if index in lengths]
            longer = 2 * (sum(kept) - sum(sorted(lengths.values())[: len(kept)]))
        least, shape = [], model_shape(loaded.model)
        with LargeScratch("sizes") as scratch:
            table = self._sizes_in(scratch.path)
            for quant in settings.quants:
                step, cut = Point(quant, ratio=ratio).align, shape
                if ratio:  # widths and groups are rounded: with one step less, no file is smaller
                    widths = [max(step, int(w * (1 - ratio) // step * step)) for w in shape.ffn_widths]
                    cut = shape.with_ffn_widths(widths)
                if share:
                    groups = [one.kv_groups or 0 for one in cut.blocks]
                    cut = cut.with_kv_groups([n and max(1, int(n * (1 - share))) for n in groups])
                dense = not (fewest or ratio or share)
                least.append(table.least_bytes(quant, cut, fewest, dense=dense) - longer)
        if min(least) > settings.max_size:
            raise InputError(
                "no file is so small",
                field="--max-size",
                value=megabytes(settings.max_size),
                allowed=f"more than {min(least)} bytes (less with fewer --vocabularies, higher --ratios or fewer bits)",
            )

    def _sizes_in(self, folder: Path) -> Sizes:
        sized = [name for name in self.settings.quants if GGUF.find(name).is_sized]
        return Sizes(self.loaded, folder, self.subject.seed, self._n_threads, sized)

    @functools.cached_property
    def _sizes(self) -> Sizes:
        return self._sizes_in(self.work / "sizes")

    @functools.cached_property
    def _counts(self) -> Counts:
        """Of tokens in all of the calibration text, or in its windows if the model writes it."""
        given = self.subject.prune.calibration
        self.progress("counting tokens", 0, 1)
        counts = counts_of(self.loaded, self.calibration, () if SELF in given else given)
        self.progress("counting tokens", 1, 1)
        return counts

    def vocabulary(self, size: int) -> VocabularyPlan | None:
        """Which tokens a vocabulary of that size keeps; None if it keeps all."""
        if size and size not in self._vocabularies:
            sources = self.subject.prune.calibration
            self._vocabularies[size] = plan_vocabulary(self.loaded, self._counts, size, sources=sources)
        return self._vocabularies.get(size)

    def _side(self, vocabulary: int) -> tuple[LoadedModel, Calibration]:
        """The model with all of its tokens, or with so many; of the latter the latest is kept."""
        if vocabulary not in self._trimmed:
            for other in [size for size in self._trimmed if size]:
                del self._trimmed[other]
                self._statistics.pop(other, None)
            loaded, calibration = self.loaded, self.calibration
            if kept := self.vocabulary(vocabulary):
                twin, settings = replace(loaded, model=copied(loaded.model)), self.subject.prune.settings(1)
                loaded, calibration = trim(twin, calibration, kept, settings, progress=self.progress)
            self._trimmed[vocabulary] = loaded, calibration
        return self._trimmed[vocabulary]

    def plan(self, point: Point) -> PruningPlan:
        """A point's plan: that of its vocabulary and groups at another ratio; the first one calibrates."""
        key, settings = (point.vocabulary, point.groups), self.subject.prune.settings(1)
        name = replace(point, ratio=0.0, recovered=False, steps=()).checkpoint
        path = self.state / "plans" / f"{name}.json"
        if not path.is_file():
            loaded, calibration = self._side(point.vocabulary)
            model, ids = loaded.model, calibration.input_ids
            if point.vocabulary not in self._statistics:
                with products_in(settings.dtype, model.device.type):
                    self._statistics[point.vocabulary] = collect_statistics(
                        model, ids, keep_states=settings.repairs, progress=self.progress
                    )
            wanted = replace(settings, prune_ratio=0.0, vocabulary=point.vocabulary, kv_groups=point.groups)
            removals = choose_removals(model, ids, wanted, progress=self.progress)
            statistics = self._statistics[point.vocabulary]
            made = make_plan(loaded, statistics, calibration, wanted, removals)
            write_record(path, replace(made, vocabulary=self.vocabulary(point.vocabulary)))
        if key not in self._plans:
            self._plans[key] = read_record(PruningPlan, path)
        base, model = self._plans[key], self.loaded.model
        settings = fitting_settings(replace(base.settings, align=point.align), model, (point.quant,))
        return replace(base, settings=settings).at_ratio(point.ratio)

    def expected(self, point: Point) -> tuple[int | None, list[Held]]:
        """A file's size before it is made, if the shape tells, and how it stands to the limits by that."""
        if point.steps or (self.settings.max_size is None and self.settings.device is None):
            return None, []
        kept, sized = self.vocabulary(point.vocabulary), GGUF.find(point.quant).is_sized
        whole = model_shape(self.loaded.model)
        shape = self.plan(point).shape if point.ratio or point.groups else whole
        size = self._sizes.least_bytes(point.quant, shape, kept, dense=point.is_dense)
        held = list(self.settings.held(size=size))
        if self.settings.device is not None and sized:
            facts = self._sizes.facts(point.quant, shape, kept)
            held += self._held_by_speed(self._projected(facts))
        return size if sized else None, held

    def held(self, one: EvaluatedPoint) -> tuple[Held, ...]:
        """How a file stands to the limits; one that nothing is known of is not met."""
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
        path, settings = self._record(point), self.settings
        known = read_record(EvaluatedPoint, path) if path.is_file() else None
        where = settings.device or settings.place
        if known is None or where is None:
            return known
        speed = known.speed
        if speed is None or speed.place != where:
            return None
        if speed.failure and not speed.failure.startswith(DOES_NOT_FIT):
            return None
        return known if settings.device or self.threads in (None, speed.n_threads) else None

    def keep(self, one: EvaluatedPoint) -> None:
        write_record(self._record(one.point), one)

    def _record(self, point: Point) -> Path:
        how = f"-{self.training}" if point.recovered else ""
        return self.state / "points" / f"{point.key}{how}.json"

    def evaluate(self, point: Point, expected: int | None) -> EvaluatedPoint:
        """Make a file, measure it, and leave it in the folder of the search."""
        began, settings = time.monotonic(), self.settings
        made = self.export(point)
        checkpoint, path = self._checkpoint(point), self._record(point)
        if path.is_file():
            known = read_record(EvaluatedPoint, path)
        else:
            shapes = read_config(checkpoint).shape, model_shape(self.loaded.model)
            left, whole = (sum(shape.ffn_widths) for shape in shapes)
            tokenizer = self._side(point.vocabulary)[0].tokenizer
            texts = measure_file(
                made, self._dense, tokenizer, self.texts, threads=self.threads, progress=self.progress
            )
            trained = checkpoint / RECOVERY_FILE
            known = EvaluatedPoint(
                file=made.name,
                file_bytes=made.stat().st_size,
                texts=texts,
                point=point,
                sha256=sha256_file(made),
                removed=1 - left / whole,
                expected_bytes=expected,
                speed=None,
                seconds=0.0,
                shortcoming=read_record(RecoveryRecord, trained).shortcoming if trained.is_file() else None,
            )
        if settings.device is not None:
            known = replace(known, speed=self._projected(gguf_facts(made)))
        elif settings.place is not None:
            # How fast it decodes, each sample in a process of its own.
            timing = BenchSettings(
                n_prompt=(), n_gen=(_GENERATED,), ttft=(), load=False, check_text=False,
                n_threads=(self.threads,) if self.threads else (), seed=self.subject.seed,
            )  # fmt: skip
            (record,) = run_bench([made], timing, self.progress, target=open_target(settings.place))
            _, low, high = speed_span(record) if has_speed(record) else (None, None, None)
            n, memory = record.n_threads, record.peak_rss_bytes
            speed = Speed(settings.place, low, high, memory, n_threads=n, failure=record.failure)
            known = replace(known, speed=speed)
        known = replace(known, seconds=round(known.seconds + time.monotonic() - began, 2))
        self.keep(known)
        return known

    def _projected(self, facts: ModelFacts) -> Speed:
        assert self.settings.device is not None
        profile = find_profile(self.settings.device, load_profiles()).profile
        found = project(profile, facts, DEFAULT_CONTEXT)
        low, high = (found.decode.low, found.decode.high) if found.decode else (None, None)
        return Speed(profile.id, low, high, found.memory.needed, found.fits)

    def export(self, point: Point) -> Path:
        checkpoint, drafts = self._checkpoint(point), self.work / "files"
        shutil.rmtree(drafts, ignore_errors=True)
        drafts.mkdir(parents=True)
        export, text = QuantizeConfig(), None
        if "calibration" in GGUF.find(point.quant).reads:
            ids = self._side(point.vocabulary)[1].input_ids
            text = spread_windows(ids, export.rounding_windows)
        options = export.options(
            text,
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
        untrained, seed, recover = replace(point, recovered=False), self.subject.seed, self.subject.recover
        name = "dense" if point.is_dense else f"pruned-{untrained.checkpoint}"
        name = f"recovered-{point.checkpoint}-{self.training}" if point.recovered else name
        path = self.work / name
        if path.is_dir():
            return path
        start = teacher = None
        before = replace(untrained, ratio=0.0)
        # What it is made of first, as older checkpoints go then.
        if point.recovered:
            start, teacher = self._checkpoint(untrained), self._checkpoint(Point(point.quant))
        elif point.steps:
            before = replace(point, ratio=point.steps[-1], recovered=True, steps=point.steps[:-1])
            start = self._checkpoint(before)
        for old in self.work.glob(f"{name.partition('-')[0]}-*"):
            if old.name != f"{name}.training":  # what was half trained goes on
                shutil.rmtree(old, ignore_errors=True)

        loaded, calibration = self._side(point.vocabulary)
        plan = moments = None
        if point.recovered:
            assert start is not None
            assert recover is not None
            run_recovery(
                start,
                path,
                recover,
                seed,
                teacher=teacher,
                work=path.with_name(f"{name}.training"),
                device=self.subject.model.device,
                progress=self.progress,
            )
            return path
        if start is not None:
            loaded = load_stage(start, self.subject.model, self.progress)
            left = 1 - (1 - point.ratio) / (1 - before.ratio)  # of what the step before left
            settings = replace(
                self.subject.prune.settings(point.align), prune_ratio=left, blocks=0, attentions=0
            )
            settings = fitting_settings(settings, loaded.model, (point.quant,))
            made = prune_model(loaded, calibration, settings, progress=self.progress)
            loaded, plan, moments = made.loaded, made.plan, made.input_moments
        elif not point.is_dense:
            plan, loaded = self.plan(point), replace(loaded, model=copied(loaded.model))
            known = self._statistics.get(point.vocabulary)
            ids, states = calibration.input_ids, known and known.states
            apply_plan(loaded.model, plan, input_ids=ids, states=states, progress=self.progress)
        if moments is None:  # 4-bit types are rounded for these
            with products_in(self.subject.prune.dtype, loaded.model.device.type):
                windows = moment_windows(calibration.input_ids)
                moments = collect_input_moments(loaded.model, windows, progress=self.progress)
        save_checkpoint(loaded, path, plan=plan, input_moments=moments, seed=seed)
        return path


_TEMPLATE_WIDTH = 256
"""No type falls back at this width."""


class Sizes:
    """Computes sizes of files; `items` are quantizations that will be asked for, `folder` is scratch."""

    def __init__(
        self, loaded: LoadedModel, folder: Path, seed: int, n_threads: int, items: Sequence[str]
    ) -> None:
        self._loaded, self._folder, self._seed, self._n_threads = loaded, folder, seed, n_threads
        self._items = tuple(items)
        self._small: Any = None
        self._templates: dict[tuple[Any, ...], tuple[ChosenLayout, SizeTemplate]] = {}

    def least_bytes(
        self, item: str, shape: ModelShape, vocabulary: VocabularyPlan | None = None, *, dense: bool = False
    ) -> int:
        """Size of a file, exact to 32 bytes and what a long name takes; of a mixture with its smallest types.

        A file of a dense model carries no plan's hash.
        """
        shape = shape if vocabulary is None else replace(shape, vocab_size=len(vocabulary.kept))
        if find_quant(item).is_sized:
            layout, template = self._template(item, shape, vocabulary, dense)
            return template.file_bytes(layout.of_shape(shape))
        layout, template = self._template(next(iter(self._items), "Q8_0"), shape, vocabulary, dense)
        total, chosen = template.overhead_bytes, layout.of_shape(shape)
        for spec, tensor in zip(tensor_specs(chosen), template.tensors(chosen), strict=True):
            blocks = [block_of(kind) for kind in TYPES] if spec.is_matrix else []
            count = math.prod(spec.shape)
            sizes = [count // n * size for n, size in blocks if spec.shape[1] % n == 0]
            total += padded(min(sizes, default=2 * count if spec.is_matrix else tensor.n_bytes))
        return total

    def facts(self, item: str, shape: ModelShape, vocabulary: VocabularyPlan | None = None) -> ModelFacts:
        """What a projection to a device needs to know of a file."""
        shape = shape if vocabulary is None else replace(shape, vocab_size=len(vocabulary.kept))
        layout, template = self._template(item, shape, vocabulary, dense=False)
        config, tensors = layout.config, template.tensors(layout.of_shape(shape))
        aside = looked_up_alone({t.name for t in tensors})
        read = [t for t in tensors if t.name not in aside]
        matrices = [t for t in read if len(t.shape) > 1]
        by_type: Counter[str] = Counter()
        for tensor in matrices:
            by_type[tensor.kind] += tensor.n_bytes
        return ModelFacts(
            path=Path(item),
            weight_bytes=sum(t.n_bytes for t in tensors),
            read_bytes=sum(t.n_bytes for t in read),
            n_multiplied=sum(math.prod(t.shape) for t in matrices),
            bytes_by_type=dict(by_type),
            key_value_width=config.key_value_width,
            hidden_size=config.hidden_size,
            ffn_width=max(shape.ffn_widths),
            vocab_size=config.vocab_size,
            context_length=layout.context_length,
        )

    def _template(
        self, item: str, shape: ModelShape, vocabulary: VocabularyPlan | None, dense: bool
    ) -> tuple[ChosenLayout, SizeTemplate]:
        """A file of the same blocks and tokens, and of few channels, says of others what is no tensor, and types."""
        if self._small is None:  # before anything else is done to the model
            self._small = copied(self._loaded.model)
            whole = model_shape(self._small)
            widths = [min(_TEMPLATE_WIDTH, width) for width in whole.ffn_widths]
            cut_to_shape(self._small, whole.with_ffn_widths(widths))
        small = model_shape(self._small)
        groups = {
            one.origin: small.blocks[one.origin].kv_groups or 0 if one.kv_groups is None else one.kv_groups
            for one in shape.blocks
        }
        # Of models of one width llama.cpp may have another architecture than of others.
        kept = None if vocabulary is None else vocabulary.kept
        rest = (shape.is_uniform, dense, kept, tuple(groups.items()))
        if (item, *rest) in self._templates:
            return self._templates[item, *rest]

        twin = replace(self._loaded, model=copied(self._small))
        if vocabulary is not None:
            with at_hand(twin.model.get_input_embeddings(), twin.model.get_output_embeddings()):
                twin = cut_vocabulary(twin, vocabulary)
        model = twin.model
        small = replace(small, vocab_size=model_shape(model).vocab_size)
        small = small.without(blocks=set(range(len(small.blocks))) - groups.keys())
        small = small.with_kv_groups(list(groups.values()))
        first, *widths = small.ffn_widths
        cut_to_shape(model, small.with_ffn_widths([first if shape.is_uniform else first // 2, *widths]))
        folder = self._folder / "template"
        shutil.rmtree(folder, ignore_errors=True)
        linears = [(name, one) for each in block_linears(model) for name, one in each.items()]
        save_checkpoint(
            twin,
            folder / "model",
            plan=None if dense else _some_plan(model),
            input_moments={name: torch.ones(linear.in_features) for name, linear in linears},
            seed=self._seed,
        )
        stem = f"{self._loaded.source.name}-{'dense' if dense else 'pruned12_3456'}"  # as long as a release's
        options = ExportOptions(name=stem, use_imatrix=True, n_threads=self._n_threads)
        drafts = draft_gguf(folder / "model", folder, list(dict.fromkeys((item, *self._items))), options)
        for name, path in drafts.items():
            self._templates[name, *rest] = read_layout(folder / "model"), size_template(path, name)
        shutil.rmtree(folder)
        return self._templates[item, *rest]


def _some_plan(model: Any) -> PruningPlan:
    """A plan by which a model is what it is, for what any plan adds to a file: its hash."""
    shape = model_shape(model)
    silent = tuple(block.origin for block in shape.blocks if not block.has_attention)
    return PruningPlan(
        model_type=model.config.model_type,
        source="",
        source_sha256=None,
        calibration=(),
        calibration_sha256="",
        calibration_tokens=0,
        seed=0,
        settings=PruneSettings(),
        dense_widths=shape.ffn_widths,
        blocks=tuple(BlockPlan(width, 0.0, tuple(range(width))) for width in shape.ffn_widths),
        attention=Removal(silent, (), 0.0, 0) if silent else None,
    )
