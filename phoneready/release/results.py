"""What the stages of a release found, the figures that budgets are held against, more rounds if one is left open."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cfsp.errors import InputError, PhonereadyError
from cfsp.models.checkpoint import PLAN_FILE, read_checkpoint_info
from cfsp.models.source import ModelSource
from cfsp.progress import Progress
from cfsp.pruning.plan import PruningPlan
from cfsp.records import read_record
from cfsp.recovery.recovery_record import RECOVERY_FILE, RecoveryRecord
from cfsp.units import format_bytes
from exporters.export_record import ExportManifest, ExportRecord
from phoneready.evaluation.evaluation_record import Evaluation, ModelIdentity, degeneration_of
from phoneready.evaluation.figures import evaluation_figures
from phoneready.evaluation.measured_file import Standing, standing
from phoneready.figures.bench_figures import bench_figures
from phoneready.figures.figures import (
    CHECKPOINT,
    DENSE,
    ENERGY_OF,
    INCONCLUSIVE,
    SHIPPED,
    BudgetConfig,
    Figure,
    FigureKey,
    FigureSet,
    metric_of,
    select,
)
from phoneready.figures.gate import differing, judge
from phoneready.release.stages import RECORD_FILE, stage_folder
from phoneready.release.steps import (
    ANSWERS_FILE,
    BENCH_FILE,
    EVALUATION_FILE,
    RECOVERY_STAGE,
    SIDE_BY_SIDE_FILE,
    Answers,
    Artifact,
    FileLosses,
    SideBySide,
    Steps,
    bench_named,
    bench_stage,
    decide_stage,
    export_stage,
    is_measured,
    row_text,
)
from phoneready.settings.schema import ReleaseConfig
from runtime_bench.devices import Band, find_profile, load_profiles, project
from runtime_bench.measuring.measure import with_more
from runtime_bench.records.bench_record import BenchRecord, MeasuredOn
from runtime_bench.records.fairness import has_speed, noise
from runtime_bench.records.jsonl import read_jsonl, write_jsonl
from runtime_bench.targets import Target
from runtime_bench.targets.table import open_target

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReleaseFigures:
    """What the stages of a release found out; `losses` of all files on the same windows, if a text was named.

    Of a whole model there is no plan, nothing of a dense one beside it, and its evaluation is by itself.
    """

    source: ModelSource
    plan: PruningPlan | None
    evaluation: Evaluation
    dense: tuple[ExportRecord, ...]
    shipped: tuple[ExportRecord, ...]
    answers: Answers
    bench: tuple[BenchRecord, ...]
    losses: tuple[FileLosses, ...] = ()

    def __post_init__(self) -> None:
        files = {record.file for record in (*self.dense, *self.shipped)}
        unpaired = {record.quant for record in self.shipped} - {record.quant for record in self.dense}
        for what, lacking in (
            ("the record of what ships has no", set() if self.shipped else {"exports"}),
            ("the dense model has no", unpaired if self.plan else set()),
            (f"{ANSWERS_FILE} has no answers of", files - self.answers.answers.keys()),
        ):
            if lacking:
                raise InputError(f"the release's records do not fit: {what} {', '.join(sorted(lacking))}")

    @functools.cached_property
    def standings(self) -> Mapping[str, Standing]:
        """How every file stands to those of its family that are no larger, by its name."""
        return {
            one.file: standing(one, [other for other in self.losses if other.family == one.family])
            for one in self.losses
        }

    def losses_of(self, file: str | None) -> FileLosses | None:
        return next((one for one in self.losses if one.file == file), None)

    @property
    def pairs(self) -> tuple[tuple[ExportRecord, ExportRecord], ...]:
        """(dense, shipped) of each quantization and variant, if there is a dense model beside."""
        dense = {record.quant: record for record in self.dense}
        return tuple((dense[record.quant], record) for record in self.shipped if dense)

    @property
    def word(self) -> str:
        """What the model that ships is, beside the dense one; nothing if it is whole."""
        if self.plan is None:
            return ""
        return "trained" if self.plan.keeps_blocks and not self.plan.vocabulary else "pruned"


def read_figures(config: ReleaseConfig, folder: Path) -> ReleaseFigures:
    steps = Steps(config, folder, None)
    exports: dict[str, tuple[ExportRecord, ...]] = {DENSE: ()}
    for role in steps.roles:
        made = stage_folder(folder, export_stage(role))
        manifests = [
            read_record(ExportManifest, made / kind / "export.json") for kind in config.quantize.formats
        ]
        records = [record for manifest in manifests for record in manifest.exports]
        # They call the files as the release does.
        exports[role] = tuple(replace(one, file=steps.artifact(role, one.quant).name) for one in records)
    bench = [record for place in config.bench.targets for record in steps.bench_records(place)]
    return ReleaseFigures(
        source=read_checkpoint_info(stage_folder(folder, "dense") / "model").source,
        plan=None if config.is_whole else read_record(PruningPlan, steps.checkpoint("prune") / PLAN_FILE),
        evaluation=read_record(Evaluation, stage_folder(folder, "evaluate") / EVALUATION_FILE),
        dense=exports[DENSE],
        shipped=exports[SHIPPED],
        answers=read_record(Answers, stage_folder(folder, "answers") / ANSWERS_FILE),
        bench=tuple(record for record in bench if not record.is_anchor),
        losses=steps.losses(),
    )


def stage_figures(folder: Path, name: str) -> str:
    """The figures that a finished stage has found, in a few words; nothing if it has none."""
    output, kind = stage_folder(folder, name), name.partition("-")[0]
    if name == "prune":
        return read_record(PruningPlan, output / "model" / PLAN_FILE).removed
    if name == RECOVERY_STAGE:
        record = read_record(RecoveryRecord, output / "model" / RECOVERY_FILE)
        return "; ".join(filter(None, (f"validation {record.change}", record.shortcoming)))
    if name == "side-by-side":
        files = read_record(SideBySide, output / SIDE_BY_SIDE_FILE).files
        return "bits per byte " + ", ".join(f"{one.label} {one.bits_per_byte:.4f}" for one in files)
    if kind == "export":
        manifests = [read_record(ExportManifest, path) for path in sorted(output.glob("*/export.json"))]
        return ", ".join(f"{r.quant} {format_bytes(r.file_bytes)}" for m in manifests for r in m.exports)
    if kind in ("bench", "decide"):
        rows = [row for row in read_jsonl(output / BENCH_FILE) if row.workload == "tg" or not row.ok]
        return "; ".join(f"{row.model_filename} {row_text(row)}" for row in rows)
    parts = []
    for path in sorted(output.glob("*.json")) if kind == "evaluate" else ():
        if path.name == RECORD_FILE:
            continue
        evaluation = read_record(Evaluation, path)
        for text in evaluation.texts:
            of = f"{evaluation.model.reference} on {text.kind}"
            if text.against and text.distance:
                ratio = text.perplexity / text.against.perplexity
                parts.append(f"{of}: perplexity {ratio:.3f} x dense, KL {text.distance.kl_mean:.3f}")
            elif text.against:
                ratio = text.bits_per_byte / text.against.bits_per_byte
                parts.append(f"{of}: bits per byte {ratio:.4f} x dense")
    return "; ".join(parts)


def collect_figures(config: ReleaseConfig, folder: Path, release: ReleaseFigures) -> FigureSet:
    """Every figure of `planned_figures`, and those of the dense model that there are."""
    steps = Steps(config, folder, None)
    exports = [*((SHIPPED, one) for one in release.shipped), *((DENSE, one) for one in release.dense)]
    items = {record.file: (role, record.quant) for role, record in exports}
    figures = [
        Figure(FigureKey("file_bytes", record.quant), role, record.file, "bytes", record.file_bytes)
        for role, record in exports
    ]
    for place in config.bench.targets:
        figures += bench_figures(
            place, steps.bench_records(place), items, any_threads=not config.bench.n_threads
        )
    # What a GGUF file would need, and how fast it would be, on every device of the configuration.
    profiles, projected = load_profiles(), config.bench.measured(config.quantize.projected)
    for artifact in steps.artifacts() if config.bench.devices else ():
        if artifact.item not in projected:
            continue
        facts = artifact.facts
        context = min(config.bench.n_ctx, facts.context_length)
        for device in config.bench.devices:
            found = project(find_profile(device, profiles).profile, facts, context)
            memory = Band(found.memory.total, found.memory.total)
            bands = {"memory_bytes": memory, "tg": found.decode, "pp": found.prefill}
            for name, band in bands.items():
                metric = f"projected_{name}"
                figure = Figure(
                    FigureKey(metric, artifact.item, device), artifact.role, artifact.name, metric_of(metric).unit,
                    None, kind="projected", target=device, failure="; ".join(found.assumptions),
                    conditions={"n_ctx": str(context)},
                )  # fmt: skip
                if band is not None:
                    middle = math.sqrt(band.low * band.high)
                    figure = replace(figure, value=middle, low=band.low, high=band.high, failure=None)
                figures.append(figure)
    figures += evaluation_figures(CHECKPOINT, CHECKPOINT, release.evaluation)
    for artifact in (one for one in steps.artifacts() if one.role == SHIPPED):
        figures += evaluation_figures(
            artifact.item, artifact.name, _of_file(config, folder, release, artifact)
        )
    return FigureSet(release.source.reference, release.source.sha256, config.seed, tuple(figures))


def _of_file(config: ReleaseConfig, folder: Path, release: ReleaseFigures, artifact: Artifact) -> Evaluation:
    """A file that ships as three stages judged it: its texts, its answers, and if asked for tasks and own metrics."""
    losses, asked = release.losses_of(artifact.name), release.answers
    dense = next((one.file for one in release.dense if one.quant == artifact.item), "")
    reasons = [asked.reasons[name] for name in (artifact.name, dense) if name]
    path = stage_folder(folder, "evaluate-files") / f"{artifact.item}.json"
    done, of = None, release.evaluation
    if config.evaluate.judges_files and artifact.item in config.evaluate.files:
        done = read_record(Evaluation, path)
    return Evaluation(
        model=ModelIdentity(artifact.name),
        against=ModelIdentity(release.source.reference),
        seed=config.seed,
        texts=losses.texts if losses else (),
        prompts=asked.prompts,
        answers=asked.answers[artifact.name],
        against_answers=asked.answers.get(dense, ()),
        degeneration=degeneration_of(asked.prompts, config.evaluate.max_new_tokens, *reasons),
        tasks=done.tasks if done else (),
        against_tasks=(of.tasks if config.is_whole else of.against_tasks) if done else (),
        metrics=done.metrics if done else (),
    )


LOOKS = 5
"""Looking again until something is decided errs more often than looking once. So each look is after twice the rounds of
the one before, and surer in proportion (Bonferroni). `benchmarks/measuring_on.py` simulates it."""
_Turns = tuple[int, ...]
"""Places in the records of rows that take turns."""


def measure_on(
    steps: Steps, place: str, baseline: FigureSet | None, output: Path, progress: Progress
) -> None:
    """Write the records of a place, with more rounds of those that a budget on speeds leaves open.

    What an earlier run has added to the same rows counts, and so do its looks.
    """
    file, limit = output / BENCH_FILE, steps.config.bench.decide_s
    records, _ = _continued(read_jsonl(stage_folder(steps.folder, bench_stage(place)) / BENCH_FILE), file)
    for row in {row for turns, _ in _speeds(steps, place, baseline, records) for row in turns}:
        before = records[row].measured_on or MeasuredOn(1)
        records[row] = replace(records[row], measured_on=MeasuredOn(before.looks + LOOKS - 1, before.seconds))
    began, failed = time.monotonic(), set[_Turns]()

    def left() -> float:
        return limit - (time.monotonic() - began)

    def told(description: str, done: int, total: int) -> None:
        progress("measuring on for open budgets, seconds", int(limit - max(left(), 0)), max(int(limit), 1))

    def still_open() -> list[_Turns]:
        found = _speeds(steps, place, baseline, records)
        return [turns for turns in dict.fromkeys(t for t, is_open in found if is_open) if turns not in failed]

    try:
        target = open_target(place) if still_open() else None
    except PhonereadyError as error:
        logger.warning("%s: not measured on: %s", place, error)
        target = None
    for _ in range(LOOKS - 1 if target else 0):
        for turns in still_open():
            wanted = 2 * len(set(records[turns[0]].rounds))
            while len(set(records[turns[0]].rounds)) < wanted and left() > 0:
                assert target is not None
                if why := _one_round(steps, target, records, turns, told):
                    logger.warning("%s %s: not measured on: %s", place, records[turns[0]].test, why)
                    failed.add(turns)
                    break
    for row in {row for turns in still_open() for row in turns} if left() <= 0 else ():
        found = records[row].measured_on
        assert found is not None
        records[row] = replace(records[row], measured_on=replace(found, time_over=True))
    write_jsonl(file, records)


def disturbed(
    steps: Steps, place: str, baseline: FigureSet | None, records: Sequence[BenchRecord]
) -> set[int]:
    """Places of the rows that something slowed and that leave a budget open: measured again they may decide it."""
    decided = stage_folder(steps.folder, decide_stage(place)) / BENCH_FILE
    rows, _ = _continued(records, decided)
    found = _limited(steps, place, baseline, rows, steps.config.timed_budgets(place))
    slowed = [turns for turns, is_open, _ in found if is_open and any(noise(rows[row]) for row in turns)]
    return {row for turns in slowed for row in turns}


def bench_settled(steps: Steps, place: str, baseline: FigureSet | None, output: Path) -> bool:
    """Whether no row failed, and none that was disturbed leaves a budget open."""
    records = read_jsonl(output / BENCH_FILE)
    return all(map(is_measured, records)) and not disturbed(steps, place, baseline, records)


def decide_settled(steps: Steps, place: str, baseline: FigureSet | None, output: Path) -> bool:
    """Whether it has the rows that were measured, and more samples can decide nothing."""
    records = read_jsonl(output / BENCH_FILE)
    rows = read_jsonl(stage_folder(steps.folder, bench_stage(place)) / BENCH_FILE)
    is_whole = all(map(is_measured, records)) and _continued(rows, output / BENCH_FILE)[1]
    return is_whole and not any(is_open for _, is_open in _speeds(steps, place, baseline, records))


def _continued(rows: Sequence[BenchRecord], file: Path) -> tuple[list[BenchRecord], bool]:
    """Rows, each with what was added to it in another file, if that is there; whether that has the same ones."""
    longer = read_jsonl(file) if file.is_file() else []

    def begins(one: BenchRecord, row: BenchRecord) -> bool:
        same = ("session", "model_filename", "test", "n_threads", "failure")
        is_same = all(getattr(one, name) == getattr(row, name) for name in same)
        return is_same and one.samples_ns[: len(row.samples_ns)] == row.samples_ns

    found = [next((one for one in longer if begins(one, row)), None) for row in rows]
    is_same = None not in found and len(rows) == len(longer)
    return [one or row for one, row in zip(found, rows, strict=True)], is_same


def _speeds(
    steps: Steps, place: str, baseline: FigureSet | None, records: Sequence[BenchRecord]
) -> list[tuple[_Turns, bool]]:
    """Of each figure that a budget on speeds limits: the rows that take turns, whether more samples can decide it."""
    found = _limited(steps, place, baseline, records, steps.config.speed_budgets(place))
    return [(turns, is_open and can_tell) for turns, is_open, can_tell in found]


def _limited(
    steps: Steps,
    place: str,
    baseline: FigureSet | None,
    records: Sequence[BenchRecord],
    budgets: Sequence[BudgetConfig],
) -> Iterator[tuple[_Turns, bool, bool]]:
    """Of each figure that a budget limits: the rows that take turns, whether it is open, whether samples can tell.

    Dense and what ships take turns, and beside an anchor all files do.
    """
    config, items = steps.config, {a.name: (a.role, a.item) for a in steps.artifacts()}
    figures = FigureSet(
        "", None, 0, tuple(bench_figures(place, records, items, any_threads=not config.bench.n_threads))
    )
    ours = figures.by_key(SHIPPED)
    references = {"dense": figures.by_key(DENSE), "baseline": baseline.by_key(SHIPPED) if baseline else {}}
    for budget in budgets:
        for key in select(budget, ours):
            turns = tuple(
                row
                for row, one in enumerate(records)
                if one.test == key.metric.removeprefix(ENERGY_OF)
                and key.n_threads in (None, one.n_threads)
                and (config.bench.anchor or items[one.model_filename][1] == key.item)
            )
            figure, reference = ours[key], references.get(budget.relative_to or "", {}).get(key)
            verdict = judge(budget, figure, reference)
            can_tell = (
                figure.value is not None
                and all(has_speed(records[row]) for row in turns)
                and (
                    budget.relative_to is None
                    or (
                        reference is not None and bool(reference.samples) and not differing(figure, reference)
                    )
                )
            )
            yield turns, verdict.outcome == INCONCLUSIVE, can_tell


def _one_round(
    steps: Steps, target: Target, records: list[BenchRecord], turns: _Turns, progress: Progress
) -> str | None:
    """Add a round's samples to the rows, none if something slowed one of them; why, if one failed."""
    began, bench, rows = time.monotonic(), steps.config.bench, [records[row] for row in turns]
    timed, threads = rows[0].timed, rows[0].n_threads
    sizes: dict[str, Any] = {"n_prompt": (), "n_gen": (), "ttft": (), "load": timed.kind == "load"}
    field = {"pp": "n_prompt", "tg": "n_gen", "ttft": "ttft"}.get(timed.kind)
    if field is not None:
        sizes[field] = (timed.n_gen if timed.kind == "tg" else timed.n_prompt,)
    settings = replace(
        bench.settings(steps.config.seed),
        n_threads=(threads,),
        repetitions=1 if timed.opens else bench.samples_per_process,
        check_text=False,
        spread_limit=1e9,  # every sample counts
        **sizes,
    )
    files = {a.name: a.path for a in steps.artifacts()} | {
        one.model_filename: Path(str(bench.anchor)) for one in rows if one.is_anchor
    }
    names = {str(files[one.model_filename]): one.model_filename for one in rows if not one.is_anchor}
    try:
        more = bench_named(names, bench, settings, target, progress)
        why = next((one.failure for one in more if not one.ok), None)
    except PhonereadyError as error:
        more, why = [], str(error)
    if why is not None:
        return why
    offset = 1 + max(number for one in rows for number in one.sequence)
    longer = [with_more(row, added, offset) for row, added in zip(rows, more, strict=True)]
    if not all(map(has_speed, longer)):
        logger.info("%s %s: something slowed a round, which does not count", target.name, timed.test)
        return None
    for place, row in zip(turns, longer, strict=True):
        found = row.measured_on or MeasuredOn(LOOKS)
        seconds = round(found.seconds + time.monotonic() - began, 3)
        records[place] = replace(row, measured_on=replace(found, seconds=seconds))
    return None
