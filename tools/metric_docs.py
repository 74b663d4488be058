"""Writes the table of metrics into docs/release.md from the rows that the program reads."""

from __future__ import annotations

import re
from pathlib import Path

from phoneready.figures.figures import (
    ANSWERS,
    BENCH,
    ENERGY_OF,
    FILE,
    METRICS,
    OWN,
    OWN_METRIC,
    PROJECTION,
    TASK,
    TEXT,
    Metric,
)

TARGET = Path(__file__).resolve().parent.parent / "docs" / "release.md"
OF = {
    FILE: "export",
    BENCH: "benchmark",
    PROJECTION: "[device](devices.md)",
    TEXT: "text",
    TASK: "task",
    ANSWERS: "answers",
    OWN: "own",
}
LIMITS = {"bytes": 'bytes, "80 MB"', "ms": 'ms, "1.5 s"', "J": "joules"}
SIZES = {"ttft": "`bench.ttft`", "pp": "`bench.n_prompt`", "tg": "`bench.n_gen`"}


def table() -> str:
    """One line a metric."""
    lines = ["| metric | what | of | better | limit |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *map(_line, (*METRICS.values(), OWN_METRIC))]) + "\n"


def _line(row: Metric) -> str:
    better = {True: "higher", False: "lower", None: "as it says"}[row.higher_is_better]
    what = row.help + (f"; N from {SIZES[row.name.removeprefix(ENERGY_OF)]}" if row.sized else "")
    unit = "its own" if row.source == OWN else LIMITS.get(row.unit, row.unit or "none")
    cells = (f"`{row.name}{'N' if row.sized else ''}`", what, OF[row.source], better, unit)
    return "| " + " | ".join(cell.replace("||", "\\|\\|") for cell in cells) + " |"


def document(text: str) -> str:
    """The page with the table of today."""
    return re.sub(
        r"(?<=<!-- metrics -->\n).*?(?=<!-- /metrics -->)", lambda _: table(), text, flags=re.DOTALL
    )


if __name__ == "__main__":
    TARGET.write_text(document(TARGET.read_text(encoding="utf-8")), encoding="utf-8")
