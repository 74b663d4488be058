"""Making what one major version of transformers writes readable by the other."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from cfsp.errors import InputError
from cfsp.files import write_json
from cfsp.models.families import FAMILIES
from cfsp.models.families.row import FULL, WINDOWED
from cfsp.reading import read_json

_log = logging.getLogger(__name__)
NOTICE_PATTERNS = ("LICENSE*", "NOTICE*", "USE_POLICY*")
"""Files that have to go where a model goes."""

_OLDER = 4
"""The older major version."""
_TOKENIZER_CLASS = "PreTrainedTokenizerFast"
# Keys of tokenizer_config.json that describe where a tokenizer was loaded from, or that only one major version knows.
_DROPPED = (
    "auto_map",
    "backend",
    "gguf_file",
    "is_local",
    "local_files_only",
    "name_or_path",
    "tokenizer_file",
    "vocab_file",
)


def portable_config(stored: dict[str, Any]) -> dict[str, Any]:
    """A config.json's content with the rotary settings in both spellings.

    transformers 5 writes `rope_parameters` alone; version 4 reads `rope_theta` and `rope_scaling` and would
    silently take its defaults, where it has the model type at all. Of blocks that see a window alone it reads a base of
    their own, in some model types.

    Raises:
        InputError: They have one where version 4 reads none.
    """
    row, rope = FAMILIES[stored["model_type"]], stored.get("rope_parameters")
    if row.release > _OLDER or not isinstance(rope, dict):
        return dict(stored)
    portable = dict(stored)
    of_windows, rope = rope.get(WINDOWED), dict(rope.get(FULL, rope))
    theta = rope.pop("rope_theta", None)
    if isinstance(of_windows, dict):
        setting, base = row.window_rope_setting, of_windows["rope_theta"]
        if not setting and base != theta:
            raise InputError(
                "transformers 4 has one base for all blocks",
                field="rope_theta",
                value=base,
                allowed=str(theta),
            )
        portable |= {setting: base} if setting else {}
    if theta is not None:
        portable["rope_theta"] = theta
    portable["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    return portable


def copy_notices(source: Path, folder: Path) -> None:
    """Copy a model's licence files, but for links that would publish what lies elsewhere."""
    whole = source.resolve()
    inside = (whole, whole.parent.parent / "blobs")  # to which the files of the hub's cache are links
    for file in (file for pattern in NOTICE_PATTERNS for file in source.glob(pattern) if file.is_file()):
        if any(file.resolve().is_relative_to(place) for place in inside):
            shutil.copyfile(file, folder / file.name)
        else:
            _log.warning("%s leads out of its folder, and is not copied", file)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a fast tokenizer so that AutoTokenizer of transformers 4 and 5 reads it back unchanged.

    tokenizer.json is the whole truth of a fast tokenizer, so it is stored under the class that reads just that.

    Raises:
        InputError: Not a fast tokenizer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            "only fast tokenizers (those with a tokenizer.json) are supported", value=type(tokenizer).__name__
        )
    tokenizer.save_pretrained(folder)
    for leftover in (
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
    ):
        (folder / leftover).unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    settings = {key: value for key, value in read_json(file).items() if key not in _DROPPED}
    settings |= {"tokenizer_class": _TOKENIZER_CLASS, "model_input_names": list(tokenizer.model_input_names)}
    # Version 5 lists these under a name that version 4 expects a mapping under.
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, list):
        del settings["extra_special_tokens"]
        settings["additional_special_tokens"] = extra
    write_json(file, settings)
