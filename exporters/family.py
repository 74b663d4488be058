"""A family of exports: what a kind of file is to everything that makes, finds, runs and releases files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cfsp.errors import InputError, require_extra
from cfsp.progress import Progress, no_progress
from exporters.export_record import ExportFormat, ExportRecord, ParityLimits
from exporters.recipe import Recipe

if TYPE_CHECKING:
    import torch  # not in the memory of a process that only runs a file

    from cfsp.models.offload import Keeping
    from cfsp.recovery.rounding import Rounding


class MadeFile(NamedTuple):
    """A file of an earlier export, and its record."""

    path: Path
    record: ExportRecord


@dataclass(frozen=True)
class ExportOptions:
    """How to export, whatever the family; a format's row says which of the fields it reads beside the common ones."""

    name: str | None = None  # of the model, for titles and file names; the source model's by default
    use_imatrix: bool = True  # quantize with the checkpoint's input moments, or the text's
    # Token ids (nsamples, seqlen) that weights of few bits are rounded for and types chosen by.
    calibration: torch.Tensor | None = None
    gptq: bool = True  # round the matrices of GGUF files for that text
    tune_scales: bool = False  # train their scales and norms on it, too
    mixed_bytes: int | None = None  # most of an ONNX mixture; by default 1.1 times what weights take in Q4_0
    must_fit: bool = True  # refuse a GGUF file for a size that is too small; else the smallest is made
    opset: int | None = None  # of ONNX; 21 by default
    parity_windows: torch.Tensor | None = None  # ids (n_windows, seqlen); by default built-in English prose
    limits: Mapping[str, ParityLimits] | None = None  # by format's name, in place of the table's
    device: str = "cpu"  # where numbers of few bits are chosen; files are proven on the CPU
    dtype: str = "auto"  # of weights while numbers are chosen, a name in `cfsp.precision.DTYPES`
    by_blocks: bool = False  # weights stay in their files; decided once by each export, as is the dtype
    n_threads: int | None = None  # of quantizers and of the parity run; torch's number by default
    recipe: Recipe = field(default_factory=Recipe)  # what was done before the export
    made: Mapping[str, MadeFile] | None = None  # format -> a file that is taken as it is, and proven
    warnings: tuple[str, ...] = ()  # what was asked for and has no effect, for the record
    force: bool = False  # replace an existing output folder
    progress: Progress = no_progress

    def limits_of(self, row: ExportFormat) -> ParityLimits:
        """Bounds of a format's files."""
        return (self.limits or {}).get(row.name, row.limits)

    @property
    def keeping(self) -> Keeping:
        """How weights are kept."""
        from cfsp.models.offload import NARROW, WHOLE, Keeping

        return Keeping(NARROW.get(self.dtype, WHOLE.dtype), self.by_blocks)


DEFAULT_OPTIONS = ExportOptions()


class FileOutline(NamedTuple):
    """What a file says without being run: all that is needed to ask an engine elsewhere about texts."""

    path: Path  # what an engine opens, one that gives the logits of every position
    sha256: str
    source_sha256: str | None  # of the dense model's weights that it was made from, if it says so
    tokenizer: Any  # transformers'
    vocab_size: int  # length of a row of logits
    context_length: int  # most tokens of one text
    n_batch: int  # tokens that are given to the engine at once
    n_seq: int = 1  # texts that the engine has at once
    cache_type: str | None = None  # of keys and values, that of proofs; None for the file's own
    ends: tuple[int, ...] = ()  # tokens that end a text, if the engine does not know them


class ExportedModel(NamedTuple):
    """One model in one format, as a family's export leaves it."""

    name: str  # in a release folder
    root: Path  # the file, or the folder
    path: Path  # what a benchmark opens: the file, or the one that gives the last position's logits


@dataclass(frozen=True)
class ExportFamily:
    """A family. What is heavy or optional is imported inside its functions."""

    name: str  # of its folder, and `format` in records
    title: str  # what its files are, for people
    formats: Mapping[str, ExportFormat]
    find: Callable[[str], ExportFormat]  # row of a name in any case; InputError names the known ones
    # (checkpoint, output, formats, settings) -> records; writes output/..., and output/export.json.
    export: Callable[[Path, Path, Sequence[str], ExportOptions], tuple[ExportRecord, ...]]
    # (folder of an export, stem of names, format) -> the model there; raises InputError if there is none.
    locate: Callable[[Path, str, str], ExportedModel]
    runtime: str  # what runs the files, as users say it
    # (reference, most tokens, threads, type of the key-value cache or None) -> a cfsp.evaluation.LanguageModel.
    open_model: Callable[[str, int, int | None, str | None], Any]
    outline: Callable[[str, int], FileOutline]  # (reference, most tokens) -> what it says without being run
    claims: Callable[[str], bool]  # whether a reference is a file or folder of this family
    needs: Mapping[str, str]  # import name -> distribution, of what an export wants
    extra: str  # of phoneready, that brings them
    for_size: str | None = None  # a further format, `NAME:SIZE`, whose row is made for the size
    through: Callable[[], Rounding] | None = None  # what lets training go through its rounding
    cache_types: tuple[str, ...] = ()  # of the key-value cache, that its runtime can be asked for
    own_cache: str | None = None  # the one that phones run with by default; None for that of the file

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
            raise InputError(f"{self.runtime} only runs {self.title}", field="model", value=reference)
