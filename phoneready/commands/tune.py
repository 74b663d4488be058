"""`phoneready tune`: the largest reduction, or the best quality, that meets the budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cfsp.errors import InputError
from cfsp.settings import setting
from phoneready.commands.options import SET, JsonOption, ThreadsOption, TrustOption
from phoneready.console import note, prepare_torch, show_progress, warn, write_result


def tune(
    config: Annotated[
        Path,
        typer.Argument(help="release.toml with [tune] and budgets.", show_default=False, metavar="CONFIG"),
    ],
    output: Path = setting(
        Path("tuned"), "Folder of the search; continued when it holds one.", option="-o --output"
    ),
    settings: tuple[str, ...] = SET,
    trust_remote_code: TrustOption = False,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Find the best quality, or the smallest file, that meets the budgets.

    Varies what [tune] lists: ratio, vocabulary, blocks, attentions, key-value groups, alignment, allocation,
    recovery, quantization, format. Each vocabulary is calibrated once; sizes are computed, and only points that may
    be the best are made and measured. Leaves tune.md, tune.json and the release.toml of the chosen point. A search
    that was interrupted goes on where it was.
    """
    prepare_torch(threads)
    from cfsp.records import record_to_json
    from phoneready.settings.release import load_config
    from phoneready.tune.result import format_result
    from phoneready.tune.run import RELEASE_FILE
    from phoneready.tune.run import tune as search

    if config.resolve() == (output / RELEASE_FILE).resolve():
        raise InputError(
            "the search would overwrite its configuration; name another folder", field="--output"
        )
    chosen = load_config(config, settings, trust_remote_code=trust_remote_code)
    warn(chosen.warnings)
    with show_progress() as progress:
        result = search(chosen, output, show=note, progress=progress, threads=threads)
    text = format_result(result) + f"\nNow: phoneready release {output / RELEASE_FILE}\n"
    write_result(text, record_to_json(result), as_json=json)
