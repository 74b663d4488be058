"""Entry point of the command `phoneready`, and the one place where errors become messages and exit statuses.

0    done
1    a limit was missed, or `doctor` found something required missing
2    an input, a setting or an option that cannot be used
3    whether a limit is kept cannot be told from the samples or answers
70   an error that nobody expected: a bug
130  interrupted
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import typer
from typer.core import TyperGroup

from cfsp.errors import PhonereadyError, without_credentials
from phoneready.commands.options import EPILOG, key_instead, with_settings
from runtime_bench.presentation.table import visible

EXIT_BUG = 70
EXIT_INTERRUPTED = 130
_INPUT_ERRNOS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EFBIG, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR),
)
_LONGEST = 2000
"""Characters of an error's line."""

COMMANDS: MappingProxyType[str, tuple[str, str]] = MappingProxyType(
    {
        "init": ("init.init", "Write a release.toml: a file, and the budgets that it must keep."),
        "release": (
            "release.release",
            "Prune, export, prove and measure a model, and hold it against budgets.",
        ),
        "report": ("report.report", "Write report.html and report.md of a release again, from its records."),
        "verify": ("verify.verify", "Check every byte of a release against its manifest."),
        "search": ("search.search", "Find the best file within limits."),
        "prune": ("prune.prune", "Remove FFN channels with CFSP, tokens, blocks, attentions or groups."),
        "recover": ("recover.recover", "Train a pruned checkpoint; widths and speed stay the same."),
        "eval": ("evaluate.evaluate", "Measure perplexity, divergence (--against), tasks and answers."),
        "quantize": (
            "quantize.quantize",
            "Write a model as a good 4-bit file, or in other formats of GGUF and ONNX.",
        ),
        "bench": ("bench.bench", "Measure loading, prompts, generation and memory of exported files."),
        "compare": ("compare.compare", "Compare benchmark records: ratio, interval and verdict a row."),
        "history": ("history.history", "Find the release that changed a figure."),
        "devices list": (
            "devices.list_devices",
            "List the devices that have a profile, or all that one says.",
        ),
        "devices fit": ("devices.fit", "Project whether a file fits on devices, and how fast it may be."),
        "devices build-runner": ("devices.build_runner", "Build the program that measures without Python."),
        "devices clean": ("devices.clean", "Remove what `bench` pushed to another machine."),
        "doctor": ("doctor.doctor", "Examine Python, packages, processor, memory and disk."),
    }
)
"""Command -> its function in phoneready.commands, imported when it is called, and what it does."""
GROUPS: MappingProxyType[str, str] = MappingProxyType(
    {"devices": "Phones and boards: what is known of them, whether a model will fit, what was put there."}
)


class _Commands(TyperGroup):
    """The rows of COMMANDS at one place; a command is made when it is called."""

    place = ""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        inside = (n.removeprefix(self.place) for n in (*COMMANDS, *GROUPS) if n.startswith(self.place))
        self.commands: dict[str, Any] = dict.fromkeys(name for name in inside if " " not in name)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command or group of a name, or None."""
        if cmd_name not in self.commands:
            return None
        if self.commands[cmd_name] is None:
            common: dict[str, Any] = {"rich_markup_mode": None, "add_completion": False}
            if help := GROUPS.get(self.place + cmd_name):
                inside = type("_Inside", (_Commands,), {"place": f"{cmd_name} "})
                made = typer.Typer(cls=inside, help=help, no_args_is_help=True, **common)
                made.callback()(lambda: None)
            else:
                module, _, function = COMMANDS[self.place + cmd_name][0].partition(".")
                command = getattr(importlib.import_module(f"phoneready.commands.{module}"), function)
                made = typer.Typer(**common)
                made.command(cmd_name, epilog=EPILOG)(with_settings(command))
            self.commands[cmd_name] = typer.main.get_command(made)
            self.commands[cmd_name].name = cmd_name
        return self.commands[cmd_name]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(n, GROUPS.get(n) or COMMANDS[self.place + n][1]) for n in self.commands])


app = typer.Typer(
    name="phoneready",
    cls=_Commands,
    help="Make a language model fit for a phone: prune it, export it to GGUF or ONNX, prove the export, measure it.",
    epilog="Results go to stdout (--json: as one JSON document), progress to stderr. "
    "`phoneready COMMAND --help` says more about each.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from cfsp.records import tool_version  # which imports pydantic

        typer.echo(f"phoneready {tool_version()}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Make a language model fit for a phone: prune it, export it to GGUF or ONNX, prove the export, measure it."""


def main(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit status; no exception leaves this function.

    Args:
        arguments: Without the program's name.
    """
    debug = "--debug" in arguments
    if any(option in ("-o", "--output") and not value for option, value in pairwise(arguments)):
        # A variable of a shell that is not set; as a path it would be the working directory.
        return _fail("-o: empty; name a folder", PhonereadyError.exit_code, debug)
    try:
        status = app(list(arguments), prog_name=app.info.name, standalone_mode=False)
        if status == EXIT_INTERRUPTED:
            # Typer turns the interrupt of a running command into a status.
            return _fail("interrupted", EXIT_INTERRUPTED, debug)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", EXIT_INTERRUPTED, debug)
    except (BrokenPipeError, SystemExit) as ended:
        # Typer leaves by SystemExit if its help is not read to the end.
        if not isinstance(ended, BrokenPipeError) and not isinstance(ended.__context__, BrokenPipeError):
            raise
        _drop_output()
        return 0
    except PhonereadyError as error:
        return _fail(str(error), error.exit_code, debug)
    except OSError as error:
        if error.errno == errno.ENOENT and error.filename is None:  # tempfile's
            return _fail(f"{error.strerror}; set TMPDIR to a folder that can be written", 2, debug)
        if error.errno not in _INPUT_ERRNOS:
            return _fail_unexpected(error, debug)
        if error.filename is None:
            _drop_output()
        where = error.filename or "cannot write"
        return _fail(f"{where}: {error.strerror}", PhonereadyError.exit_code, debug)
    except Exception as error:
        # The boundary: whatever is left is a bug, or a usage error of typer's own family.
        if hasattr(error, "format_message"):
            return _fail_usage(error)
        if (lacking := _lacks_memory(error)) is not None:
            return _fail(lacking, PhonereadyError.exit_code, debug)
        return _fail_unexpected(error, debug)


def _drop_output() -> None:
    """Keep the interpreter's own flush at exit from failing again: what is left of the output goes nowhere."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        print(without_credentials(traceback.format_exc()), file=sys.stderr)
    line = visible(without_credentials(" ".join(message.split())))
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST - 500]} ... {line[-480:]}"
    with suppress(OSError):  # a full disk behind stderr
        print(f"error: {line}", file=sys.stderr)
    return status


def _lacks_memory(error: Exception) -> str | None:
    """What to say of an error that is no bug but too little memory; torch's are known by name and by text."""
    kind = type(error).__name__  # which an error of a stage's own process has from there
    if kind == "OutOfMemoryError" or "MPS backend out of memory" in str(error):
        return "the GPU has too little memory; fewer or shorter windows take less, and none the device `cpu`"
    if kind == "MemoryError" or "DefaultCPUAllocator" in str(error):
        said = f": {error}" if str(error) else ""
        return f"too little memory; a smaller model, or fewer or shorter windows, take less{said}"
    return None


def _fail_unexpected(error: BaseException, debug: bool) -> int:
    hint = "" if debug else " (a bug; --debug shows where)"
    return _fail(f"{type(error).__name__}: {error}{hint}", EXIT_BUG, debug)


def _fail_usage(error: Exception) -> int:
    """Typer's errors about options; `format_message`, `ctx` and `exit_code` are click's interface."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(context.get_help() if context else "", file=sys.stderr)
        return 2
    path = context.command_path if context else "phoneready"
    message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
    asked = getattr(error, "option_name", None)
    if asked and context and (instead := key_instead(asked, context.command)):
        return _fail(f"{asked}: use {instead}", 2, debug=False)
    return _fail(f"{message}; see {path} --help", int(getattr(error, "exit_code", 2)), debug=False)
