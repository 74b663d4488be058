"""`phoneready report`: the reports of a release, made again from its records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phoneready.commands.options import JsonOption
from phoneready.console import quiet_libraries, write_result


def report(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a finished release.", metavar="DIR", show_default=False)
    ],
    json: JsonOption = False,
) -> None:
    """Write report.html and report.md of a release again, from its records; no model is loaded.

    report.html is one file that opens without a network, on a phone too.
    """
    quiet_libraries()
    from phoneready.publish.publish import PAGE_FILE, REPORT_FILE, rewrite_reports

    rewrite_reports(folder)
    files = [folder / name for name in (PAGE_FILE, REPORT_FILE)]
    lines = [f"{file}: {file.stat().st_size / 1e6:.2f} MB" for file in files]
    write_result("\n".join(lines), {"files": [str(file) for file in files]}, as_json=json)
