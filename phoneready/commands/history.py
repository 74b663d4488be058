"""`phoneready history`: figures over past releases, and where they changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cfsp.records import record_to_json
from cfsp.settings import no_effect, setting
from phoneready.commands.options import JsonOption, given_options
from phoneready.console import warn, write_result


def history(
    context: typer.Context,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Release folders, folders of those, or history.jsonl files.",
            metavar="DIR...",
            show_default=".",
        ),
    ] = None,
    threshold: float = setting(0.03, "Relative change that counts, however sure it is.", ge=0, lt=1),
    last: int = setting(100, "Most runs to look at, the newest.", ge=1),
    gate: bool = setting(False, "Exit with 1 if a figure changed for the worse."),
    recent: int = setting(5, "With --gate: in how many of the newest runs.", ge=1, rare=True),
    dense: bool = setting(False, "Show the dense model's figures, too.", rare=True),
    json: JsonOption = False,
) -> None:
    """Follow the figures of past releases, and find the run that changed one.

    Every release adds a line to history.jsonl in its folder. A change is reported if it is larger than the noise of the
    figure's own samples and the scatter of the runs before.
    """
    warn(no_effect(name, "without --gate") for name in given_options(context, ("recent",)) if not gate)
    from phoneready.history import check_history, find_entries, format_history, make_history

    record = make_history(find_entries(paths or [Path()]), threshold=threshold, last=last)
    write_result(format_history(record, every=dense), record_to_json(record), as_json=json)
    if gate:
        check_history(record, recent)
