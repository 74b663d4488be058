"""All plots of a page."""

from __future__ import annotations

from collections.abc import Sequence

from phoneready.evaluation.sweep import Sweep
from phoneready.release.results import ReleaseFigures
from phoneready.report.measured_plots import quality_plot, ratio_plot, speed_plot
from phoneready.report.plot_style import Plot
from phoneready.report.pruning_plots import allocation_plot, pattern_plot
from runtime_bench.records.groups import BenchGroup


def make_plots(figures: ReleaseFigures, groups: Sequence[BenchGroup], sweep: Sweep | None) -> list[Plot]:
    """The plots that there are figures for; each group of benchmark records has its own."""
    found: list[Plot | None] = []
    for number, group in enumerate(groups):
        found += [speed_plot(figures, group, number), ratio_plot(figures, group, number)]
    found += [quality_plot(figures, sweep), pattern_plot(figures.plan), allocation_plot(figures.plan)]
    return [plot for plot in found if plot is not None]
