"""`phoneready init`: a configuration to begin with."""

from __future__ import annotations

import os
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
from phoneready.settings.template import gate_text, release_text, template_text


def init(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, metavar="[MODEL]")] = None,
    output: Path = setting(Path("release.toml"), "File to write.", option="-o --output", metavar="FILE"),
    found: Path | None = setting(
        None, "Ship the best file of a search, as it is.", option="--from", metavar="search.json"
    ),
    max_size: int | None = setting(
        None, "Largest file: its weights get the types that lose least.", metavar="SIZE", parse=parse_bytes
    ),
    max_kl: float | None = setting(None, "Largest mean KL divergence from the model, in nats.", gt=0),
    every: bool = setting(False, "Write every setting, with its default and a word on it.", option="--all"),
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Write a release.toml of a few lines: a file, and the budgets that it must keep.

    Edit it, then run `phoneready release FILE`. Of a search it has the model, the text, the limits and the file.
    """
    if output.is_dir():
        raise InputError("a folder; name the file", field="-o", value=str(output))
    if every and (max_size or max_kl):
        raise InputError("--all writes every setting; set the limits in its budgets", field="--all")
    if found is not None and (model or max_size or max_kl or every):
        raise InputError("a search has a model and limits: leave out the others", field="--from")
    refuse_existing(output, force=force, like=re.compile(rb"^\s*\[model\]", re.MULTILINE))
    model = model or "smollm2-135m"
    if found is not None:
        text = _searched(found, output.parent)
    else:
        text = template_text(model) if every else gate_text(model, max_size, max_kl)
    write_text(output, text)
    write_result(
        f"Written to {output}; next: phoneready release {output}", {"file": str(output)}, as_json=json
    )


def _searched(path: Path, folder: Path) -> str:
    """The release that ships the best file of a search; raises InputError if it is not there any more."""
    from cfsp.files import sha256_file
    from cfsp.records import read_record
    from cfsp.text.settings import SELF
    from phoneready.release.steps import CALIBRATION_FILE
    from phoneready.search.point import GENERATED
    from phoneready.search.record import SearchRecord

    record = read_record(SearchRecord, path)
    best, place = record.find(record.best), path.parent
    if best is None:
        why = (
            f"no file is within {record.asked}"
            if record.limits
            else "the search had no limits, such as --max-size"
        )
        raise InputError(f"{path} names no best file: {why}", field="--from")
    if not (place / best.file).is_file() or sha256_file(place / best.file) != best.sha256:
        state = "was changed" if (place / best.file).is_file() else "is not there any more"
        raise InputError(f"{place / best.file} {state}: run the search again", field="--from")

    def near(name: str | Path) -> str:
        """As it is written in a file in `folder`."""
        return os.path.relpath(name, folder.resolve()) if Path(name).exists() else str(name)

    base, text = record.base, best.texts[0]
    drawn = base.prune.calibration
    targets = [] if record.place is None or best.projected else [record.place]
    sections = {
        "": {"seed": base.seed},
        "model": base.model.model_dump(exclude_defaults=True) | {"reference": near(base.model.reference)},
        "prune": {
            "prune_ratio": best.point.ratio,
            "vocabulary": best.point.vocabulary,
            # What the model has written stays with the search: another machine's arithmetic writes another text.
            "calibration": [near(place / CALIBRATION_FILE)]
            if SELF in drawn
            else [near(one) for one in drawn],
            "nsamples": base.prune.nsamples,
            "seqlen": base.prune.seqlen,
        },
        "evaluate": {
            **{
                kind: [near(source) for of, source in record.sources if of == kind]
                for kind in ("text", "chats")
            },
            "seqlen": text.seqlen,
            "max_windows": max(len(one.n_bytes) for one in best.texts),
        },
        "quantize": {"to": [best.point.quant], "made": near(place)},
        "bench": {
            "n_gen": [GENERATED],
            **({"targets": targets} if targets else {}),
            **({"devices": [record.place]} if best.projected else {}),
        },
    }
    limits = (one.model_dump(exclude_defaults=True) for one in record.limits)
    return release_text(f"What `phoneready search` found for {record.asked}.", sections, limits)
