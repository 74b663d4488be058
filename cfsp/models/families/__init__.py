"""Families of models: one row is all that loading, pruning and exporters know of a model type.

Another distribution brings one by an entry point, whose name is the model type:

    [project.entry-points."phoneready.families"]
    toy = "phoneready_toy:FAMILY"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType

from cfsp.errors import look_up
from cfsp.models.families import folds, gemma, lfm2, llama, qwen35
from cfsp.models.families.row import Family, Fold, Settings
from cfsp.plugins import FAMILIES as GROUP
from cfsp.plugins import load_plugins

_FILES = (llama, gemma, lfm2, qwen35)
BUILT_IN: dict[str, Family] = {row.model_type: row for file in _FILES for row in file.FAMILIES}


@cache
def _own() -> Mapping[str, Family]:
    """Rows of other distributions."""
    return {name: plugin.load(Family) for name, plugin in load_plugins(GROUP, BUILT_IN).items()}


class _Families(Mapping[str, Family]):
    """Built-in rows first; other distributions are asked only for a model type that has none."""

    def __getitem__(self, model_type: str) -> Family:
        return BUILT_IN[model_type] if model_type in BUILT_IN else _own()[model_type]

    def __iter__(self) -> Iterator[str]:
        return iter((*BUILT_IN, *_own()))

    def __len__(self) -> int:
        return len(BUILT_IN) + len(_own())


FAMILIES: Mapping[str, Family] = _Families()  # by model type
FOLDS: Mapping[str, Fold] = MappingProxyType({fold.model_type: fold for fold in (*folds.FOLDS, *lfm2.FOLDS)})
"""By the model type that is loaded as another one."""
_UNSUPPORTED = "unsupported architecture"


def family_of(model_type: str, where: str = "") -> Family | Fold:
    """The family of a model type, or the fold of one that has none; raises InputError, naming the known ones."""
    if model_type in BUILT_IN:
        return BUILT_IN[model_type]
    known: dict[str, Family | Fold] = {**FOLDS, **FAMILIES}
    return look_up(known, model_type, where + _UNSUPPORTED, field="model_type")


def fold_of(settings: Settings) -> Fold | None:
    """How a model of these settings is loaded as another type; None if it is loaded as it is."""
    fold = FOLDS.get(str(settings.get("model_type")))
    return fold if fold is not None and fold.applies(settings) else None


def family_of_gguf(architecture: str, where: str, *, windowed: bool) -> Family:
    """The family that files of an architecture are read as, the first one that is alike in sliding windows."""
    rows = {fold.gguf_name: FAMILIES[fold.target] for fold in FOLDS.values() if fold.gguf_name}
    for row in sorted(BUILT_IN.values(), key=lambda row: row.has_windows != windowed):
        rows.setdefault(row.gguf_name, row)
    if architecture not in rows:
        rows |= {row.gguf_name: row for row in _own().values()}
    return look_up(rows, architecture, f"{where}: {_UNSUPPORTED}", field="general.architecture")


def text_model_of(folder_type: str) -> str | None:
    """Model type of the text part of a multimodal folder's type; None of any other."""
    return next((row.model_type for row in FAMILIES.values() if folder_type in row.folders), None)
