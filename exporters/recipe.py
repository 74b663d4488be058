"""How a file is made: all that its bytes follow from, beside this tool's version and the processor's arithmetic."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from cfsp.reading import as_input_error
from cfsp.records import fields_from_json, fields_to_json

_BEFORE, _HASH = "phoneready.recipe", "phoneready.recipe_sha256"
_OWN = {"format": 32, "rounding": 64, "rounding_sha256": 66, "n_threads": 4}
"""What files of one export differ in, and the bytes that it takes at least: they are filled up, so that sizes agree."""
OWN_KEYS = (*(f"phoneready.{name}" for name in _OWN), _HASH)
"""Of `Recipe.metadata`, those in which files of one export differ; none is longer than 127 bytes."""


@dataclass(frozen=True)
class Recipe:
    """One file's. Who makes it says what goes before the export; the export adds format, rounding and hashes.

    Two recipes with the same hash give the same bytes. Text is known by the hash of its windows, as what a model writes
    differs between processors; `calibration` names it for people.
    """

    KIND: ClassVar[str] = "recipe"
    SCHEMA_VERSION: ClassVar[int] = 1

    calibration: tuple[str, ...] = ()  # names of the text, without folders
    nsamples: int = 0  # windows of it that were drawn
    seqlen: int = 0  # tokens in one
    seed: int = 0
    pruning: Mapping[str, Any] = field(default_factory=dict)  # settings; none if nothing is removed
    recovery: Mapping[str, Any] = field(default_factory=dict)
    source_sha256: str | None = None  # of the dense model's weights
    checkpoint_sha256: str | None = None  # of what is quantized, tokenizer and all
    format: str = ""
    rounding: Mapping[str, Any] = field(default_factory=dict)  # settings of the export that the format reads
    rounding_sha256: str | None = (
        None  # of the token ids that numbers are chosen for, in the checkpoint's ids
    )
    # Of torch while numbers are chosen: sums in another order give other bytes.
    n_threads: int | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(_text(fields_to_json(self)).encode()).hexdigest()

    def metadata(self) -> dict[str, str]:
        """What a file says of it under keys of our own: what all files of an export share, then its own."""
        values = fields_to_json(self)
        own = [_text(values.pop(name)).ljust(width) for name, width in _OWN.items()]
        return dict(zip((_BEFORE, *OWN_KEYS), (_text(values), *own, self.sha256), strict=True))

    def differs_from(self, other: Recipe) -> str:
        """What two recipes do not share, for people; empty if they are the same."""
        pairs = ((one.name, getattr(other, one.name), getattr(self, one.name)) for one in fields(self))
        return "; ".join(f"{name} is {theirs}, here {ours}" for name, theirs, ours in pairs if theirs != ours)


def read_recipe(metadata: Mapping[str, Any], where: str) -> Recipe | None:
    """The recipe of a file by its metadata; None if it says none. Raises InputError if it is damaged."""
    if not all(isinstance(metadata.get(key), str) for key in (_BEFORE, *OWN_KEYS)):
        return None
    with as_input_error(f"the recipe in {where} is damaged"):
        before, *own = (json.loads(metadata[key]) for key in (_BEFORE, *OWN_KEYS[:-1]))
        return fields_from_json(Recipe, {**before, **dict(zip(_OWN, own, strict=True))}, where=where)


def _text(values: Any) -> str:
    return json.dumps(values, sort_keys=True, ensure_ascii=False)
