"""`phoneready init`: a configuration to begin with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from cfsp.errors import InputError
from cfsp.files import refuse_existing, write_text
from cfsp.settings import setting
from cfsp.units import parse_bytes
from phoneready.commands.options import MODEL_HELP, ForceOption, JsonOption
from phoneready.console import write_result
from phoneready.settings.template import gate_text, template_text


def init(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="[MODEL]")] = "smollm2-135m",
    output: Path = setting(Path("release.toml"), "File to write.", option="-o --output", metavar="FILE"),
    max_size: int | None = setting(
        None, "Largest file: its weights get the types that lose least.", metavar="SIZE", parse=parse_bytes
    ),
    max_kl: float | None = setting(None, "Largest mean KL divergence from the model, in nats.", gt=0),
    every: bool = setting(False, "Write every setting, with its default and a word on it.", option="--all"),
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Write a release.toml of a few lines: a file, and the budgets that it must keep.

    Edit it, then run `phoneready release FILE`.
    """
    if output.is_dir():
        raise InputError("a folder; name the file", field="-o", value=str(output))
    if every and (max_size or max_kl):
        raise InputError("--all writes every setting; set the limits in its budgets", field="--all")
    refuse_existing(output, force=force, like=re.compile(rb"^\s*\[model\]", re.MULTILINE))
    write_text(output, template_text(model) if every else gate_text(model, max_size, max_kl))
    write_result(
        f"Written to {output}; next: phoneready release {output}", {"file": str(output)}, as_json=json
    )
