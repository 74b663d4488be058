"""frontier.html: what files lose, against what they take: size, decode speed, memory; opens offline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from cfsp.units import format_bytes, megabytes
from phoneready.evaluation.dominance import DOMINATED
from phoneready.frontier.record import Frontier, FrontierPoint
from phoneready.frontier.settings import BASE_QUANT
from phoneready.frontier.tables import (
    accuracies,
    accuracy,
    conditions,
    frontier_table,
    sentences,
)
from phoneready.report.assets import plot_text, plotly_script, render_page
from phoneready.report.plots import BITS, DARK, Axis, loss_figure


def _peak_bytes(point: FrontierPoint, unit: int = 1) -> float | None:
    peak = point.speed.peak_rss_bytes if point.speed else None
    return None if peak is None else peak / unit


def _of_task(point: FrontierPoint, task: str, metric: str, name: str) -> float | None:
    """`value` or `stderr` of a file's figure of a task."""
    one = accuracy(point, task, metric)
    return None if one is None else getattr(one, name)


def _whole_kl(point: FrontierPoint) -> float | None:
    """KL of a file that has all tokens."""
    return None if point.vocabulary else point.kl_mean


_SIZE: Axis = Axis("file size, MB", lambda point: point.file_bytes / 1e6)


@dataclass(frozen=True)
class _Row:
    """A plot; it is shown where any file has both of its places.

    Attributes:
        id: Of its element.
        title: Above it.
        x: To the right.
        y: Upwards.
        caption: Below it: what is better.
    """

    id: str
    title: str
    x: Axis
    y: Axis = BITS
    caption: str = "Lower is better."

    def is_known(self, found: Frontier) -> bool:
        """Whether any file is to be seen."""
        return any(None not in (self.x.of(point), self.y.of(point)) for point in found.points)


_ROWS = (
    _Row("plot-size", "Size against loss", _SIZE),
    _Row(
        "plot-speed",
        "Decode speed against loss",
        Axis(f"decode, times the dense {BASE_QUANT} file", lambda point: point.times),
    ),
    _Row(
        "plot-memory",
        "Peak memory against loss",
        Axis("most resident memory, MiB", lambda point: _peak_bytes(point, 2**20)),
    ),
    _Row(
        "plot-kl",
        "Size against divergence",
        _SIZE,
        Axis("KL from the dense model, nats a token", _whole_kl),
        "Lower is better. Files of fewer tokens are left out: theirs is of these.",
    ),
)


def render_frontier(found: Frontier) -> str:
    """The page as HTML.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    rows = [row for row in (*_ROWS, *_of_tasks(found)) if row.is_known(found)]
    table = frontier_table(found)
    shown = {
        "source": found.source,
        "lines": [line.strip().removeprefix("- ") for line in sentences(found)],
        "conditions": conditions(found),
        "titles": [column.title for column in table.columns],
        "rows": [["-" if cell is None else cell for cell in row] for row in table.cells()],
        "shown": rows,
    }
    plots = {row.id: _figure(found, row) for row in rows}
    return render_page("frontier.html.j2", shown, plots, plotly_script(needed=True), DARK)


def _of_tasks(found: Frontier) -> Iterator[_Row]:
    """One for each task that any file did."""
    for number, (task, metric) in enumerate(accuracies(found)):
        value, error = (
            partial(_of_task, task=task, metric=metric, name=name) for name in ("value", "stderr")
        )
        known = (accuracy(point, task, metric) for point in found.points)
        better = "Higher" if any(one.higher_is_better for one in known if one) else "Lower"
        caption = f"{better} is better. Bars are one standard error."
        axis = Axis(f"{task} {metric}", value, error)
        yield _Row(f"plot-task-{number}", f"Size against {task}", _SIZE, axis, caption)


def _figure(found: Frontier, row: _Row) -> dict[str, Any]:
    models = list(dict.fromkeys(point.model for point in sorted(found.points, key=lambda p: not p.is_dense)))
    return loss_figure(
        {model: [point for point in found.points if point.model == model] for model in models},
        row.x,
        row.y,
        beaten={one.file for one in found.standings if one.verdict == DOMINATED},
        name=lambda point: point.quant,
        lines=_lines,
    )


def _lines(point: FrontierPoint) -> list[str]:
    speed, peak = point.tokens_per_second, _peak_bytes(point)
    return [
        megabytes(point.file_bytes),
        *([f"KL {point.kl_mean:.4f}"] if point.kl_mean is not None else []),
        *([f"{speed:.1f} tokens a second"] if speed else []),
        *([f"{format_bytes(peak)} of memory at most"] if peak else []),
        *(f"{plot_text(t.task)}: {t.metrics[0].value:.3f}" for t in point.tasks if t.metrics),
    ]
