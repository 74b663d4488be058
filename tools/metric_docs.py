"""Writes the table of metrics into docs/release.md from the rows that the program reads."""

from __future__ import annotations

import re
from pathlib import Path

from phoneready.figures.metrics import (
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
_JUDGED = "`checkpoint`, and the exports in `evaluate.files`"
OF = {
    FILE: "each export",
    BENCH: "each export, target and thread count",
    PROJECTION: "each GGUF file and each of `bench.devices` ([projected](devices.md), never measured)",
    TEXT: f"{_JUDGED}; each text (`on`)",
    TASK: f"{_JUDGED}; each of `evaluate.tasks` (`on`)",
    ANSWERS: _JUDGED,
    OWN: f"{_JUDGED}; each of `evaluate.metrics`",
}
LIMITS = {
    "bytes": 'bytes, or "80 MB" (10^6), "80 MiB" (2^20)',
    "ms": 'milliseconds, or "120 ms", "1.5 s"',
    "J": "joules",
}
SIZES = {"ttft": "`bench.ttft`", "pp": "`bench.n_prompt`", "tg": "`bench.n_gen`"}


def table() -> str:
    """One line a metric."""
    lines = ["| metric | what | of | better | unit of the limit |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *map(_line, (*METRICS.values(), OWN_METRIC))]) + "\n"


def _line(row: Metric) -> str:
    better = {True: "higher", False: "lower", None: "as it says"}[row.higher_is_better]
    what = row.help + (f"; N must be in {SIZES[row.name.removeprefix(ENERGY_OF)]}" if row.sized else "")
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
