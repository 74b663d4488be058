"""Device profiles as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from runtime_bench.devices import FIGURES, MIB, Band, Cluster, Figure, KnownProfile, Projection
from runtime_bench.presentation.table import Column, Table, escape_markdown
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
    if isinstance(figure.value, tuple):
        return " + ".join(map(_part, figure.value)) if figure.value else "none"
    return f"{figure.value:g}{unit}" if isinstance(figure.value, float) else f"{figure.value}{unit}"


def _part(part: Any) -> str:
    if not isinstance(part, Cluster):
        return str(part)
    clock = f" {part.max_mhz} MHz" if part.max_mhz else ""
    return f"{part.count} x {part.core}{clock}"
