"""A command in several processes, which a launcher started: one of them speaks and writes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import typer

from cfsp.errors import PhonereadyError
from phoneready.console import note


def note_once(message: str) -> None:
    """Tell the user something, of several processes on a machine the first one."""
    if _is_first():
        note(message)


_PATIENCE_S = 10.0
"""How much later the first one may find what another has found; the launcher ends all as soon as one has failed."""


@contextmanager
def one_voice() -> Iterator[None]:
    """Of several processes on a machine that fail alike, only the first says why; one that fails alone says it late."""
    try:
        yield
    except PhonereadyError as error:
        key = f"error-{os.environ.get('GROUP_RANK', '0')}"
        if _is_first():
            _leave(key, str(error))
            raise
        if _left(key) != str(error):
            note(f"error: {error}")
        raise typer.Exit(error.exit_code) from None


def _launchers_store() -> Any:
    """torch's Store that all processes can write to and read; None if the launcher has none.

    Raises:
        RuntimeError: It has ended.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return None
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://", timeout=timedelta(seconds=_PATIENCE_S)))[0]


def _leave(key: str, text: str) -> None:
    """Let other processes know."""
    with suppress(RuntimeError):
        if (store := _launchers_store()) is not None:
            store.set(key, text)


def _left(key: str) -> str | None:
    """What another process has left by the end of `_PATIENCE_S`."""
    end = time.monotonic() + _PATIENCE_S
    with suppress(RuntimeError):
        store = _launchers_store()
        while time.monotonic() < end:
            if store is not None and store.check([key]):
                return str(store.get(key), "utf-8")
            time.sleep(0.1)
    return None


def _is_first() -> bool:
    """Of the processes on this machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
