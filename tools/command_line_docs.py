"""Write docs/command-line.md from the help pages: `python tools/command_line_docs.py`."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from unittest import mock

from phoneready.main import COMMANDS, main

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "command-line.md"
HEAD = """# Command line

Results go to stdout (`--json`: one JSON document), progress and messages to stderr.
Exit status: 0 done, 1 a limit was missed, 2 an input or option that cannot be used,
3 a limit that the samples or answers cannot decide, 70 a bug, 130 interrupted.

`--help` shows what people use, `--help-all` the rest, as here. A rare setting is `--set KEY=VALUE`, by the name that
it has in release.toml.

This page is generated from the help pages by `tools/command_line_docs.py`.
"""


def help_page(command: str) -> str:
    """The help page of a subcommand, or of `phoneready` itself for an empty name, 100 columns wide."""
    page = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS="100", NO_COLOR="1"), contextlib.redirect_stdout(page):
        status = main([*command.split(), "--help-all" if command else "--help"])
    if status:
        raise RuntimeError(f"phoneready {command} --help-all ended with {status}")
    return page.getvalue()


def document() -> str:
    """The whole page."""
    parts = [HEAD]
    for command in ("", *COMMANDS):
        title = f"phoneready {command}".strip()
        page = "\n".join(line.rstrip() for line in help_page(command).strip().splitlines())
        parts.append(f"## {title}\n\n```text\n{page}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8")
