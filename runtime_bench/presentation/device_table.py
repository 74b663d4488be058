"""Device profiles as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from runtime_bench.devices.calibration import Calibration
from runtime_bench.devices.profile import FIGURES, Cluster, Figure, KnownProfile, TypeRates
from runtime_bench.devices.projection import MIB, Band, ContextNeed, Projection
from runtime_bench.devices.rates import Fitted, LeftOut
from runtime_bench.presentation.markup import escape_markdown
from runtime_bench.presentation.table import Column, Table, short_names, table_of
from runtime_bench.records.bench_record import DOES_NOT_FIT, FITS, THRASHES

UNKNOWN = "unknown"
_FITS = {FITS: "yes", THRASHES: "thrashes", DOES_NOT_FIT: "NO"}


def profile_table(entries: Sequence[KnownProfile]) -> Table[KnownProfile]:
    """The list of profiles: what tells devices apart."""
    own = [Column[KnownProfile]("own", lambda e: "" if e.built_in else "own")]
    return Table([*_PROFILE_COLUMNS, *(own if any(not e.built_in for e in entries) else ())], entries)


_PROFILE_COLUMNS: tuple[Column[KnownProfile], ...] = (
    Column("device", lambda e: e.profile.id),
    Column("name", lambda e: e.profile.name),
    Column("tier", lambda e: e.profile.tier),
    Column("os", lambda e: e.profile.os),
    Column("soc", lambda e: _value(e.profile.soc)),
    Column("RAM", lambda e: _value(e.profile.ram_mib, " MiB")),
    Column("bandwidth", lambda e: _value(e.profile.dram_gb_s, " GB/s")),
)


def format_profile(entry: KnownProfile) -> str:
    """Every figure with what it rests on, and who says so below it."""
    profile = entry.profile
    title = f"{profile.name}: {profile.tier} {profile.form}, {profile.os}"
    lines = [escape_markdown(title), escape_markdown(str(entry.file))]
    for name in FIGURES:
        figure: Figure[Any] = getattr(profile, name)
        known = figure.value is not None
        lines.append(f"\n{name}: {escape_markdown(_value(figure))}" + (f" ({figure.basis})" if known else ""))
        lines += [f"    {escape_markdown(f'{figure.source}, {figure.date}')}"] if known else []
    return "\n".join(lines) + "\n"


def profile_to_json(entry: KnownProfile) -> dict[str, Any]:
    """The profile's own keys, with the file that it is from."""
    return entry.profile.model_dump(mode="json") | {"file": str(entry.file), "built_in": entry.built_in}


def format_projections(projections: Sequence[Projection], context: int, cache_type: str) -> str:
    """A row a device; where there is one device alone, its memory and its assumptions below."""
    table = Table(_PROJECTION_COLUMNS, projections).markdown()
    text = table + f"\nProjected, not measured; context of {context} tokens, cache in {cache_type}.\n"
    if len(projections) != 1:
        return text
    memory = projections[0].memory
    parts = ", ".join(f"{f.name} {_mib(getattr(memory, f.name))}" for f in dataclasses.fields(memory))
    return text + "".join(f"- {line}\n" for line in (parts, *projections[0].assumptions))


def format_contexts(needs: Sequence[ContextNeed], *, of_one_device: bool) -> str:
    """A row for each type of cache, a column for each length: the cache, and of one device what all of it needs."""
    rows = []
    for cache_type in dict.fromkeys(need.cache_type for need in needs):
        row = {"cache": cache_type}
        for need in (one for one in needs if one.cache_type == cache_type):
            row[f"{need.n_ctx} tokens"] = _need(need) if of_one_device else _mib(need.memory.cache)
        rows.append(row)
    what = "Cache, what is needed with it, and whether that fits" if of_one_device else "Size of the cache"
    return f"{what}, by its type and the length of the context:\n\n{table_of(rows).markdown()}"


def _need(need: ContextNeed) -> str:
    fits = _FITS[need.verdict] if need.verdict else UNKNOWN
    return f"{_mib(need.memory.cache)}, {_mib(need.memory.total)}, {fits}"


def format_calibration(calibration: Calibration) -> str:
    """Each left-out row against what the other files say, and the rates of all rows."""
    lines = []
    for name, fitted in calibration.fits.items():
        inside = sum(one.is_inside for one in fitted.left_out)
        lines += [
            _left_out_table(fitted.left_out).markdown(),
            f"{name}: {_rates(fitted.rates.by_type, fitted.rates.others)}",
            f"Left out, {fitted.n_files} files: median error {fitted.median_error:.1%}; {inside} of "
            f"{len(fitted.left_out)} rows inside the interval that the other files give. Projections: "
            f"{_within(fitted)}.\n",
        ]
    lines += [f"Not read: {escape_markdown(row)}: {why}" for row, why in calibration.left_out]
    return "\n".join(lines)


def _within(rates: Fitted | TypeRates) -> str:
    return f"within x{rates.within:.2f} ({rates.holds:.0%} of rows)"


def _rates(by_type: Mapping[str, float], others: float) -> str:
    return ", ".join([*(f"{kind} {rate:.3g}" for kind, rate in by_type.items()), f"others {others:.3g}"])


def _left_out_table(rows: Sequence[LeftOut]) -> Table[LeftOut]:
    names = short_names(one.row.file for one in rows)
    columns: tuple[Column[LeftOut], ...] = (
        Column("file", lambda one: names[one.row.file]),
        Column("test", lambda one: one.row.test),
        Column("measured t/s", lambda one: f"{1 / one.row.seconds:.2f}", right=True),
        Column("projected t/s", lambda one: f"{1 / one.seconds:.2f}", right=True),
        Column("ratio", lambda one: f"{one.ratio:.3f}", right=True),
        Column("interval", lambda one: f"x{one.within:.2f}", right=True),
        Column("inside", lambda one: "yes" if one.is_inside else "NO"),
    )
    return Table(columns, rows)


_PROJECTION_COLUMNS: tuple[Column[Projection], ...] = (
    Column("device", lambda p: p.device),
    Column("fits", lambda p: _FITS[p.verdict] if p.verdict else UNKNOWN),
    Column("needs", lambda p: _mib(p.memory.total)),
    Column("may have", lambda p: _mib(p.limit_bytes)),
    Column("decode t/s", lambda p: _band(p.decode)),
    Column("prefill t/s", lambda p: _band(p.prefill)),
)


def _mib(count: int | None) -> str:
    return UNKNOWN if count is None else f"{count / MIB:.0f} MiB"


def _band(band: Band | None) -> str:
    return UNKNOWN if band is None else f"{_speed(band.low)} to {_speed(band.high)}"


def _speed(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _value(figure: Figure[Any], unit: str = "") -> str:
    if figure.value is None:
        return UNKNOWN
    if isinstance(figure.value, TypeRates):
        return f"{_rates(figure.value.by_type, figure.value.others)}, {_within(figure.value)}"
    if isinstance(figure.value, tuple):
        return " + ".join(map(_part, figure.value)) if figure.value else "none"
    return f"{figure.value:g}{unit}" if isinstance(figure.value, float) else f"{figure.value}{unit}"


def _part(part: Any) -> str:
    if not isinstance(part, Cluster):
        return str(part)
    clock = f" {part.max_mhz} MHz" if part.max_mhz else ""
    return f"{part.count} x {part.core}{clock}"
