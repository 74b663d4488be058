"""`phoneready report`: the reports of a release, made again from its records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cfsp.records import read_record
from cfsp.settings import setting
from phoneready.commands.options import JsonOption
from phoneready.console import quiet_libraries, write_result


def report(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a finished release.", metavar="DIR", show_default=False)
    ],
    sweep: Path | None = setting(
        None,
        "Quality over several ratios, as `eval --ratios ... --json` prints it, for the plot.",
        metavar="FILE",
    ),
    json: JsonOption = False,
) -> None:
    """Write report.html and report.md of a release again, from its records; no model is loaded.

    report.html is one file that opens without a network, on a phone too.
    """
    quiet_libraries()
    from phoneready.evaluation.sweep import Sweep
    from phoneready.publish.publish import PAGE_FILE, REPORT_FILE, rewrite_reports

    sweep_record = None if sweep is None else read_record(Sweep, sweep)
    rewrite_reports(folder, sweep=sweep_record)
    files = [folder / name for name in (PAGE_FILE, REPORT_FILE)]
    lines = [f"{file}: {file.stat().st_size / 1e6:.2f} MB" for file in files]
    write_result("\n".join(lines), {"files": [str(file) for file in files]}, as_json=json)
