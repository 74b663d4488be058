"""`phoneready init`: a configuration to begin with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from cfsp.errors import InputError
from cfsp.files import refuse_existing, write_text
from cfsp.settings import setting
from phoneready.commands.options import ForceOption, JsonOption
from phoneready.console import write_result
from phoneready.settings.template import template_text


def init(
    file: Annotated[Path, typer.Argument(help="File to write.", metavar="FILE")] = Path("release.toml"),
    model: str | None = setting(None, "Model to put into it.", metavar="MODEL", shown="smollm2-135m"),
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Write a release.toml with every setting, its default and a word on it.

    Edit it, then run `phoneready release FILE`.
    """

    if file.is_dir():
        raise InputError("a folder; name the file", field="FILE", value=str(file))
    refuse_existing(file, force=force, like=re.compile(rb"^\s*\[model\]", re.MULTILINE))
    write_text(file, template_text(model))
    write_result(f"Written to {file}; next: phoneready release {file}", {"file": str(file)}, as_json=json)
