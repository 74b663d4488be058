"""Files by what they lose: bits per byte against their size, or against anything else that is had for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from cfsp.units import format_bytes
from phoneready.evaluation.dominance import DOMINATED
from phoneready.evaluation.measured_file import MeasuredFile
from phoneready.figures import figure_set
from phoneready.release.artifact import FileLosses
from phoneready.release.results import ReleaseFigures
from phoneready.report.escape import plot_text
from phoneready.report.plot_style import DENSE, SERIES, SYMBOLS, Plot, plot_layout, scatter

File = TypeVar("File", bound=MeasuredFile)


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
        _mebibytes,
        axis="file size, MiB",
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
    x: Callable[[File], float | None],
    *,
    axis: str,
    beaten: Collection[str],
    name: Callable[[File], str],
    lines: Callable[[File], Sequence[str]],
) -> dict[str, Any]:
    """One series a model, the dense one first.

    Args:
        series: Model to its files.
        x: A file's place on the axis; None leaves it out.
        axis: Title of that axis.
        beaten: Names of files that others dominate; their marks are open.
        name: What stands at a file's mark.
        lines: What is shown over it, beside its loss.
    """
    data = []
    for index, (model, files) in enumerate(series.items()):
        ordered = _placed(files, x)
        symbol = SYMBOLS[index % len(SYMBOLS)]
        colour = DENSE if not index else SERIES[(index - 1) % len(SERIES)]
        open_ = [one.file in beaten for _, one in ordered]
        trace = scatter(
            model,
            [(place, one.bits_per_byte) for place, one in ordered],
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
        data.append(trace)
    return {"data": data, "layout": plot_layout(xaxis=axis, yaxis="bits per byte")}


def _placed(files: Sequence[File], x: Callable[[File], float | None]) -> list[tuple[float, File]]:
    placed = [(place, one) for one in files if (place := x(one))]
    return sorted(placed, key=lambda pair: pair[0])


def _hover(one: MeasuredFile, lines: Sequence[str], dominated: bool) -> str:
    over = one.bits_per_byte / one.dense_bits_per_byte - 1
    loss = f"{one.bits_per_byte:.4f} bits a byte, {over:+.2%}"
    return "<br>".join([plot_text(one.label), *lines, loss, *(["dominated"] if dominated else [])])


def _mebibytes(one: FileLosses) -> float:
    return one.file_bytes / 2**20
