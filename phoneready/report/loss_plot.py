"""Files by what they lose: bits per byte, or another figure, against their size or anything else that it is had for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from cfsp.units import format_bytes
from phoneready.evaluation.dominance import DOMINATED
from phoneready.evaluation.measured_file import MeasuredFile
from phoneready.figures import figure_set
from phoneready.release.results import ReleaseFigures
from phoneready.report.escape import plot_text
from phoneready.report.plot_style import DENSE, SERIES, SYMBOLS, Plot, plot_layout, scatter

File = TypeVar("File", bound=MeasuredFile)


@dataclass(frozen=True)
class Axis(Generic[File]):
    """What is along one side of a plot.

    Attributes:
        title: Beside it, with its unit.
        of: A file's place; None leaves the file out.
        error: Of that place, shown as a bar of this much up and down; None for none.
    """

    title: str
    of: Callable[[File], float | None]
    error: Callable[[File], float | None] = lambda one: None


BITS: Axis[Any] = Axis("bits per byte", lambda one: float(one.bits_per_byte))


def losses_plot(figures: ReleaseFigures) -> Plot | None:
    """What every file of a release loses, against its size; None where that was not measured."""
    if not figures.losses:
        return None
    standings = figures.standings
    figure = loss_figure(
        {
            role: [one for one in figures.losses if one.role == role]
            for role in (figure_set.DENSE, figure_set.PRUNED)
        },
        Axis("file size, MiB", lambda one: one.file_bytes / 2**20),
        BITS,
        beaten={file for file, one in standings.items() if one.verdict == DOMINATED},
        name=lambda one: one.item,
        lines=lambda one: [format_bytes(one.file_bytes)],
    )
    caption = (
        "Down and left is best. Open marks are files that another one dominates: it is no larger and surely loses no "
        "more on the same windows."
    )
    return Plot("plot-losses", "Size against loss", caption, "losses", 380, figure)


def loss_figure(
    series: Mapping[str, Sequence[File]],
    x: Axis[File],
    y: Axis[File],
    *,
    beaten: Collection[str],
    name: Callable[[File], str],
    lines: Callable[[File], Sequence[str]],
) -> dict[str, Any]:
    """One series a model, the dense one first.

    Args:
        series: Model to its files.
        x: To the right.
        y: Upwards.
        beaten: Names of files that others dominate; their marks are open.
        name: What stands at a file's mark.
        lines: What is shown over it, beside its loss.
    """
    data = []
    for index, (model, files) in enumerate(series.items()):
        ordered = _placed(files, x, y)
        symbol = SYMBOLS[index % len(SYMBOLS)]
        colour = DENSE if not index else SERIES[(index - 1) % len(SERIES)]
        open_ = [one.file in beaten for _, one in ordered]
        trace = scatter(
            model,
            [place for place, _ in ordered],
            [_hover(one, lines(one), dominated) for (_, one), dominated in zip(ordered, open_, strict=True)],
            mode="markers+text",
            text=[plot_text(name(one)) for _, one in ordered],
            textposition="top center",
            textfont={"size": 10, "color": colour},
            marker={
                "size": 11,
                "color": colour,
                "symbol": [f"{symbol}-open" if dominated else symbol for dominated in open_],
            },
        )
        errors = [y.error(one) for _, one in ordered]
        if any(errors):
            bars = {"type": "data", "array": [error or 0 for error in errors], "thickness": 1.5, "width": 0}
            trace["error_y"] = bars
        data.append(trace)
    return {"data": data, "layout": plot_layout(xaxis=plot_text(x.title), yaxis=plot_text(y.title))}


def _placed(files: Sequence[File], x: Axis[File], y: Axis[File]) -> list[tuple[tuple[float, float], File]]:
    """Files with both places, from left to right."""
    places = ((x.of(one), y.of(one), one) for one in files)
    placed = [((right, up), one) for right, up, one in places if right is not None and up is not None]
    return sorted(placed, key=lambda pair: pair[0])


def _hover(one: MeasuredFile, lines: Sequence[str], dominated: bool) -> str:
    over = one.bits_per_byte / one.dense_bits_per_byte - 1
    loss = f"{one.bits_per_byte:.4f} bits a byte, {over:+.2%}"
    return "<br>".join([plot_text(one.label), *lines, loss, *(["dominated"] if dominated else [])])
