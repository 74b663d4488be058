"""A family of exports: what a kind of file is to everything that makes, finds, runs and releases files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.errors import InputError, require_extra
from cfsp.progress import Progress, no_progress
from exporters.export_record import ExportFormat, ExportRecord, ParityLimits

if TYPE_CHECKING:
    import torch  # not in the memory of a process that only runs a file

    from cfsp.models.offload import Keeping
    from cfsp.recovery.rounding import Rounding


@dataclass(frozen=True)
class ExportOptions:
    """How to export, whatever the family; a format's row says which of the fields it reads beside the common ones.

    Attributes:
        name: Short name of the model for titles and file names; the source model's by default.
        use_imatrix: Quantize with the checkpoint's input moments, if a format wants them and there are some.
        calibration: Token ids (nsamples, seqlen) that weights of few bits are rounded for and types chosen by; nearest
            numbers without.
        gptq: Round the matrices of GGUF files for that text; else only llama.cpp's quantizer rounds them.
        tune_scales: Train the scales and norms of GGUF files on it, too.
        mixed_bytes: Most that a mixture of bits may take; by default 1.1 times what weights take in GGUF's Q4_0.
        must_fit: Refuse a GGUF file for a size that is too small; else the smallest is made.
        opset: Of ONNX's own operators, for runtimes that do not know new ones; 21 by default.
        parity_windows: Token ids (n_windows, seqlen); by default windows of built-in English prose.
        limits: Bounds by format's name, in place of the table's.
        device: Where numbers of few bits are chosen, as torch writes it; files are proven on the CPU, where they run.
        dtype: That weights are kept in while numbers are chosen, a name in `cfsp.precision.DTYPES`.
        by_blocks: Whether the model's weights stay in their files; decided by each export, once, as the dtype is.
        n_threads: Threads of quantizers and of the parity run; torch's number by default.
        warnings: What was asked for and has no effect, for the record.
        force: Replace an existing output folder.
        progress: Told about every step.
    """

    name: str | None = None
    use_imatrix: bool = True
    calibration: torch.Tensor | None = None
    gptq: bool = True
    tune_scales: bool = False
    mixed_bytes: int | None = None
    must_fit: bool = True
    opset: int | None = None
    parity_windows: torch.Tensor | None = None
    limits: Mapping[str, ParityLimits] | None = None
    device: str = "cpu"
    dtype: str = "auto"
    by_blocks: bool = False
    n_threads: int | None = None
    warnings: tuple[str, ...] = ()
    force: bool = False
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


@dataclass(frozen=True)
class FileOutline:
    """What a file says without being run: all that is needed to ask an engine elsewhere about texts.

    Attributes:
        path: What an engine opens, one that gives the logits of every position.
        sha256: Its hash.
        source_sha256: Hash of the dense model's weights that it was made from, if it says so.
        tokenizer: A transformers tokenizer.
        vocab_size: Length of a row of logits.
        context_length: Most tokens of one text.
        n_batch: Tokens that are given to the engine at once.
        n_seq: Texts that the engine has at once.
        cache_type: Of keys and values, that of proofs, as the engine calls it; None for the file's own.
        ends: Tokens that end a text, if the engine does not know them.
    """

    path: Path
    sha256: str
    source_sha256: str | None
    tokenizer: Any
    vocab_size: int
    context_length: int
    n_batch: int
    n_seq: int = 1
    cache_type: str | None = None
    ends: tuple[int, ...] = ()


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
        locate: (folder of an export, stem of names, format) -> the model there; raises InputError if there is none.
        runtime: What runs the files, as users say it.
        open_model: (reference, most tokens, threads, type of the key-value cache or None) -> a
            cfsp.evaluation.LanguageModel.
        outline: (reference, most tokens) -> what it says without being run.
        claims: Whether a reference is a file or folder of this family.
        needs: Import name -> distribution, of what an export wants.
        extra: Extra of phoneready that brings them.
        through: What lets training go through its rounding; None if nothing does.
        for_size: A further format, `NAME:SIZE`, whose row is made for the size.
        cache_types: Types of the key-value cache that its runtime can be asked for.
        own_cache: The one that phones run with by default; None for that of the file.
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
            raise InputError(f"{self.runtime} only runs {self.title}", field="model", value=reference)
