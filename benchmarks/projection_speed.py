"""Projected bands of speed against speeds that others have published: benchmarks/published_speeds.toml.

    python benchmarks/projection_speed.py

Reads numbers and runs nothing. A row whose device has no bandwidth, or whose model's size is not known, is projected
as unknown and does not count.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from runtime_bench.devices import Band, decode_band, load_profiles, prefill_band
from runtime_bench.presentation.table import table_of

PUBLISHED = Path(__file__).with_name("published_speeds.toml")
CONTEXT_BYTES = 0
"""The published runs have short contexts, whose cache is small beside the weights."""


def main() -> None:
    """Print a Markdown table, and how many published speeds lie inside their band."""
    profiles = load_profiles(Path("/nonexistent"))
    rows, inside = [], []
    for entry in tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))["speed"]:
        known = profiles.get(entry["device"])
        bands: dict[str, Band | None] = {"decode": None, "prefill": None}
        if known is not None and "weight_bytes" in entry:
            bands["decode"], _ = decode_band(known.profile, entry["weight_bytes"], CONTEXT_BYTES)
        if known is not None and "n_multiplied" in entry:
            bands["prefill"], _ = prefill_band(known.profile, entry["n_multiplied"])
        rows.append(row(entry, bands))
        inside += [
            band.low <= entry[name] <= band.high for name, band in bands.items() if band and name in entry
        ]
    print(table_of(rows).markdown())
    print(
        f"{sum(inside)} of {len(inside)} published speeds lie inside their band ({sum(inside) / len(inside):.0%})"
    )


def row(entry: dict[str, Any], bands: dict[str, Band | None]) -> dict[str, str]:
    """A published run, its speeds, and the bands; what lies outside is marked."""
    cells = {"device": entry["device"], "model": entry["model"]}
    for name, band in bands.items():
        speed = entry.get(name)
        text = "unknown" if band is None else f"{band.low:.3g} to {band.high:.3g}"
        outside = band is not None and speed is not None and not band.low <= speed <= band.high
        cells[f"{name} t/s"] = "-" if speed is None else f"{speed:g}"
        cells[f"{name} projected"] = "-" if speed is None else text + (" (outside)" if outside else "")
    return cells


if __name__ == "__main__":
    main()
