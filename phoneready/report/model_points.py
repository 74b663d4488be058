"""Size, speed and quality of models, one point a model, from benchmark records and evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cfsp.errors import InputError
from exporters.onnx.family import ONNX
from phoneready.evaluation.evaluation_record import Evaluation
from runtime_bench.presentation.record_table import best_threads
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.engine_settings import EngineSettings
from runtime_bench.records.fairness import has_speed
from runtime_bench.records.notes import note_of

_RATES = ("tg", "pp", "ttft", "start", "load")
"""Workloads in the order in which they say most about a chat on a phone."""


@dataclass(frozen=True)
class Quality:
    """One figure of several models, on the same text.

    Attributes:
        name: Of the figure; lower is better.
        values: Hash of a model's file, or folder of an ONNX variant, and the type of a quantized cache -> the figure.
    """

    name: str
    values: Mapping[tuple[str | None, str | None], float]

    def find(self, record: BenchRecord) -> float | None:
        """The figure of the file that a record is of, with the record's cache."""
        folders = (str(parent) for parent in Path(record.model_filename).absolute().parents[:2])
        keys = ((name, record.quantized_cache) for name in (record.file_sha256, *folders))
        return next((self.values[key] for key in keys if key in self.values), None)


@dataclass(frozen=True)
class ModelPoint:
    """A model: its row at the number of threads that is fastest for it, and its quality where that is known."""

    record: BenchRecord
    quality: float | None


@dataclass(frozen=True)
class PointGroup:
    """Models that were measured in one kind, on one target and processor, with one cache; only these are set side by
    side.

    Attributes:
        kind: How the numbers came about.
        target: Where they ran, and with which quantized cache.
        test: What was timed.
        points: In the order measured.
        left_out: Models without a speed, and why.
        records: All that was measured.
    """

    kind: str
    target: str
    test: str
    points: tuple[ModelPoint, ...]
    left_out: tuple[tuple[str, str], ...]
    records: tuple[BenchRecord, ...] = ()


def quality_of(evaluations: Sequence[Evaluation]) -> Quality | None:
    """The figure that all evaluations have: the divergence from the reference model, else perplexity.

    Raises:
        InputError: An evaluation without text, of a model without hash, twice of one model, or evaluations on
            different texts or against different models.
    """
    if not evaluations:
        return None
    if without := [evaluation.model.reference for evaluation in evaluations if not evaluation.texts]:
        raise InputError(f"the evaluation of {without[0]} has no text")
    texts = [evaluation.texts[0] for evaluation in evaluations]
    conditions = {(text.windows_sha256, text.seqlen) for text in texts}
    if len(conditions) > 1:
        raise InputError(
            "the evaluations are on different texts or windows, their figures say nothing together"
        )
    diverge = all(text.divergence for text in texts) and len({_reference(e) for e in evaluations}) == 1
    values = [text.divergence.kl_mean if diverge and text.divergence else text.perplexity for text in texts]
    what = f"mean KL divergence from {_reference(evaluations[0])}, nats" if diverge else "perplexity"
    by_model = _by_model(evaluations, values)
    return Quality(f"{what}, on {Path(texts[0].source).name}", by_model)


def _by_model(
    evaluations: Sequence[Evaluation], values: Sequence[float]
) -> dict[tuple[str | None, str | None], float]:
    """The figure of every model by the hash of its file, of ONNX folders also by its path."""
    value_of: dict[tuple[str | None, str | None], float] = {}
    for evaluation, value in zip(evaluations, values, strict=True):
        model = evaluation.model
        if model.sha256 is None:
            raise InputError(f"the evaluation of {model.reference} has no hash of its file")
        cache = EngineSettings(model.cache_type).quantized_cache
        if (model.sha256, cache) in value_of:
            raise InputError(f"several evaluations are of {model.reference}")
        value_of[model.sha256, cache] = value
        if model.runtime == ONNX.runtime:
            value_of[str(Path(model.reference).absolute()), cache] = value
    return value_of


def point_groups(records: Sequence[BenchRecord], quality: Quality | None) -> list[PointGroup]:
    """Models by where they were measured, in order of appearance.

    Raises:
        InputError: An evaluation of a model that no record is of.
    """
    places: dict[tuple[str, str, str | None], list[BenchRecord]] = {}
    for record in records:
        cache = f", cache of {record.quantized_cache}" if record.quantized_cache else ""
        places.setdefault((record.kind, record.target + cache, record.cpu_info), []).append(record)
    if quality is not None and not any(quality.find(record) is not None for record in records):
        raise InputError(
            "the evaluations are of other files than the records",
            allowed="`phoneready eval FILE` of what was measured",
        )
    return [_group(kind, target, rows, quality) for (kind, target, _), rows in places.items()]


def _group(kind: str, target: str, records: Sequence[BenchRecord], quality: Quality | None) -> PointGroup:
    test = _main_test(records)
    models: dict[tuple[str, str], list[BenchRecord]] = {}
    for record in records:
        models.setdefault((record.model_filename, record.engine), []).append(record)
    points, left_out = [], []
    for (file, _), rows in models.items():
        best = best_threads([row for row in rows if row.test == test])
        if best is None or best.file_size_bytes is None:
            left_out.append((file, _why(rows, test)))
        else:
            points.append(ModelPoint(best, quality.find(best) if quality else None))
    return PointGroup(kind, target, test, tuple(points), tuple(left_out), tuple(records))


def _main_test(records: Sequence[BenchRecord]) -> str:
    """The test that says most, of those that most models have."""
    by_test: dict[str, set[str]] = {}
    for record in records:
        by_test.setdefault(record.test, set()).add(record.model_filename)
    kinds = {record.test: _RATES.index(record.workload) for record in records}
    return min(by_test, key=lambda test: (-len(by_test[test]), kinds[test]))


def _why(rows: Sequence[BenchRecord], test: str) -> str:
    reasons = [row.failure or note_of(row) for row in rows if row.test == test and not has_speed(row)]
    return next((reason for reason in reasons if reason), f"{test} was not measured")


def _reference(evaluation: Evaluation) -> str | None:
    return evaluation.against.reference if evaluation.against else None
