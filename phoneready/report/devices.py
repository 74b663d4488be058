"""Projections onto devices, as tables of their own: they are never ranked with what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from phoneready.console import format_bytes
from phoneready.report.inputs import DeviceProjections
from phoneready.report.tables import NOTHING, Mark, Row
from runtime_bench.devices.projection import Band
from runtime_bench.presentation.table import Table, table_of_cells

_FITS = {True: Mark("fits", "good"), False: Mark("does not fit", "bad"), None: Mark("unknown", "even")}


def projection_tables(projections: Sequence[DeviceProjections]) -> list[tuple[DeviceProjections, Table[Row]]]:
    """One table a file, one row a device."""
    return [(entry, _table(entry)) for entry in projections]


def _table(entry: DeviceProjections) -> Table[Row]:
    rows: list[Row] = [
        (
            entry.names[p.device],
            _FITS[p.fits],
            format_bytes(p.memory.total),
            NOTHING if p.limit_bytes is None else format_bytes(p.limit_bytes),
            _band(p.decode),
            _band(p.prefill),
        )
        for p in entry.projections
    ]
    header = ("device", "memory", "needs", "may have", "generation, t/s", "prompt, t/s")
    return table_of_cells(header, rows)


def _band(band: Band | None) -> str:
    return "unknown" if band is None else f"{_speed(band.low)} to {_speed(band.high)}"


def _speed(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
