"""A command in several processes, which a launcher started: one of them speaks and writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from cfsp.errors import PhonereadyError
from cfsp.files import claim_output
from cfsp.progress import Progress, no_progress
from phoneready.console import note, show_progress


def note_once(message: str) -> None:
    """Tell the user something, of several processes on a machine the first one."""
    if _is_first():
        note(message)


@contextmanager
def one_voice() -> Iterator[None]:
    """Of several processes on a machine that fail alike, only the first says why."""
    try:
        yield
    except PhonereadyError as error:
        if _is_first():
            raise
        raise typer.Exit(error.exit_code) from None


@contextmanager
def shared_passes(output: Path) -> Iterator[tuple[bool, Progress]]:
    """Passes over text are shared inside the context.

    Args:
        output: What will be made.

    Yields:
        Whether this process makes it, which the others do not, and whom to tell about progress.
    """
    from cfsp.processes import joined

    with one_voice(), joined() as first:
        if not first:
            yield False, no_progress
            return
        with claim_output(output), show_progress() as progress:
            yield True, progress


def _is_first() -> bool:
    """Of the processes on this machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
