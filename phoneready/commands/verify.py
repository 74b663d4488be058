"""`phoneready verify`: whether a release is still what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cfsp.errors import LimitError
from phoneready.commands.options import JsonOption
from phoneready.console import quiet_libraries, write_result
from runtime_bench.presentation.table import visible


def verify(
    folder: Annotated[
        Path, typer.Argument(help="Release folder, or a copy of it.", metavar="DIR", show_default=False)
    ],
    json: JsonOption = False,
) -> None:
    """Check every byte of a release against its manifest: changed, missing and further files.

    The exit status is 1 if something differs. `sha256sum -c SHA256SUMS` checks the same hashes without phoneready.
    """
    quiet_libraries()
    from phoneready.publish.manifest import verify_release

    count, problems = verify_release(folder)
    lines = [f"{visible(problem.path)} {problem.reason}" for problem in problems]
    text = "\n".join(lines) if lines else f"{count} files are as they were released"
    payload = {"ok": not problems, "files": count, "problems": [problem._asdict() for problem in problems]}
    write_result(text, payload, as_json=json)
    if problems:
        more = f", and {len(lines) - 1} more" if len(lines) > 1 else ""
        raise LimitError(f"{folder} is not as it was released: {lines[0]}{more}")
