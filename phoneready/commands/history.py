"""`phoneready history`: figures over past releases, and where they changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phoneready.commands.options import DebugOption, JsonOption
from phoneready.console import write_result


def history(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Release folders, folders of those, or history.jsonl files.",
            metavar="DIR...",
            show_default=".",
        ),
    ] = None,
    threshold: Annotated[
        float, typer.Option("--threshold", help="Relative change that counts, however sure it is.")
    ] = 0.03,
    false_alarms: Annotated[
        float,
        typer.Option("--false-alarms", help="Chance that a history in which nothing changed shows a change."),
    ] = 0.05,
    last: Annotated[int, typer.Option("--last", help="Most runs to look at, the newest.", min=1)] = 100,
    gate: Annotated[
        bool, typer.Option("--gate", help="Exit with 1 where a figure changed for the worse.")
    ] = False,
    recent: Annotated[
        int, typer.Option("--recent", help="With --gate: in how many of the newest runs.", min=1)
    ] = 5,
    dense: Annotated[bool, typer.Option("--dense", help="Show the dense model's figures, too.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Write a page with a plot of every figure.", metavar="FILE.html"),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Follow the figures of past releases, and find the run that changed one.

    Every release adds a line to history.jsonl in its folder. A step or a drift is reported where it is larger than the
    noise of the figure's own samples and the scatter of its runs explain.
    """
    from cfsp.files import PAGE, refuse_existing, write_text
    from cfsp.records import record_to_json
    from phoneready.history.history import check_history, find_entries, make_history
    from phoneready.history.tables import describe_anomalies, format_history

    entries = find_entries(paths or [Path()])
    found = make_history(entries, threshold=threshold, false_alarms=false_alarms, last=last)
    if plot is not None:
        from phoneready.history.plot import render_plot

        refuse_existing(plot, force=True, like=PAGE)
        write_text(plot, render_plot(found, describe_anomalies(found)))
    write_result(format_history(found, every=dense), record_to_json(found), as_json=json)
    if gate:
        check_history(found, recent)
