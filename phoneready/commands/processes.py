"""A command in several processes, which a launcher started: one of them speaks and writes."""

from __future__ import annotations

import os
import time
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


_ALIKE_S = 3.0
"""The launcher ends all processes as soon as the first one has failed."""


@contextmanager
def one_voice() -> Iterator[None]:
    """Of several processes on a machine that fail alike, only the first says why; one that fails alone says it late."""
    try:
        yield
    except PhonereadyError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        time.sleep(_ALIKE_S)
        note(f"error: {error}")
        raise typer.Exit(error.exit_code) from None


@contextmanager
def shared_passes(output: Path, device: str) -> Iterator[tuple[bool, Progress]]:
    """Passes over text are shared inside the context.

    Args:
        output: What will be made.
        device: Where the passes are computed.

    Yields:
        Whether this process makes it, which the others do not, and whom to tell about progress.
    """
    from cfsp.processes import joined

    with joined(device) as first, one_voice():
        if not first:
            yield False, no_progress
            return
        with claim_output(output), show_progress() as progress:
            yield True, progress


def _is_first() -> bool:
    """Of the processes on this machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
