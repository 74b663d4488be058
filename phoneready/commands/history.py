"""`phoneready history`: figures over past releases, and where they changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cfsp.files import PAGE, refuse_existing, write_text
from cfsp.records import record_to_json
from cfsp.settings import no_effect, setting
from phoneready.commands.options import JsonOption, given_options
from phoneready.console import warn, write_result
from phoneready.history.settings import HistorySettings


def history(
    settings: HistorySettings,
    context: typer.Context,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Release folders, folders of those, or history.jsonl files.",
            metavar="DIR...",
            show_default=".",
        ),
    ] = None,
    gate: bool = setting(False, "Exit with 1 where a figure changed for the worse."),
    recent: int = setting(5, "With --gate: in how many of the newest runs.", ge=1),
    dense: bool = setting(False, "Show the dense model's figures, too."),
    plot: Path | None = setting(None, "Write a page with a plot of every figure.", metavar="FILE.html"),
    json: JsonOption = False,
) -> None:
    """Follow the figures of past releases, and find the run that changed one.

    Every release adds a line to history.jsonl in its folder. A step or a drift is reported where it is larger than the
    noise of the figure's own samples and the scatter of its runs explain.
    """
    warn(no_effect(name, "without --gate") for name in given_options(context, ("recent",)) if not gate)
    from phoneready.history.history import check_history, find_entries, make_history
    from phoneready.history.tables import format_history

    entries = find_entries(paths or [Path()])
    record = make_history(entries, settings)
    if plot is not None:
        from phoneready.history.plot import render_plot

        refuse_existing(plot, force=True, like=PAGE)
        write_text(plot, render_plot(record))
    write_result(format_history(record, every=dense), record_to_json(record), as_json=json)
    if gate:
        check_history(record, recent)
