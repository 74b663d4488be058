"""Choose points, evaluate them, and keep the record; a search that was killed goes on."""

from __future__ import annotations

import shutil
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from cfsp.devices import find_device
from cfsp.errors import InconclusiveError, InputError, LimitError
from cfsp.files import no_space_as_input_error, write_text
from cfsp.models.architectures import model_shape
from cfsp.progress import Progress, no_progress
from cfsp.records import write_record
from cfsp.recovery.data import check_readable
from cfsp.units import format_bytes, megabytes
from exporters.export_record import ExportManifest
from exporters.families import GGUF
from exporters.job import MANIFEST_FILE
from phoneready.evaluation.measured_file import DOMINATED, standing
from phoneready.evaluation.run import check_texts
from phoneready.evaluation.settings import EvaluationSettings
from phoneready.figures.figures import INCONCLUSIVE, MISSED, PASS
from phoneready.release.stages import claim_folder, stage_folder
from phoneready.release.steps import CALIBRATION_FILE
from phoneready.room import check_room, drawing_needs
from phoneready.search.evaluate import Evaluator
from phoneready.search.point import STEP, Point, SearchSettings
from phoneready.search.predict import Predictor
from phoneready.search.record import EvaluatedPoint, SearchRecord, format_search, outcome_of
from phoneready.settings.schema import ReleaseConfig

RESULT_FILE, TABLE_FILE, PLOT_FILE = "search.json", "search.md", "search.html"
_LOCK = ".search.lock"
_GRID = 24
"""Vocabularies, and sizes, among which a prediction chooses."""
_NEAR = 0.1
"""Vocabularies, or sizes, that differ by less are one."""
_PROBES, _FILES = 5, 5
"""Most vocabularies that are judged in float32, and files that are made, of a refined search."""
_CANNOT_WIN = 1.5
"""Times the best prediction: what is predicted to lose more is not made."""
_PASSES = 25.0
"""Times that a model reads the text that a file is rounded for, in the time that the file takes: measured on
SmolLM2-135M, two cores."""
_CLEAR = 0.9
"""Of a limit on quality: what a file is made for, as predictions are off."""


def search(
    base: ReleaseConfig,
    settings: SearchSettings,
    folder: Path,
    *,
    show: Callable[[str], None] = lambda line: None,
    progress: Progress = no_progress,
    threads: int | None = None,
) -> SearchRecord:
    """Evaluate points; search.json and search.md are written after every file.

    A search that is in the folder already goes on. `base` is a release without limits, whose model, text and rounding
    all files have; `threads` are those outside torch. Raises InputError for what cannot be used, before anything is
    written, MissingExtraError, and LimitError if no file could be measured.
    """
    GGUF.require()
    check_texts(EvaluationSettings(text=settings.text, chats=settings.chats))
    check_readable((*base.prune.calibration, *settings.text, *settings.chats))
    if not (folder / RESULT_FILE).exists():
        check_room(
            "search", (base.model.reference,), drawing_needs, folder, device=find_device(base.model.device),
            kept=base.model.dtype, progress=progress,
        )  # fmt: skip
    with claim_folder(folder, _LOCK, "search"), no_space_as_input_error(folder):
        evaluator = Evaluator(base, settings, folder, threads, progress)
        evaluator.begin()
        if not settings.refines:
            settings = evaluator.settings = settings.settled(evaluator.vocabulary)
        _check_size(evaluator)
        run = _Run(evaluator, folder, show)
        count = _FILES if settings.refines else len([*settings.points()])
        show(_forecast(evaluator, min(count, settings.max_points)))
        for point in _refined(run) if settings.refines else _combined(run):
            run.evaluate(point)
        result = run.finish()
        for stage in (folder / "stages").iterdir():
            if not stage.name.startswith(("point-", "bench-", "texts", "probe-", "types")):
                shutil.rmtree(stage)
    if not result.points:
        raise LimitError(f"no file could be measured: {'; '.join((*result.failed, *result.left_out))}")
    return result


def _forecast(evaluator: Evaluator, count: int) -> str:
    """How long files take and what they need on the disk, by what the dense model takes to read a window."""
    began, base = time.monotonic(), evaluator.base
    (_, text), *_ = evaluator.texts
    for window in text.ids[:2]:
        for _ in evaluator.dense.next_token_logits(window):
            pass
    passes = (time.monotonic() - began) / text.ids[:2].numel()
    tokens = base.prune.seqlen * min(
        base.prune.nsamples, base.quantize.rounding_windows or base.prune.nsamples
    )
    minutes = _PASSES * passes * tokens / 60
    saved = sum(
        path.stat().st_size for path in stage_folder(evaluator.folder, "dense").rglob("*") if path.is_file()
    )
    weights = sum(parameter.numel() for parameter in evaluator.loaded.model.parameters())
    disk = format_bytes(2 * saved + 5 * weights)
    return (
        f"up to {count} files of about {max(minutes, 0.1):.1f} min each, {disk} of disk while they are made"
    )


def _check_size(evaluator: Evaluator) -> None:
    """Raise InputError for a vocabulary that cannot be, and if all files would be larger than the limit."""
    settings = evaluator.settings
    for size in settings.vocabularies:
        _ = evaluator.uncounted(size) if size else None
    if settings.max_size is None:
        return
    # Which tokens stay, only text can say: of as many the shortest are counted, in their merges too.
    shape, whole = model_shape(evaluator.loaded.model), evaluator.vocabulary
    longer, fewest, least = 0, None, []
    if settings.refines or any(settings.vocabularies):
        fewest = evaluator.uncounted(evaluator.fewest)
        lengths = {
            index: len(token.encode()) for token, index in evaluator.loaded.tokenizer.get_vocab().items()
        }
        kept = [lengths[index] for index in fewest.kept if index in lengths]
        longer = 2 * (sum(kept) - sum(sorted(lengths.values())[: len(kept)]))
    ratio = max(settings.ratios)
    for quant in settings.quants or ("mixed:1GB",):
        cut, step = shape, GGUF.find(quant).width_multiple
        if ratio:  # widths are rounded: with one step less, no file is smaller
            cut = shape.with_ffn_widths(
                [max(step, int(w * (1 - ratio) // step * step)) for w in shape.ffn_widths]
            )
        dense = fewest is None and not ratio
        least.append(evaluator.sizes.least_bytes(quant, cut, fewest, dense=dense) - longer)
    if min(least) > settings.max_size:
        tokens = f"{evaluator.fewest} of {whole} tokens" if fewest else "all tokens"
        raise InputError(
            f"no candidate fits: with {tokens} the smallest takes {min(least)} bytes",
            field="--max-size",
            value=megabytes(settings.max_size),
            allowed=f"more than {min(least)} bytes (less with fewer --vocabularies, or --quants of fewer bits)",
        )


def _combined(run: _Run) -> Iterator[Point]:
    """Every combination that was asked for, but for what its size or its prediction rules out."""
    evaluator, shape = run.evaluator, model_shape(run.evaluator.loaded.model)
    limit = evaluator.settings.max_size
    for point in evaluator.settings.points():
        kept = evaluator.uncounted(point.vocabulary) if point.vocabulary else None
        if limit is not None and not point.ratio:
            size = evaluator.sizes.least_bytes(point.quant, shape, kept, dense=point.is_dense)
            if size > 1.02 * limit:  # of other tokens of that number
                run.left_out[point] = f"{megabytes(size)} are over the limit"
                continue
        yield point


def _refined(run: _Run) -> Iterator[Point]:
    """Mixtures of types, with the tokens and in the size that predictions choose until none of them would win."""
    evaluator, settings = run.evaluator, run.evaluator.settings
    predictor, whole = evaluator.predictor(), run.evaluator.vocabulary
    steps = {
        whole,
        *(int(evaluator.fewest * (whole / evaluator.fewest) ** (n / _GRID)) for n in range(_GRID)),
    }
    grid = sorted({min(whole, -(-n // STEP) * STEP) for n in steps})
    made: dict[tuple[int, int], EvaluatedPoint] = {}

    def near(tokens: int, others: Iterable[int]) -> bool:
        return any(abs(one / tokens - 1) < _NEAR for one in others)

    def probe(tokens: int) -> None:
        predictor.trimmed[tokens] = evaluator.probe(tokens)
        lost = predictor.trimmed[tokens]
        run.show(f"{tokens} tokens, float32: KL {lost.kl:.4f}")

    def candidates() -> list[tuple[float, int, int]]:
        """(what decides, tokens, bytes), the best first: the least loss in a size, or the smallest within limits."""
        found = []
        for tokens in grid:
            if settings.max_size is not None:
                if (lost := predictor.predict(tokens, settings.max_size)) is not None:
                    found.append((lost.nats, tokens, settings.max_size))
            elif (size := _smallest(predictor, tokens, settings.max_kl or 0.0)) is not None:
                found.append((float(size), tokens, size))
        return sorted(found)

    for tokens in [
        one for one in (whole * 2 // 3 // STEP * STEP, whole // 3 // STEP * STEP) if one >= evaluator.fewest
    ]:
        if tokens < whole:
            probe(tokens)
    for _ in range(_PROBES + _FILES):
        ranked = candidates()
        if not ranked or len(made) >= min(_FILES, settings.max_points):
            return
        best, tokens, size = ranked[0]
        if tokens < whole and not near(tokens, predictor.trimmed) and len(predictor.trimmed) < _PROBES:
            probe(tokens)
            continue
        dense = next((one for one in ranked if one[1] == whole), None)
        told = [ranked[0], *([dense] if dense else [])]
        wanted = [one for one in told if not any(near(one[1], [t]) and near(one[2], [s]) for t, s in made)]
        if dense and dense in wanted and dense is not ranked[0] and dense[0] > _CANNOT_WIN * best and made:
            run.left_out[Point(f"mixed:{dense[2]}B")] = "predicted to lose more than the best"
            wanted.remove(dense)
        if not wanted:
            return
        _, tokens, size = wanted[0]
        point = Point(GGUF.find(f"mixed:{size}B").name, 0 if tokens == whole else tokens)
        yield point
        one = run.known.get(point)
        if one is None:
            grid.remove(tokens)
            continue
        made[tokens, size] = one
        predictor.learn(tokens, one.file_bytes, one.kl_mean)


def _smallest(predictor: Predictor, tokens: int, max_kl: float) -> int | None:
    """The size of a mixture that is predicted to lose so much; None if none is."""
    low, high = (sum(each[place].n_bytes for each in predictor.options.values()) for place in (0, -1))
    rest = predictor.overhead(tokens)
    sizes = [rest + int(low * (high / low) ** (n / _GRID)) for n in range(1, _GRID + 1)]

    def met(size: int) -> bool:
        lost = predictor.predict(tokens, size)
        return lost is not None and lost.kl <= _CLEAR * max_kl

    place = bisect_left(sizes, True, key=met)
    return sizes[place] if place < len(sizes) else None


@dataclass
class _Run:
    """What is known so far of a search."""

    evaluator: Evaluator
    folder: Path
    show: Callable[[str], None]
    known: dict[Point, EvaluatedPoint] = field(default_factory=dict)
    left_out: dict[Point, str] = field(default_factory=dict)
    failed: dict[Point, str] = field(default_factory=dict)
    made: int = 0

    def evaluate(self, point: Point) -> None:
        """A point's figures, taken now unless they are known."""
        evaluator, was_known = self.evaluator, self.evaluator.is_known(point)
        if not was_known and self.made >= evaluator.settings.max_points:
            return
        if not was_known:
            self.show(f"{point.label}")
        try:
            one = self.known[point] = evaluator.evaluate(point)
        except (InputError, LimitError) as error:
            self.failed[point] = str(error)
            self.show(f"  {point.label} failed: {error}")
            return
        self.made += not was_known
        self.write()
        self.show(
            f"  {megabytes(one.file_bytes)}, {one.bits_per_byte:.4f} bits per byte, KL {one.kl_mean:.4f}"
        )

    def write(self) -> SearchRecord:
        """Write search.json and search.md; of the files only those stay that may be kept."""
        evaluator, settings = self.evaluator, self.evaluator.settings
        points = sorted(self.known.values(), key=lambda one: (one.file_bytes, one.file))
        held = [evaluator.verdicts(one) for one in points]
        standings = [standing(one, points) for one in points]
        within = [one for one, rows in zip(points, held, strict=True) if outcome_of(rows) == PASS]

        def objective(one: EvaluatedPoint) -> tuple[bool, float, float, str]:
            # Within a limit on what it takes the least loss, else the smallest; what writes nonsense comes last.
            cost, loss = float(one.file_bytes), one.bits_per_byte
            first, second = (loss, cost) if settings.limits_cost else (cost, loss)
            return one.broken is not None, first, second, one.file

        limited = bool(settings.budgets)
        best = min(within, key=objective, default=None) if limited else None
        dense = min((one for one in within if one.is_dense), key=objective, default=None) if limited else None
        wanted = {best.file} if best else set()
        if not limited:
            wanted = {one.file for one in standings if one.verdict != DOMINATED}
        names = {one.file for one in points}
        for path in self.folder.glob("*.gguf"):
            if path.name in names - wanted:
                path.unlink()
        result = SearchRecord(
            base=evaluator.base,
            source_sha256=evaluator.loaded.source.sha256,
            limits=settings.budgets,
            sources=settings.sources,
            place=settings.place or settings.device,
            points=tuple(points),
            held=tuple(held),
            standings=tuple(standings),
            best=best.file if best else None,
            best_dense=dense.file if dense else None,
            left_out=tuple(f"{point.label}: {why}" for point, why in self.left_out.items()),
            failed=tuple(f"{point.label}: {why}" for point, why in self.failed.items()),
            kept=tuple(one.file for one in points if one.file in wanted),
        )
        write_record(self.folder / RESULT_FILE, result)
        write_text(self.folder / TABLE_FILE, format_search(result))
        return result

    def finish(self) -> SearchRecord:
        """The record, with the files that it names in the folder, as they were measured, and all that made them."""
        while True:
            result = self.write()
            gone = [one for one in map(result.find, result.kept) if one and not self.evaluator.is_here(one)]
            if not gone:
                break
            for one in gone:
                self.show(f"{one.label} is made again")
                self.known[one.point] = self.evaluator.evaluate(self.evaluator.make_again(one).point)
        kept = [one for one in map(result.find, result.kept) if one]
        exports = tuple(replace(one.export, file=one.file) for one in kept)
        write_record(self.folder / MANIFEST_FILE, ExportManifest(exports))
        shutil.copyfile(stage_folder(self.folder, "dense") / CALIBRATION_FILE, self.folder / CALIBRATION_FILE)
        return result


def check_search(found: SearchRecord) -> None:
    """Raise what the gate would if no file is within all limits."""
    limits = ", ".join(f"{one.metric} {one.describe()}" for one in found.limits)
    if found.outcome == MISSED:
        raise LimitError(f"no file is within {limits}")
    if found.outcome == INCONCLUSIVE:
        raise InconclusiveError(f"whether a file is within {limits} cannot be told from its samples")
