"""A family of exports: what a kind of file is to everything that makes, finds, runs and releases files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.errors import InputError, require_extra
from exporters.export_record import ExportFormat, ExportRecord
from exporters.options import ExportOptions
from exporters.outline import FileOutline

if TYPE_CHECKING:
    from cfsp.recovery.rounding import Rounding
    from exporters.provenance import Provenance  # not in the memory of a process that runs a file alone


@dataclass(frozen=True)
class ExportedModel:
    """One model in one format, as a family's export leaves it.

    Attributes:
        name: What it is called in a release folder.
        root: The file, or the folder.
        path: What a benchmark opens: the file, or the one in the folder that gives the last position's logits.
    """

    name: str
    root: Path
    path: Path


@dataclass(frozen=True)
class ExportFamily:
    """A family. What is heavy or optional is imported inside its functions.

    Attributes:
        name: Of its folder, and `format` in records.
        setting: Key of [export] in release.toml that lists its formats.
        title: What its files are, for people.
        formats: Name -> row.
        find: Row of a name in any case; raises InputError that names the known ones.
        export: (checkpoint, output, formats, settings) -> records; writes output/..., and output/export.json.
        locate: (folder of an export, stem of names, format) -> the model there; raises InputError where there is none.
        runtime: What runs the files, as users say it.
        open_model: (reference, most tokens, threads, type of the key-value cache or None) -> a
            cfsp.evaluation.LanguageModel.
        outline: (reference, most tokens) -> what it says without being run.
        claims: Whether a reference is a file or folder of this family.
        needs: Import name -> distribution, of what an export wants.
        extra: Extra of phoneready that brings them.
        draft: Writes the same files into a folder, not proven, where their size follows from the shape of the model
            alone; None where only an export shows it, or where `largest_size` does without files.
        largest_size: (outline of a model, format, origin) -> most bytes of its files, where they follow from its shape.
        through: What lets training go through its rounding; None where nothing does.
        for_size: A further format, `NAME:SIZE`, whose row is made for the size; None where there is none.
        cache_types: Types of the key-value cache that its runtime can be asked for.
        own_cache: The one that phones run with where nothing is asked for; None for that of the file.
    """

    name: str
    setting: str
    title: str
    formats: Mapping[str, ExportFormat]
    find: Callable[[str], ExportFormat]
    export: Callable[[Path, Path, Sequence[str], ExportOptions], tuple[ExportRecord, ...]]
    locate: Callable[[Path, str, str], ExportedModel]
    runtime: str
    open_model: Callable[[str, int, int | None, str | None], Any]
    outline: Callable[[str, int], FileOutline]
    claims: Callable[[str], bool]
    needs: Mapping[str, str]
    extra: str
    draft: Callable[[Path, Path, Sequence[str], ExportOptions], Mapping[str, Path]] | None = None
    largest_size: Callable[[Any, str, Provenance], int] | None = None
    for_size: str | None = None
    through: Callable[[], Rounding] | None = None
    cache_types: tuple[str, ...] = ()
    own_cache: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What can be asked for."""
        return (*self.formats, *([self.for_size] if self.for_size else ()))

    def has(self, name: str) -> bool:
        """Whether a format is one of its own, in whatever case it is written."""
        if self.for_size and re.split("[:-]", name)[0].lower() == self.for_size.partition(":")[0]:
            return True
        return any(known.lower() == name.lower() for known in self.formats)

    def require(self) -> None:
        """Raise MissingExtraError for what is not installed."""
        for package, distribution in self.needs.items():
            require_extra(package, self.extra, distribution)

    def check_cache(self, cache_type: str | None) -> None:
        """Raise InputError for a type of the key-value cache that its runtime cannot be asked for."""
        if cache_type is not None and cache_type not in self.cache_types:
            raise InputError(
                f"{self.runtime} has no such cache",
                field="cache_type",
                value=cache_type,
                allowed=", ".join(self.cache_types) or "without it",
            )

    def check_claim(self, reference: str) -> None:
        """Raise InputError for what its runtime does not run."""
        if not self.claims(reference):
            raise InputError(f"{self.runtime} runs {self.title} alone", field="model", value=reference)
