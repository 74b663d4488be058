"""The figures of a finished release, from what its stages left."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from phoneready.evaluation.figures import evaluation_figures
from phoneready.figures.figures import (
    DENSE,
    ENERGY_OF,
    METRICS,
    PRUNED,
    Figure,
    FigureKey,
    FigureSet,
    measured_place,
    metric_of,
)
from phoneready.release.results import ReleaseFigures
from phoneready.release.steps import Steps
from phoneready.settings.schema import ReleaseConfig
from runtime_bench.devices.model_facts import ModelFacts
from runtime_bench.devices.profile import find_profile, load_profiles
from runtime_bench.devices.projection import Band, project
from runtime_bench.records.bench_record import DOES_NOT_FIT, BenchRecord
from runtime_bench.records.energy import EnergyAccount, energy
from runtime_bench.records.fairness import CAP_LIMIT, capped_at, noise
from runtime_bench.records.judgement import Samples, samples_of


def collect_figures(config: ReleaseConfig, folder: Path, release: ReleaseFigures) -> FigureSet:
    """Every figure of `planned_figures`, of the dense model too if it has one."""
    steps = Steps(config, folder, None)
    sides = ((PRUNED, release.pruned), (DENSE, release.dense))
    exports = [(role, record) for role, records in sides for record in records]
    items = {record.file: (role, record.quant) for role, record in exports}
    figures = [size_figure(role, record.quant, record.file, record.file_bytes) for role, record in exports]
    for place in config.bench.targets:
        figures += benchmark_figures(config, place, steps.bench_records(place), items)
    projected = config.bench.measured(config.export.projected) if config.bench.devices else ()
    for artifact in steps.artifacts():
        if artifact.item in projected:
            about = (artifact.role, artifact.item, artifact.name, artifact.facts)
            figures += projected_figures(config, *about)
    for item, subject, evaluation in steps.evaluations():
        figures += evaluation_figures(item, subject, evaluation)
    return FigureSet(release.source.reference, release.source.sha256, config.seed, tuple(figures))


def size_figure(role: str, item: str, subject: str, n_bytes: int) -> Figure:
    """A file's size."""
    return Figure(FigureKey("file_bytes", item), role, subject, "bytes", n_bytes)


def benchmark_figures(
    config: ReleaseConfig, place: str, records: Sequence[BenchRecord], items: Mapping[str, tuple[str, str]]
) -> Iterator[Figure]:
    """What was measured at a place; `items` has the role and the quantization or variant of every file."""
    rows: dict[tuple[str, int], list[BenchRecord]] = {}
    anchors = {(record.test, record.n_threads): record for record in records if record.is_anchor}
    for record in (record for record in records if not record.is_anchor):
        timing = _timing(config, place, record, *items[record.model_filename])
        yield _anchored(timing, anchors[record.test, record.n_threads]) if anchors else timing
        if ENERGY_OF + record.workload in METRICS and (account := energy(record)):
            yield _energy(config, place, record, account, *items[record.model_filename])
        rows.setdefault((record.model_filename, record.n_threads), []).append(record)
    for (name, _), group in rows.items():
        yield _peak(config, place, group, *items[name])


def _unmeasured(
    config: ReleaseConfig, place: str, record: BenchRecord, role: str, item: str, metric: str
) -> Figure:
    """A figure of a benchmark record, without its value."""
    threads = record.n_threads if config.bench.n_threads else None
    conditions = {
        "kind": record.kind,
        "engine": record.engine,
        "processor": str(record.cpu_info),
        "warm-up": str(record.warmup),
        "batches": f"{record.n_batch} and {record.n_ubatch} tokens",
    }
    if record.memory_limit_bytes is not None:
        conditions["limit of memory"] = f"{record.memory_limit_bytes} bytes"
    if threads is None:
        conditions["threads"] = str(record.n_threads)
    if metric == "load":
        conditions["page cache"] = record.page_cache_state
    if record.quantized_cache is not None:
        conditions["key-value cache"] = record.quantized_cache
    if config.bench.backend is not None:
        conditions["backend"] = str(record.backends)
    if metric != "peak_rss_bytes" and (cap := capped_at(record) or 1.0) < 1 - CAP_LIMIT:
        conditions["clocks"] = f"capped at {cap:.0%}"
    return Figure(
        key=FigureKey(metric, item, measured_place(place), threads),
        role=role,
        subject=record.model_filename,
        unit=metric_of(metric).unit,
        value=None,
        kind=record.kind,
        target=record.target,
        backends=record.backends,
        failure=_unusable(record),
        conditions=conditions,
    )


def _unusable(record: BenchRecord) -> str | None:
    """Why nothing was measured of what was asked for."""
    return record.failure or (f"{record.fallback} did not compute" if record.fallback else None)


def _timing(config: ReleaseConfig, place: str, record: BenchRecord, role: str, item: str) -> Figure:
    figure, timed = _unmeasured(config, place, record, role, item, record.test), samples_of(record, "it")
    if figure.failure or timed.problem or record.median_ns is None:
        return replace(figure, failure=figure.failure or timed.problem)
    n_tokens, ns = record.n_tokens, record.median_ns
    return replace(
        figure,
        value=1e9 * n_tokens / ns if n_tokens else ns / 1e6,
        samples=_samples(record, figure, _session(record, record.test)),
        measured_on=record.measured_on,
    )


def _session(record: BenchRecord, metric: str) -> str:
    """Rows of one name took turns: their samples may be compared pair by pair."""
    return f"{record.session} {metric} {record.n_threads}"


def _samples(record: BenchRecord, figure: Figure, session: str) -> Samples:
    """Samples as they are judged: milliseconds, or of a rate seconds a token."""
    found = samples_of(record, figure.subject)
    unit = 1e9 * (record.n_tokens or 1e-3)
    times, cpu_times = (tuple(ns / unit for ns in each) for each in (found.times, found.cpu_times))
    return replace(found, times=times, cpu_times=cpu_times, session=session, problem=None, loaded=None)


def _anchored(figure: Figure, anchor: BenchRecord) -> Figure:
    """The figure with the anchor's samples: if it is compared with other sessions, they stand for the machine."""
    conditions = {
        name: value for name, value in figure.conditions.items() if name not in ("processor", "clocks")
    }
    found = replace(figure, conditions=conditions | {"anchor": str(anchor.anchor_sha256)})
    if figure.samples is None:
        return found
    timed, failure = _samples(anchor, figure, str(figure.samples.session)), _unusable(anchor)
    noise, cpu_noise = failure or timed.noise, failure or timed.cpu_noise
    problem, name = None if timed.times else noise, f"the anchor of {figure.subject}"
    return replace(found, anchor=replace(timed, name=name, problem=problem, noise=noise, cpu_noise=cpu_noise))


def _energy(
    config: ReleaseConfig, place: str, record: BenchRecord, account: EnergyAccount, role: str, item: str
) -> Figure:
    """Joules a token of a rate, of all that the meter sees."""
    figure = _unmeasured(config, place, record, role, item, ENERGY_OF + record.test)
    figure.conditions["meter"] = account.meter
    found = account.joules
    if found is None or figure.failure:
        return replace(figure, failure=figure.failure or account.reason)
    times, session = account.of_processes, _session(record, figure.key.metric)
    rounds = tuple(range(len(times)))
    samples = Samples(figure.subject, times, rounds, session=session, noise=noise(record))
    return replace(figure, value=found.value, low=found.low, high=found.high, samples=samples)


def _peak(config: ReleaseConfig, place: str, records: Sequence[BenchRecord], role: str, item: str) -> Figure:
    """Of the workload that needs most: the most of any process, and the least and the most as an interval."""
    failed = [record for record in records if _unusable(record)]
    unfit = (record for record in failed if str(record.failure).startswith(DOES_NOT_FIT))
    worst = (
        next(unfit, None)
        or next(iter(failed), None)
        or max(records, key=lambda record: record.peak_rss_bytes or 0)
    )
    figure = _unmeasured(config, place, worst, role, item, "peak_rss_bytes")
    figure.conditions["workloads"] = ", ".join(sorted(record.test for record in records))
    peaks = tuple(map(float, worst.peak_rss_samples_bytes))
    if failed or not peaks:
        return figure
    samples = Samples(figure.subject, peaks, tuple(range(len(peaks))))
    return replace(figure, value=max(peaks), samples=samples, low=min(peaks), high=max(peaks))


def projected_figures(
    config: ReleaseConfig, role: str, item: str, subject: str, facts: ModelFacts
) -> Iterator[Figure]:
    """What a GGUF file would need, and how fast it would be, on every device of the configuration."""
    profiles = load_profiles()
    context = min(config.bench.n_ctx, facts.context_length)
    for device in config.bench.devices:
        projection = project(find_profile(device, profiles).profile, facts, context)
        why = "; ".join(projection.assumptions)
        memory = projection.memory.total
        bands = {
            "projected_memory_bytes": Band(memory, memory),
            "projected_tg": projection.decode,
            "projected_pp": projection.prefill,
        }
        for metric, band in bands.items():
            figure = Figure(
                FigureKey(metric, item, device), role, subject, metric_of(metric).unit, None,
                kind="projected", target=device, failure=why, conditions={"n_ctx": str(context)},
            )  # fmt: skip
            if band is not None:
                middle = math.sqrt(band.low * band.high)
                figure = replace(figure, value=middle, low=band.low, high=band.high, failure=None)
            yield figure
