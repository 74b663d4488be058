"""Write docs/command-line.md from the help pages: `python tools/command_line_docs.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "command-line.md"
COMMANDS = (
    *(
        "",
        "init",
        "release",
        "report",
        "verify",
        "tune",
        "frontier",
        "prune",
        "recover",
        "eval",
        "export",
        "bench",
        "compare",
        "history",
        "doctor",
    ),
    *("devices list", "devices show", "devices fit", "devices build-runner", "devices clean"),
)
HEAD = """# Command line

Results go to stdout (`--json`: one JSON document), progress and messages to stderr.
Exit status: 0 done, 1 a limit was missed, 2 an input or option that cannot be used,
3 (`release --strict`) a budget that the samples cannot decide, 70 a bug, 130 interrupted.

This page is generated from the help pages by `tools/command_line_docs.py`.
"""


def help_page(command: str) -> str:
    """The help page of a subcommand, or of `phoneready` itself for an empty name, 100 columns wide."""
    line = [sys.executable, "-m", "phoneready", *command.split(), "--help"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "NO_COLOR": "1"}
    return subprocess.run(line, capture_output=True, text=True, check=True, env=environment).stdout


def document() -> str:
    """The whole page."""
    parts = [HEAD]
    for command in COMMANDS:
        title = f"phoneready {command}".strip()
        page = "\n".join(line.rstrip() for line in help_page(command).strip().splitlines())
        parts.append(f"## {title}\n\n```text\n{page}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8")
