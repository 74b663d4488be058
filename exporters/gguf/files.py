"""A checkpoint in several quantizations: an unquantized file, and what is made of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cfsp.errors import InputError
from cfsp.models.reference import load_tokenizer
from cfsp.models.rounded_numbers import RoundedNumbers, read_rounded, read_rounded_format
from cfsp.models.weights import safetensors_files, uniform_dtype
from exporters.export_record import ParityReport
from exporters.gguf import runtime
from exporters.gguf.architecture import read_layout
from exporters.gguf.cache_types import PARITY_CACHE
from exporters.gguf.imatrix import Imatrix, read_imatrix
from exporters.gguf.llama_library import quantize
from exporters.gguf.mixed import Mixture, TypeCosts, measure_types
from exporters.gguf.numbers import put_numbers
from exporters.gguf.quants import QUANTS, Quant, find_quant
from exporters.gguf.rounding import round_for_text
from exporters.gguf.tuning import tune_file
from exporters.gguf.writer import write_gguf
from exporters.job import held, load_checkpoint, reference_for, settled
from exporters.options import DEFAULT_OPTIONS, ExportOptions
from exporters.parity import Choice, Reference
from exporters.provenance import Provenance, read_provenance

_EXACT = {torch.bfloat16: QUANTS["bf16"], torch.float16: QUANTS["f16"]}
"""Of weights in a dtype, a file that holds the same numbers in as many bytes."""
_LOGITS_CHUNK = 128
Judge = Callable[[Quant, Path], ParityReport]
"""How far a file is from the checkpoint, on the proof's text."""


@dataclass(frozen=True)
class WrittenFile:
    """A file that is not proven yet.

    Attributes:
        path: Where it is.
        quant: What it is.
        imatrix: The importance matrix that it was quantized with, of the tensors that have one.
        mixture: Where types were chosen for a size.
        gptq_tensors: Matrices whose numbers were chosen for a text.
        tuned_tensors: Tensors that training on it changed: matrices in their scales, and norms.
        untrained: Whether that was asked for and not done: it takes all of the model in memory.
        trained_tensors: Matrices that hold what training through this format's rounding has left.
        slopes: Of matrices whose numbers were chosen, when they were (`exporters.matrices`).
        choice: Whose numbers it has, if any were chosen for a text.
    """

    path: Path
    quant: Quant
    imatrix: Imatrix = field(default_factory=dict)
    mixture: Mixture | None = None
    gptq_tensors: int = 0
    tuned_tensors: int = 0
    untrained: bool = False
    trained_tensors: int = 0
    slopes: Mapping[str, float] = field(default_factory=dict)
    choice: Choice | None = None


def find_rows(checkpoint: Path, quants: Sequence[str], settings: ExportOptions) -> list[Quant]:
    """Rows of what is asked for, each once.

    Raises:
        InputError: An unknown one; or types are to be chosen and there is no text to choose them by.
    """
    rows = list(dict.fromkeys(find_quant(quant) for quant in quants))
    trained = read_rounded_format(checkpoint)
    for row in rows:
        if trained is not None and trained.format == row.name:
            continue
        if row.budget_bytes is not None and settings.calibration is None:
            raise InputError("wants text to choose types by", field="quant", value=row.name)
    return rows


def imatrix_for(checkpoint: Path, quants: Sequence[Quant], settings: ExportOptions) -> Imatrix:
    """The importance matrix of an export; raises InputError as `read_imatrix`."""
    return read_imatrix(
        checkpoint,
        quants,
        settings.calibration,
        use=settings.use_imatrix,
        device=settings.device,
        keeping=settings.keeping,
    )


def base_of(checkpoint: Path, *, by_blocks: bool) -> Quant:
    """What files are quantized from: float32, or of a model that is read block by block what holds it exactly."""
    dtype = uniform_dtype(safetensors_files(checkpoint)) if by_blocks else None
    return _EXACT.get(dtype, QUANTS["f32"]) if dtype else QUANTS["f32"]


def write_files(
    checkpoint: Path,
    folder: Path,
    quants: Sequence[Quant],
    tokenizer: Any,
    provenance: Provenance,
    *,
    imatrix: Imatrix,
    judge: Judge,
    n_threads: int,
    settings: ExportOptions = DEFAULT_OPTIONS,
) -> Iterator[WrittenFile]:
    """Write folder/<name>-<quant>.gguf: one that others are quantized from, then each that is asked for.

    The first is deleted at the end where it is not asked for.

    Args:
        checkpoint: Hugging Face folder.
        folder: Where to write.
        quants: What to write.
        tokenizer: The checkpoint's PreTrainedTokenizerFast.
        provenance: The checkpoint's.
        imatrix: By `read_imatrix`.
        judge: Says whether numbers that are chosen for a text are better than the plain quantizer's.
        n_threads: Threads of the quantizer.
        settings: The text that types are chosen by and numbers for, whether the types must fit, and who is told about
            every step.

    Raises:
        InputError: The checkpoint is unusable, or llama.cpp cannot represent or quantize it; a size is too small; or
            what layers read of the text is not finite.
    """
    base = base_of(checkpoint, by_blocks=settings.by_blocks)
    paths = {quant: folder / f"{provenance.name}-{quant.name}.gguf" for quant in (base, *quants)}
    files = _Files(checkpoint, paths[base], tokenizer, provenance, imatrix, judge, n_threads, settings)
    for quant, path in paths.items():
        yield files.write(quant, path)
    if base not in quants:
        paths[base].unlink()


@dataclass
class _Files:
    """What all files of a checkpoint share; `base` is the one that others are quantized from."""

    checkpoint: Path
    base: Path
    tokenizer: Any
    provenance: Provenance
    imatrix: Imatrix
    judge: Judge
    n_threads: int
    settings: ExportOptions
    costs: TypeCosts | None = None

    def write(self, quant: Quant, path: Path) -> WrittenFile:
        """One of them."""
        progress = self.settings.progress
        if quant.is_plain:
            write_gguf(
                self.checkpoint, path, self.tokenizer, self.provenance, quant=quant.name, progress=progress
            )
            return WrittenFile(path, quant)
        trained = read_rounded(self.checkpoint, quant.name)
        if trained is not None:
            return self._write_trained(quant, path, trained)
        used, mixture = self.imatrix if quant.uses_imatrix else {}, None
        if quant.budget_bytes is not None and self.settings.calibration is not None:
            costs = self._measured(self.settings.calibration)
            used, mixture = costs.imatrix, costs.choose(quant.budget_bytes, must_fit=self.settings.must_fit)
        self._quantize(quant, path, used, mixture.types if mixture else None)
        return self._fit_to_text(WrittenFile(path, quant, used, mixture))

    def _write_trained(self, quant: Quant, path: Path, numbers: RoundedNumbers) -> WrittenFile:
        """A file whose matrices are those that training has left; the rest is the checkpoint's."""
        stored = numbers.format
        self._quantize(quant, path, self.imatrix, stored.types)
        mixture = None
        if quant.budget_bytes is not None:
            mixture = Mixture(dict(stored.types), stored.predicted_loss or 0.0, path.stat().st_size)
        count = put_numbers(self.base, path, numbers)
        # The checkpoint's weights are what these numbers stand for.
        slopes = dict.fromkeys(numbers.tensors, 1.0)
        return WrittenFile(path, quant, self.imatrix, mixture, trained_tensors=count, slopes=slopes)

    def _fit_to_text(self, file: WrittenFile) -> WrittenFile:
        """Choose a file's codes and train its scales for the text, if that is asked for, and if it loses less then."""
        text, reads, settings = self.settings.calibration, file.quant.reads, self.settings
        codes = settings.gptq and "gptq" in reads
        scales = settings.tune_scales and "tune_scales" in reads
        if text is None or not (codes or scales):
            return file
        path, fitted = file.path, file
        plain = path.with_suffix(".plain")
        shutil.copyfile(path, plain)
        where: dict[str, Any] = {"device": settings.device, "progress": settings.progress}
        if codes:
            chosen = round_for_text(self.checkpoint, self.base, path, text, keeping=settings.keeping, **where)
            fitted = replace(fitted, gptq_tensors=len(chosen), slopes=chosen)
        if scales and settings.by_blocks:
            fitted = replace(fitted, untrained=True)
        elif scales:
            tuned = tune_file(self.checkpoint, self.base, path, text, **where)
            fitted = replace(fitted, tuned_tensors=len(tuned), slopes={**fitted.slopes, **tuned})
        choice = Choice(self.judge(file.quant, plain), self.judge(file.quant, path))
        if choice.is_plain:
            plain.replace(path)
        else:
            plain.unlink()
        return replace(file if choice.is_plain else fitted, choice=choice)

    def _quantize(self, quant: Quant, path: Path, used: Imatrix, types: Mapping[str, str] | None) -> None:
        self.settings.progress(f"quantizing {quant.name}", 0, 1)
        quantize(self.base, path, quant.ftype, n_threads=self.n_threads, imatrix=used, types=types)
        self.settings.progress(f"quantizing {quant.name}", 1, 1)

    def _measured(self, text: torch.Tensor) -> TypeCosts:
        """What types cost, measured once."""
        if self.costs is None:
            self.costs = measure_types(
                self.checkpoint,
                self.base,
                text,
                self.imatrix if self.settings.use_imatrix else None,
                device=self.settings.device,
                keeping=self.settings.keeping,
                progress=self.settings.progress,
            )
        return self.costs


def draft_gguf(
    checkpoint: Path, folder: Path, quants: Sequence[str], settings: ExportOptions = DEFAULT_OPTIONS
) -> dict[str, Path]:
    """Write files for a search: the bytes that `export_gguf` writes, but not proven.

    A search looks at many such files, and what it chooses is exported properly.

    Args:
        checkpoint: Checkpoint folder.
        folder: Where to write; the caller's to make and to clear.
        quants: Names from QUANTS.
        settings: As for `export_gguf`; one thread unless it says more.

    Returns:
        Name of the quantization's row -> file.

    Raises:
        InputError: Unknown quant, one that wants text and gets none, unusable checkpoint, or llama.cpp cannot
            represent or quantize it.
        MissingExtraError: llama-cpp-python is not installed.
    """
    return {file.quant.name: file.path for file in _drafts(checkpoint, folder, quants, settings)}


def draft_file(checkpoint: Path, folder: Path, quant: str, settings: ExportOptions) -> WrittenFile:
    """As `draft_gguf`, of one quantization, with what is known of the file."""
    (file,) = _drafts(checkpoint, folder, [quant], settings)
    return file


def _drafts(
    checkpoint: Path, folder: Path, quants: Sequence[str], settings: ExportOptions
) -> list[WrittenFile]:
    rows = find_rows(checkpoint, quants, settings)
    settings = settled(checkpoint, settings)
    tokenizer = load_tokenizer(checkpoint.resolve())  # a bare name could be a built-in alias
    n_threads = settings.n_threads or 1

    @cache
    def reference() -> Reference:
        chosen = read_layout(checkpoint)
        model = load_checkpoint(checkpoint, by_blocks=settings.by_blocks)
        return reference_for(model, tokenizer, chosen.context_length, chosen.config, settings)

    written = write_files(
        checkpoint,
        folder,
        rows,
        tokenizer,
        read_provenance(checkpoint, settings.name),
        imatrix=imatrix_for(checkpoint, rows, settings),
        judge=lambda quant, path: measured(quant, path, reference(), n_threads, settings),
        n_threads=n_threads,
        settings=settings,
    )
    return [file for file in written if file.quant in rows]


def measured(
    quant: Quant, path: Path, reference: Reference, n_threads: int, settings: ExportOptions
) -> ParityReport:
    """Run a file in llama.cpp and hold it against the checkpoint; its limits are stored, not checked."""
    with runtime.open_model(
        path,
        n_ctx=reference.windows.ids.shape[1],
        n_threads=n_threads,
        n_batch=_LOGITS_CHUNK,
        n_ubatch=_LOGITS_CHUNK,
        cache_type=PARITY_CACHE,
    ) as model:
        return held(reference, quant, model.iter_logits, settings)
