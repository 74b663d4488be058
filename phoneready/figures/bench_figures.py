"""A benchmark's records as figures, which budgets of a release and limits of a search are checked against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from phoneready.figures.figures import ENERGY_OF, METRICS, Figure, FigureKey, measured_place, metric_of
from runtime_bench.records.bench_record import DOES_NOT_FIT, BenchRecord
from runtime_bench.records.compare import Samples, samples_of
from runtime_bench.records.fairness import CAP_LIMIT, capped_at, energy, noise


def bench_figures(
    place: str,
    records: Sequence[BenchRecord],
    items: Mapping[str, tuple[str, str]],
    *,
    any_threads: bool = False,
) -> Iterator[Figure]:
    """What was measured at a place; `items` has the role and the quantization or variant of every file.

    With `any_threads` their number is a condition of a figure, and not part of its key.
    """
    rows: dict[tuple[str, int], list[BenchRecord]] = {}
    anchors = {(record.test, record.n_threads): record for record in records if record.is_anchor}
    for record in (record for record in records if not record.is_anchor):
        role, item = items[record.model_filename]
        rows.setdefault((record.model_filename, record.n_threads), []).append(record)
        figure, problem = _unmeasured(place, record, role, item, record.test, any_threads), None
        if not figure.failure:
            problem = samples_of(record, "it").problem
        if figure.failure or problem or record.median_ns is None:
            figure = replace(figure, failure=figure.failure or problem)
        else:
            n_tokens, ns = record.n_tokens, record.median_ns
            figure = replace(
                figure,
                value=1e9 * n_tokens / ns if n_tokens else ns / 1e6,
                samples=_samples(record, figure, _session(record, record.test)),
                measured_on=record.measured_on,
            )
        if anchors:  # compared with other sessions, its samples stand for the machine
            anchor = anchors[record.test, record.n_threads]
            plain = {k: v for k, v in figure.conditions.items() if k not in ("processor", "clocks")}
            figure = replace(figure, conditions=plain | {"anchor": str(anchor.anchor_sha256)})
            if figure.samples is not None:
                timed, failure = _samples(anchor, figure, str(figure.samples.session)), _unusable(anchor)
                noise_, cpu_noise = failure or timed.noise, failure or timed.cpu_noise
                problem, name = None if timed.times else noise_, f"the anchor of {figure.subject}"
                timed = replace(timed, name=name, problem=problem, noise=noise_, cpu_noise=cpu_noise)
                figure = replace(figure, anchor=timed)
        yield figure
        if ENERGY_OF + record.workload in METRICS and (account := energy(record)):
            # Joules a token of a rate, of all that the meter sees.
            figure = _unmeasured(place, record, role, item, ENERGY_OF + record.test, any_threads)
            figure.conditions["meter"] = account.meter
            if account.joules is None or figure.failure:
                yield replace(figure, failure=figure.failure or account.reason)
                continue
            times, j = account.of_processes, account.joules
            session, rounds = _session(record, figure.key.metric), tuple(range(len(times)))
            samples = Samples(figure.subject, times, rounds, session=session, noise=noise(record))
            yield replace(figure, value=j.value, low=j.low, high=j.high, samples=samples)
    for (name, _), group in rows.items():
        # The most of any process, of the workload that needs most.
        failed = [record for record in group if _unusable(record)]
        unfit = [record for record in failed if str(record.failure).startswith(DOES_NOT_FIT)]
        worst = next(iter((*unfit, *failed)), None) or max(group, key=lambda one: one.peak_rss_bytes or 0)
        figure = _unmeasured(place, worst, *items[name], "peak_rss_bytes", any_threads)
        figure.conditions["workloads"] = ", ".join(sorted(record.test for record in group))
        yield replace(figure, value=None if failed else worst.peak_rss_bytes)


def _unmeasured(
    place: str, record: BenchRecord, role: str, item: str, metric: str, any_threads: bool
) -> Figure:
    """A figure of a benchmark record, without its value."""
    conditions = {
        "kind": record.kind,
        "engine": record.engine,
        "processor": str(record.cpu_info),
        "warm-up": str(record.warmup),
        "batches": f"{record.n_batch} and {record.n_ubatch} tokens",
    }
    if record.memory_limit_bytes is not None:
        conditions["limit of memory"] = f"{record.memory_limit_bytes} bytes"
    if any_threads:
        conditions["threads"] = str(record.n_threads)
    if metric == "load":
        conditions["page cache"] = record.page_cache_state
    if record.quantized_cache is not None:
        conditions["key-value cache"] = record.quantized_cache
    if record.engine_settings.asked_backend is not None:
        conditions["backend"] = str(record.backends)
    if metric != "peak_rss_bytes" and (cap := capped_at(record) or 1.0) < 1 - CAP_LIMIT:
        conditions["clocks"] = f"capped at {cap:.0%}"
    return Figure(
        key=FigureKey(metric, item, measured_place(place), None if any_threads else record.n_threads),
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


def _session(record: BenchRecord, metric: str) -> str:
    """Rows of one name took turns: their samples may be compared pair by pair."""
    return f"{record.session} {metric} {record.n_threads}"


def _samples(record: BenchRecord, figure: Figure, session: str) -> Samples:
    """Samples as they are judged: milliseconds, or of a rate seconds a token."""
    found = samples_of(record, figure.subject)
    unit = 1e9 * (record.n_tokens or 1e-3)
    times, cpu_times = (tuple(ns / unit for ns in each) for each in (found.times, found.cpu_times))
    return replace(found, times=times, cpu_times=cpu_times, session=session, problem=None, loaded=None)
