"""What each stage of a release does: read what earlier stages left, write into the folder it is given."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from cfsp.devices import find_device
from cfsp.errors import InputError, PhonereadyError
from cfsp.evaluation.language_model import PROMPTS, LanguageModel, answer
from cfsp.evaluation.tasks import chat_requests, load_chat_tasks
from cfsp.evaluation.torch_model import RememberedModel, TorchLanguageModel
from cfsp.files import LargeScratch, sha256_file
from cfsp.models.architectures import model_shape, spec_for
from cfsp.models.checkpoint import read_checkpoint_info, save_checkpoint
from cfsp.models.reference import load_model, load_tokenizer
from cfsp.models.shape import ModelShape
from cfsp.models.source import LoadedModel
from cfsp.progress import Progress
from cfsp.pruning.prune import prune_model
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.statistics import spread_windows
from cfsp.records import read_record, write_record
from cfsp.text.calibration import Calibration, check_seqlen, read_windows, save_windows
from exporters.checkpoint_reader import read_config
from exporters.export_record import ExportManifest
from exporters.families import BASE, FAMILIES, ROUNDING, family_of, makes_gguf
from exporters.family import ExportOptions, MadeFile
from exporters.gguf.architecture import choose_layout
from exporters.job import MANIFEST_FILE, file_stem
from exporters.recipe import Recipe
from phoneready.evaluation.evaluation_record import ModelIdentity, TextLoss
from phoneready.evaluation.measured_file import MeasuredFile
from phoneready.evaluation.models import OpenSettings, open_language_model, runtime_for
from phoneready.evaluation.run import (
    evaluate,
    measure_file,
    reasons_of,
    text_windows,
)
from phoneready.evaluation.settings import EvaluationSettings
from phoneready.exporting import is_checkpoint
from phoneready.figures.figures import CHECKPOINT, DENSE, SHIPPED
from phoneready.release.stages import stage_folder
from phoneready.settings.schema import BenchConfig, ModelConfig, QuantizeConfig, RecoverConfig, ReleaseConfig
from phoneready.text import WRITERS, load_calibration
from runtime_bench.devices import FACTS, ModelFacts
from runtime_bench.engines import size_of
from runtime_bench.measuring.measure import run_bench
from runtime_bench.presentation.record_table import speed_text
from runtime_bench.records.bench_record import DOES_NOT_FIT, BenchRecord
from runtime_bench.records.jsonl import append_jsonl, read_jsonl, write_jsonl
from runtime_bench.targets import Target
from runtime_bench.targets.table import Unreachable, open_target, target_slug
from runtime_bench.workload import BenchSettings

CALIBRATION_FILE = "calibration.safetensors"
EVALUATION_FILE = "evaluation.json"
ANSWERS_FILE = "answers.json"
BENCH_FILE = "bench.jsonl"
SIDE_BY_SIDE_FILE = "side-by-side.json"
RECOVERY_STAGE = "recover"
_ANSWER_CONTEXT = 1024
_log = logging.getLogger(__name__)


class Artifact(NamedTuple):
    """A GGUF file or the folder of an ONNX variant, `root`; benchmarks open `path`, the file or its main graph."""

    role: str
    item: str
    name: str
    root: Path
    path: Path

    @property
    def facts(self) -> ModelFacts:
        """What a projection needs to know of it, of formats that are projected."""
        return FACTS[family_of(self.item).name](self.path)


@dataclass(frozen=True)
class FileLosses(MeasuredFile):
    """What an export loses, of the `dense` or the `shipped` role, by its quantization or variant."""

    role: str
    item: str

    @property
    def is_dense(self) -> bool:
        return self.role == DENSE

    @property
    def label(self) -> str:
        return f"dense {self.item}" if self.is_dense else self.item

    @property
    def family(self) -> str:
        """What it is held against: files of the same family."""
        return family_of(self.item).name


@dataclass(frozen=True)
class SideBySide:
    KIND: ClassVar[str] = "side-by-side"
    SCHEMA_VERSION: ClassVar[int] = 2

    files: tuple[FileLosses, ...]


@dataclass(frozen=True)
class Answers:
    """Greedy answers of exports by their names, each in its own runtime, in the chat template if the model has one; why
    each is degenerate, None for a good one."""

    KIND: ClassVar[str] = "answers"
    SCHEMA_VERSION: ClassVar[int] = 2

    prompts: tuple[str, ...]
    answers: dict[str, tuple[str, ...]]
    reasons: dict[str, tuple[str | None, ...]]

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError("empty", field="prompts")
        if self.answers.keys() != self.reasons.keys():
            raise InputError("answers and reasons are of other files", field="answers")
        for file, answers in (*self.answers.items(), *self.reasons.items()):
            if len(answers) != len(self.prompts):
                told = f"{len(answers)} answers to {len(self.prompts)} prompts"
                raise InputError(told, field=f"answers, {file}")


def made_files(export: QuantizeConfig) -> dict[str, MadeFile]:
    """The files of `quantize.made` by their formats; InputError: it holds none, or one is not that of its record."""
    if export.made is None:
        return {}
    if not (export.made / MANIFEST_FILE).is_file():
        raise InputError(
            f"has no {MANIFEST_FILE}",
            field="quantize.made",
            value=str(export.made),
            allowed="a folder of `search`",
        )
    found = {}
    for record in read_record(ExportManifest, export.made / MANIFEST_FILE).exports:
        path = export.made / record.file
        if record.format == BASE.name and record.quant in export.names:
            if not path.is_file() or sha256_file(path) != record.sha256:
                state = "was changed" if path.is_file() else "is not there"
                raise InputError(
                    f"{path} {state} since it was made; search again, or leave out quantize.made"
                )
            found[record.quant] = MadeFile(path, record)
    return found


def bench_stage(place: str) -> str:
    return f"bench-{target_slug(place)}"


def decide_stage(place: str) -> str:
    return f"decide-{target_slug(place)}"


def is_measured(record: BenchRecord) -> bool:
    """Whether a row was measured as was asked, or does not fit."""
    return (record.ok and not record.fallback) or record.memory_verdict == DOES_NOT_FIT


def export_stage(role: str) -> str:
    return "export" if role == SHIPPED else f"export-{role}"


@dataclass(frozen=True)
class Steps:
    """The stages' work for one configuration and release folder; threads are those outside torch and the benchmark."""

    config: ReleaseConfig
    folder: Path
    threads: int | None
    which: str = ""  # ends the name of the stage that prunes, if there are several

    @property
    def prompts(self) -> tuple[str, ...]:
        return self.config.evaluate.prompts or PROMPTS

    @property
    def pruned(self) -> str:
        """The stage that prunes."""
        return f"prune{self.which}"

    @property
    def final(self) -> str:
        """The stage whose checkpoint ships."""
        return "dense" if self.config.is_whole else RECOVERY_STAGE if self.config.recover else self.pruned

    @property
    def roles(self) -> tuple[str, ...]:
        """Of the models that files are made of; the dense one is there to be compared with."""
        return (SHIPPED,) if self.config.is_whole else (DENSE, SHIPPED)

    @property
    def recovery_work(self) -> Path:
        """Where training keeps its own checkpoints, so that a killed one goes on."""
        return self.folder / "stages" / "recover.work"

    def checkpoint(self, stage: str) -> Path:
        return stage_folder(self.folder, stage) / "model"

    def artifacts(self) -> list[Artifact]:
        """What was exported: of each quantization and variant the dense model, if it is compared, then what ships."""
        return [self.artifact(role, item) for item in self.config.quantize.names for role in self.roles]

    def artifact(self, role: str, item: str) -> Artifact:
        family, folder = family_of(item), stage_folder(self.folder, export_stage(role))
        model = family.locate(folder / family.name, self._stem(role), item)
        return Artifact(role, item, model.name, model.root, model.path)

    def _stem(self, role: str) -> str:
        """What the names of a model's files begin with, whatever the settings."""
        source = read_checkpoint_info(self.checkpoint("dense")).source.name
        return file_stem(source if role == SHIPPED else f"{source}-{role}")

    def exported(self, role: str) -> Path:
        """The checkpoint that a model's exports are made from; a whole model's are those that `quantize` makes."""
        if self.config.is_whole and is_checkpoint(self.config.model.reference):
            return Path(self.config.model.reference)
        return self.checkpoint("dense" if role == DENSE else self.final)

    def dense(self, output: Path, progress: Progress) -> None:
        model, prune = self.config.model, self.config.prune
        loaded = load_model(
            model.reference,
            device=find_device(model.device),
            dtype=model.dtype,
            may_stream=True,
            progress=progress,
        )
        # Chats that cannot be asked must not be found after hours of recovery.
        for task in load_chat_tasks(self._judged_on):
            chat_requests(TorchLanguageModel(loaded), task)
        if self.config.recover is not None:
            check_seqlen(loaded, self.config.recover.seqlen)
        drawn = load_calibration(
            prune.calibration,
            loaded,
            nsamples=prune.nsamples,
            seqlen=prune.seqlen,
            seed=self.config.seed,
            progress=progress,
        )
        save_windows(drawn, output / CALIBRATION_FILE)
        save_checkpoint(loaded, output / "model", seed=self.config.seed)

    def prune(self, output: Path, progress: Progress) -> None:
        loaded = self._load("dense", progress)
        calibration, wanted = self.windows("dense"), self.config.prune
        made = (*wanted.for_quant, *self.config.quantize.names)
        settings = fitting_settings(self.config.prune_settings(), loaded.model, made)
        check = shape_check(settings, loaded.model, made)
        result = prune_model(
            loaded, calibration, settings, counted=wanted.vocabulary_text, check=check, progress=progress
        )
        save_windows(result.calibration, output / CALIBRATION_FILE)
        save_checkpoint(result.loaded, output / "model", plan=result.plan, seed=self.config.seed)

    def recover(self, output: Path, progress: Progress) -> None:
        """Train back what pruning has cost; the best validation's weights are kept, which may be the untrained ones."""
        settings = self.config.recover
        assert settings is not None
        run_recovery(
            self.checkpoint("prune"),
            output / "model",
            settings,
            self.config.seed,
            teacher=self.checkpoint("dense"),
            work=self.recovery_work,
            device=self.config.model.device,
            progress=progress,
        )

    def evaluate(self, output: Path, progress: Progress) -> None:
        """What ships, before it is quantized, against the dense model; a whole model by itself."""
        dense, path = self._load("dense", progress), output / EVALUATION_FILE
        if self.config.is_whole:
            model = TorchLanguageModel(dense)
            write_record(path, evaluate(model, None, self._judged_on, writers=WRITERS, progress=progress))
            return
        self._judge(TorchLanguageModel(self._load(self.final, progress)), dense, CHECKPOINT, path, progress)

    def side_by_side(self, output: Path, progress: Progress) -> None:
        """All exports on the same windows, each in its own runtime; what one loses can be held against any other."""
        dense, pruned = RememberedModel(self._load("dense", progress)), self.checkpoint(self.final)
        tokenizers = {DENSE: dense.tokenizer, SHIPPED: load_tokenizer(pruned)}
        judged = self._judged_on
        texts = [(kind, text_windows(one, dense, judged, progress, WRITERS)) for kind, one in judged.sources]
        path, files = output / SIDE_BY_SIDE_FILE, list[FileLosses]()
        before = {one.file: one for one in read_record(SideBySide, path).files} if path.is_file() else {}
        for artifact in self.artifacts():
            if artifact.name in before:
                files.append(before[artifact.name])
                continue
            tokenizer = tokenizers[artifact.role]
            losses = measure_file(
                artifact.root, dense, tokenizer, texts, threads=self.threads, progress=progress
            )
            size = size_of(artifact.path)
            files.append(FileLosses(artifact.name, size, losses, artifact.role, artifact.item))
        write_record(path, SideBySide(tuple(files)))

    def evaluate_files(self, output: Path, progress: Progress) -> None:
        """Tasks and own metrics of files that ship, in their own runtime; `side_by_side` has their texts."""
        dense, losses = self._load("dense", progress), self.losses()
        opening = OpenSettings(self.config.evaluate.seqlen, threads=self.threads)
        wanted = {item: output / f"{item}.json" for item in self.config.evaluate.files}
        for path in set(output.glob("*.json")) - {*wanted.values()}:
            path.unlink()
        for item in (item for item, path in wanted.items() if not path.is_file()):
            artifact = self.artifact(SHIPPED, item)
            known = next((one.texts for one in losses if one.file == artifact.name), ())
            root = str(artifact.root)
            with open_language_model(root, runtime_for(root), opening, progress=progress) as model:
                self._judge(model, dense, artifact.name, wanted[item], progress, known)

    def losses(self) -> tuple[FileLosses, ...]:
        """What every file loses, if a text was named."""
        path = stage_folder(self.folder, "side-by-side") / SIDE_BY_SIDE_FILE
        named = self.config.evaluate.text or self.config.evaluate.chats
        return read_record(SideBySide, path).files if named else ()

    @property
    def _judged_on(self) -> EvaluationSettings:
        # Not the calibration's seed: chats that pruning has seen prove nothing.
        return self.config.evaluate.settings(self.config.seed + 1, self.prompts)

    def _judge(
        self,
        model: LanguageModel,
        dense: LoadedModel,
        name: str,
        path: Path,
        progress: Progress,
        known: tuple[TextLoss, ...] | None = None,
    ) -> None:
        settings = self._judged_on if known is None else replace(self._judged_on, prompts=())
        result = evaluate(
            model, TorchLanguageModel(dense), settings, writers=WRITERS, known=known, progress=progress
        )
        against = ModelIdentity(dense.source.reference, sha256=dense.source.sha256)
        named = ModelIdentity(name, result.model.runtime)
        write_record(path, replace(result, model=named, against=against))

    def export(self, role: str, output: Path, progress: Progress) -> None:
        """What ships, or for comparison the dense model's files; those that are there already stay."""
        export, settings = self.config.quantize, self.export_options(role, progress)
        for gone in FAMILIES.keys() - export.formats.keys():
            shutil.rmtree(output / gone, ignore_errors=True)
        for name, formats in export.formats.items():
            family, folder, more = FAMILIES[name], output / name, output / f"{name}-more"
            shutil.rmtree(more, ignore_errors=True)
            if not folder.is_dir():
                family.export(self.exported(role), folder, formats, settings)
                continue
            made = read_record(ExportManifest, folder / MANIFEST_FILE)
            records = {}
            for record in made.exports:
                with contextlib.suppress(InputError):  # a run that was killed here has taken it out
                    root = family.locate(folder, self._stem(role), record.quant).root
                    if record.quant in formats:
                        records[record.quant] = record
                    else:
                        remove_place(root)
            if missing := [one for one in formats if one not in records]:
                new = family.export(self.exported(role), more, missing, settings)
                records |= {record.quant: record for record in new}
                for path in [one for one in more.iterdir() if one.name != MANIFEST_FILE]:
                    remove_place(folder / path.name)
                    path.rename(folder / path.name)
                shutil.rmtree(more)
            ours = replace(made, exports=tuple(records[one] for one in formats))
            write_record(folder / MANIFEST_FILE, ours)

    def export_options(self, role: str, progress: Progress) -> ExportOptions:
        """How a model's files are made."""
        export, prune = self.config.quantize, self.config.prune
        is_dense = role == DENSE or self.config.is_whole
        drawn = self.windows("dense" if is_dense else self.pruned)
        return export.options(
            spread_windows(drawn.input_ids, export.rounding_windows),
            recipe=Recipe(drawn.sources, prune.nsamples, prune.seqlen, drawn.seed),
            made=None if role == DENSE else made_files(export),
            name=self._stem(role),
            # The dense model is there for comparison; it need not fit what the pruned one must.
            must_fit=role != DENSE,
            mixed_bytes=None if role == DENSE else export.mixed_bytes,
            device=str(find_device(self.config.model.device)),
            dtype=self.config.model.dtype,
            n_threads=self.threads,
            progress=progress,
        )

    def answers(self, output: Path, progress: Progress) -> None:
        path, longest = output / ANSWERS_FILE, self.config.evaluate.max_new_tokens
        before = read_record(Answers, path) if path.is_file() else Answers(self.prompts, {}, {})
        artifacts = self.artifacts()
        kept = [one.name for one in artifacts if one.name in before.answers]
        answers = {name: before.answers[name] for name in kept}
        reasons = {name: before.reasons[name] for name in kept}
        for artifact in (one for one in artifacts if one.name not in kept):
            family, root = family_of(artifact.item), str(artifact.root)
            with contextlib.closing(family.open_model(root, _ANSWER_CONTEXT, self.threads, None)) as model:
                said = tuple(answer(model, self.prompts, max_new_tokens=longest))
                answers[artifact.name] = said
                reasons[artifact.name] = reasons_of(said, self.prompts, model.tokenizer)
            progress("asking the files", len(answers), len(artifacts))
        write_record(path, Answers(self.prompts, answers, reasons))

    def bench(
        self,
        place: str,
        disturbed: Callable[[Sequence[BenchRecord]], Collection[int]],
        output: Path,
        progress: Progress,
    ) -> None:
        """All of them in turns at a place; records name them without folders, as the release may move.

        A place that cannot be reached is no reason to lose all else: its rows are recorded as failed, and the next run
        measures those that are missing, and which of them were `disturbed`. New files take turns by themselves.
        """
        file, config = output / BENCH_FILE, self.config.bench
        wanted = config.measured(self.config.quantize.names)
        # Dense and what ships take turns.
        names = {str(a.path): a.name for a in self.artifacts() if a.item in wanted}
        before = read_jsonl(file) if file.is_file() else []
        before = [one for one in before if one.is_anchor or one.model_filename in names.values()]
        slowed = disturbed(before)
        done = [one for row, one in enumerate(before) if is_measured(one) and row not in slowed]
        known = {one.model_filename for one in before}
        old = {path: name for path, name in names.items() if name in known}
        new = {path: name for path, name in names.items() if name not in known}
        settings = config.settings(self.config.seed)
        target: Target
        try:
            target = open_target(place)
        except PhonereadyError as error:
            target = Unreachable(place, str(error))
        records: list[BenchRecord] = []
        for part in filter(None, [names] if config.anchor else [old, new]):
            records += bench_named(part, config, settings, target, progress, done, file)
        write_jsonl(file, records)

    def bench_records(self, place: str) -> list[BenchRecord]:
        """What was measured at a place, the anchor's rows among it."""
        stage = decide_stage(place) if self.config.speed_budgets(place) else bench_stage(place)
        return read_jsonl(stage_folder(self.folder, stage) / BENCH_FILE)

    def _load(self, stage: str, progress: Progress) -> LoadedModel:
        return load_stage(self.checkpoint(stage), self.config.model, progress)

    def windows(self, stage: str) -> Calibration:
        """The calibration windows, (nsamples, seqlen), in the ids of a stage's model."""
        return read_windows(stage_folder(self.folder, stage) / CALIBRATION_FILE)


def bench_named(
    names: Mapping[str, str],
    config: BenchConfig,
    settings: BenchSettings,
    target: Target,
    progress: Progress,
    done: Sequence[BenchRecord] = (),
    kept: Path | None = None,
) -> list[BenchRecord]:
    """Measure files in turns with each other and the anchor, if there is one; rows are added to `kept` at once."""
    anchor = Path(config.anchor) if config.anchor else None
    known = {**names, **({str(anchor): f"anchor {anchor.name}"} if anchor else {})}
    paths = {name: path for path, name in known.items()}
    done = [
        replace(one, model_filename=paths[one.model_filename]) for one in done if one.model_filename in paths
    ]

    def keep(record: BenchRecord) -> None:
        if kept is not None and record not in done:
            append_jsonl(kept, [replace(record, model_filename=known[record.model_filename])])

    records = run_bench(
        [Path(path) for path in names],
        settings,
        progress,
        target=target,
        anchor=anchor,
        on_record=keep,
        done=done,
    )
    return [replace(record, model_filename=known[record.model_filename]) for record in records]


def load_stage(checkpoint: Path, model: ModelConfig, progress: Progress) -> LoadedModel:
    """A stage's checkpoint, with the origin of the model that it was made from."""
    device, dtype = find_device(model.device), model.dtype
    loaded = load_model(checkpoint, device=device, dtype=dtype, may_stream=True, progress=progress)
    return replace(loaded, source=read_checkpoint_info(checkpoint).source)


def run_recovery(
    checkpoint: Path,
    output: Path,
    how: RecoverConfig,
    seed: int,
    *,
    teacher: Path | None,
    work: Path,
    device: str,
    progress: Progress,
) -> None:
    from cfsp.recovery.recover import RecoveryJob, recover

    if not (work / "inputs.json").is_file():
        # Killed while it was made or removed: nothing in it can be used.
        shutil.rmtree(work, ignore_errors=True)
    recover(
        RecoveryJob(
            str(checkpoint),
            output,
            how.settings(seed),
            how.data,
            how.validation,
            teacher=None if teacher is None else str(teacher),
            work=work,
            device=device,
            force=True,
        ),
        writers=WRITERS,
        rounding=ROUNDING,
        progress=progress,
    )


def remove_place(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def row_text(record: BenchRecord) -> str:
    aside = f", {record.fallback} did not compute" if record.fallback else ""
    return f"{record.test} {speed_text(record) + aside if record.ok else f'failed: {record.failure}'}"


def fitting_settings(settings: PruneSettings, model: Any, files: Collection[str]) -> PruneSettings:
    """The same width for every block if llama.cpp would pad others; blocks that are unlike already stay so."""
    config, widths = model.config, set(model_shape(model).ffn_widths)
    tied, layouts = config.tie_word_embeddings, spec_for(config).layouts
    held = any(layout.per_layer_sizes and (tied or layout.untied) for layout in layouts)
    if held or len(widths) > 1 or not makes_gguf(files):
        return settings
    if settings.prune_ratio and not settings.uniform_width:
        _warn_once(
            f"llama.cpp has no architecture for a {config.model_type} model with a width for each block: all get the "
            "same (--set uniform_width=true)"
        )
    return replace(settings, uniform_width=True)


_warn_once = functools.cache(_log.warning)


def shape_check(settings: PruneSettings, model: Any, files: Collection[str]) -> Callable[[ModelShape], None]:
    """What refuses a shape that llama.cpp has no architecture for, if a GGUF file is to be made of it."""
    if not (files and makes_gguf(files)):
        return lambda shape: None
    with LargeScratch("config") as scratch:
        model.config.save_pretrained(scratch.path)
        config = read_config(scratch.path).with_shape(model_shape(model))
    stored = frozenset(model.state_dict())

    def check(shape: ModelShape) -> None:
        try:
            choose_layout(config.with_shape(shape), stored)
        except InputError as error:
            raise InputError(f"what is left is not for the file that is to be made of it: {error}") from error

    if settings.attentions:
        check(config.shape.without(attentions=[len(config.shape.blocks) - 1]))
    return check
