"""What the commands share on the way out: results on stdout, progress on stderr, quiet libraries."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Annotated, Any

from cfsp.errors import PhonereadyError
from cfsp.memory import keep_freed_memory
from cfsp.progress import Pace, Progress
from cfsp.settings import DEVICE, THREADS, Settings, setting
from cfsp.units import format_seconds
from runtime_bench.presentation.table import printable

PLAIN_INTERVAL_S = 15.0
"""Without a terminal, a step that goes on is mentioned this often."""


@dataclass(frozen=True)
class ReadOptions(Settings):
    """Options of commands that read a model."""

    threads: Annotated[int | None, THREADS] = None
    json: bool = setting(False, "Print the result as one JSON document.", hidden=True)


@dataclass(frozen=True)
class MakeOptions(ReadOptions):
    """Options of commands that make something of a model."""

    device: Annotated[str, DEVICE] = "auto"
    force: bool = setting(False, "Replace an existing output.")


@dataclass(frozen=True)
class Check:
    """A line of `doctor`; the state is `ok`, `warning`, `missing` (an optional part) or `failed` (nothing works)."""

    name: str
    state: str
    found: str
    hint: str = ""


def write_result(text: str, payload: Any, *, as_json: bool) -> None:
    """Print a command's result: `text` for people, or `payload` as one JSON document."""
    output = (
        json.dumps(payload, indent=2, ensure_ascii=False, allow_nan=False) if as_json else text.rstrip("\n")
    )
    sys.stdout.write(printable(output) + "\n")


def note(message: str) -> None:
    print(printable(message), file=sys.stderr, flush=True)


def warn(warnings: Iterable[str]) -> None:
    """Tell the user, a line each, what was asked for and has no effect."""
    for warning in dict.fromkeys(warnings):
        note(f"warning: {warning}")


@contextmanager
def errors_as_exit_status() -> Iterator[None]:
    """One line and a status instead of a traceback, for what is expected to go wrong in a script."""
    try:
        yield
    except PhonereadyError as error:
        note(f"error: {error}")
        raise SystemExit(error.exit_code) from None


@contextmanager
def show_progress(stream: IO[str] | None = None) -> Iterator[Progress]:
    """Yield a `cfsp.progress.Progress` that draws bars on a terminal and writes spare lines elsewhere."""
    stream = stream or sys.stderr
    pace, said, tasks = Pace(), dict[str, float](), dict[str, Any]()

    def plain(description: str, done: int, total: int) -> None:
        """A line when a step has gone on for a while, and one at its end if there was such a line."""
        (step, took_s, left_s), line = pace.at(description, done, total), ""
        if done >= total:
            if said.pop(step, None) is not None:
                line = f"{description}: done in {format_seconds(took_s)}"
        elif took_s - said.get(step, 0.0) >= PLAIN_INTERVAL_S:
            said[step] = took_s
            rest = "" if left_s is None else f", about {format_seconds(left_s)} left"
            line = f"{description}: {done} of {total}{rest}"
        if line:
            print(printable(line), file=stream, flush=True)

    if not stream.isatty():
        yield plain
        return
    from rich import progress
    from rich.console import Console

    columns = (
        *(progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn()),
        *(progress.TimeElapsedColumn(), progress.TimeRemainingColumn()),
    )
    with progress.Progress(*columns, console=Console(file=stream), transient=True) as bars:

        def bar(description: str, done: int, total: int) -> None:
            step, shown = description.partition(": ")[0], printable(description)
            if step not in tasks:
                tasks[step] = bars.add_task(shown, total=total)
            bars.update(tasks[step], description=shown, completed=done, total=total)
            if done >= total:
                bars.remove_task(tasks.pop(step))

        yield bar


def quiet_libraries() -> None:
    """Keep the model libraries from writing to the terminal; to be called before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")


def prepare_torch(threads: int | None) -> None:
    """Import torch and transformers quietly and set the number of threads, if one is given."""
    quiet_libraries()
    keep_freed_memory()
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
