"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cfsp.errors import InputError

MODEL_HELP = "smollm2-135m (built in), a Hugging Face folder, a .gguf file, or a hub id."
TEXT_HELP = "FILE.txt, FILE.jsonl, FILE.parquet, hub:NAME[@CONFIG][:SPLIT] or builtin:python-docs"

ModelArgument = Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run model code that a folder or hub model brings along.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn at random.", min=0)]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", help="Threads to compute with.", min=1, show_default="as many as torch finds"),
]
RemoteFolderOption = Annotated[
    str | None,
    typer.Option(
        "--remote-folder",
        help="Where to put files on other machines: an absolute path.",
        metavar="DIR",
        show_default="a cache folder there",
    ),
]
SshConfigOption = Annotated[
    Path | None, typer.Option("--ssh-config", help="Configuration of the ssh client, instead of your own.")
]


def split_names(values: Sequence[str] | str) -> tuple[str, ...]:
    """Names given as `A,B` or by repeating an option, each once, in order."""
    values = [values] if isinstance(values, str) else values
    return tuple(dict.fromkeys(name.strip() for value in values for name in value.split(",") if name.strip()))


def split_numbers(values: Sequence[str], option: str) -> tuple[int, ...]:
    """Whole numbers given as `1,2` or by repeating an option.

    Raises:
        InputError: Something is no whole number.
    """
    names = split_names(values)
    if not all(name.isdecimal() for name in names):
        raise InputError(
            "not a list of whole numbers",
            field=option,
            value=",".join(values),
            allowed="such as 128 or 128,512",
        )
    return tuple(int(name) for name in names)


def text_references(values: Sequence[str | Path]) -> tuple[str, ...]:
    """Text references as given; an empty one is refused here, where the option can be named."""
    if any(not str(value).strip() for value in values):
        raise InputError("empty text reference", allowed=TEXT_HELP)
    return tuple(map(str, values))
