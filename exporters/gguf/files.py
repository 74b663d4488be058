"""A checkpoint in several quantizations: an unquantized file, and what is made of it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from cfsp.errors import InputError
from cfsp.files import LargeScratch, sha256_file
from cfsp.models.checkpoint import (
    RoundedFormat,
    is_pruned_checkpoint,
    load_input_moments,
    read_rounded,
    read_rounded_format,
)
from cfsp.models.gguf_file import read_gguf
from cfsp.models.weights import safetensors_files, uniform_dtype
from cfsp.progress import Progress
from cfsp.pruning.statistics import collect_input_moments, moment_windows
from exporters.export_record import ParityReport
from exporters.family import DEFAULT_OPTIONS, ExportOptions, MadeFile
from exporters.gguf import runtime
from exporters.gguf.architecture import ChosenLayout, read_layout
from exporters.gguf.matrix import HEAD, TABLE, WHOLE_BLOCKS, FileNumbers, StoredMatrix, floored, quantize
from exporters.gguf.quants import MIXED, PARITY_CACHE, QUANTS, Quant, block_of, find_quant
from exporters.gguf.runtime import Context, FloatArray
from exporters.gguf.tensors import TensorSpec, padded, stored_bytes, tensor_specs
from exporters.gguf.writer import write_gguf
from exporters.job import Job, settled
from exporters.proof import Choice
from exporters.quantize.mixture import (
    GRADIENT_WINDOWS,
    LOOKUP,
    ROWS,
    TABLE_ROWS,
    Option,
    collect_weight_moments,
    draw,
    solve,
)
from exporters.quantize.training import RoundedModel
from exporters.recipe import OWN_KEYS

Imatrix = Mapping[str, FloatArray]
"""llama.cpp's importance matrix: tensor name -> mean squared input per channel, (in_features,), by which a block's
error in every input channel is weighted when it is quantized."""
TYPES = (
    *("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_1", "Q4_K", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K", "Q2_K"),
    *WHOLE_BLOCKS,
)
"""Of mixtures."""
_EXACT = {torch.bfloat16: QUANTS["bf16"], torch.float16: QUANTS["f16"]}
"""Of weights in a dtype, a file that holds the same numbers in as many bytes."""
_LOGITS_CHUNK = 128


class Mixture(NamedTuple):
    """Types that were chosen for a size."""

    types: dict[str, str]  # tensor -> ggml type, of all that are quantized
    loss: float  # nats a token, predicted
    file_bytes: int


@dataclass(frozen=True)
class WrittenFile:
    """A file that is not proven yet."""

    path: Path
    quant: Quant
    imatrix: Imatrix = field(default_factory=dict)  # of the tensors that were quantized with one
    mixture: Mixture | None = None
    gptq_tensors: int = 0  # matrices whose numbers were chosen for a text
    tuned_tensors: int = 0  # matrices and norms that training on it changed
    untrained: bool = False  # that was asked for and not done: it takes all of the model in memory
    trained_tensors: int = 0  # matrices that hold what training through this format's rounding has left
    slopes: Mapping[str, float] = field(default_factory=dict)  # of chosen matrices, when they were chosen
    choice: Choice | None = None  # whose numbers it has, if any were chosen for a text


def find_rows(checkpoint: Path, quants: Sequence[str], settings: ExportOptions) -> list[Quant]:
    """Rows of what is asked for, each once; InputError: an unknown one, or no text to choose types by."""
    rows = list(dict.fromkeys(find_quant(quant) for quant in quants))
    trained = read_rounded_format(checkpoint)
    for row in rows:
        is_trained = trained is not None and trained.format == row.name
        if not row.is_sized and settings.calibration is None and not is_trained:
            raise InputError("wants text to choose types by", field="quant", value=row.name)
    return rows


class Files:
    """The files of a job, in its folder as <name>-<quant>.gguf: one that others are quantized from, and these."""

    def __init__(self, job: Job, chosen: ChosenLayout, quants: Sequence[Quant]) -> None:
        self.job, self.chosen, self.quants = job, chosen, quants
        self.imatrix = self._read_imatrix()
        self.options: Mapping[str, Sequence[Option[str]]] | None = None
        self.mixed_imatrix: Imatrix = {}
        # Of a model that is read block by block the first file holds it exactly, in its own 16 bits.
        dtype = uniform_dtype(safetensors_files(job.checkpoint)) if job.settings.by_blocks else None
        self.first = _EXACT.get(dtype, QUANTS["f32"]) if dtype else QUANTS["f32"]

    @property
    def base(self) -> Path:
        return self._path(self.first)

    def _path(self, quant: Quant) -> Path:
        return self.job.folder / f"{self.job.provenance.name}-{quant.name}.gguf"

    def write(self, quant: Quant) -> WrittenFile:
        """Write one of the files, `first` before all others; InputError: llama.cpp cannot, or a size is too small."""
        job, path, imatrix, mixture = self.job, self._path(quant), self.imatrix, None
        settings, text, progress = job.settings, job.settings.calibration, job.progress
        if quant.is_plain:
            write_gguf(
                job.checkpoint, path, job.tokenizer, job.provenance, job.recipe(quant), progress=progress
            )
            return WrittenFile(path, quant)
        trained = read_rounded(job.checkpoint, quant.name)
        if trained is not None:
            types: Mapping[str, str] | None = trained.format.types
        elif quant.budget_bytes is not None and text is not None:
            mixture = self.mixture(quant, text)
            types, imatrix = mixture.types, self.mixed_imatrix
        else:
            types, imatrix = None, imatrix if quant.uses_imatrix else {}
        progress(f"quantizing {quant.name}", 0, 1)
        stated = {key: text for key, text in job.recipe(quant).metadata().items() if key in OWN_KEYS}
        quantize(
            self.base,
            path,
            quant.ftype,
            n_threads=job.n_threads,
            imatrix=imatrix,
            types=types,
            metadata=stated,
        )
        progress(f"quantizing {quant.name}", 1, 1)
        if trained is not None:
            if not quant.is_sized:
                loss = trained.format.predicted_loss or 0.0
                mixture = Mixture(dict(trained.format.types), loss, path.stat().st_size)
            numbers, count = FileNumbers(self.base, path, self.chosen), len(trained.tensors)
            numbers.put(trained)
            return WrittenFile(path, quant, imatrix, mixture, trained_tensors=count, slopes=numbers.slopes)
        file = WrittenFile(path, quant, imatrix, mixture)
        codes = settings.gptq and "gptq" in quant.reads
        scales = settings.tune_scales and "tune_scales" in quant.reads
        if text is None or not (codes or scales):
            return file
        # Codes are chosen and scales trained for the text; the file keeps what loses less on the proof's.
        plain = path.with_suffix(".plain")
        shutil.copyfile(path, plain)
        numbers, fitted = FileNumbers(self.base, path, self.chosen), file
        with job.placed() as model:
            if codes:
                numbers.fit_to_text(model, text, progress)
                fitted = replace(fitted, gptq_tensors=len(numbers.slopes))
        if scales and settings.by_blocks:
            fitted = replace(fitted, untrained=True)
        elif scales:
            with job.whole() as model:
                fitted = replace(fitted, tuned_tensors=numbers.tune(model, text, progress))
        del model
        job.drop_model()
        choice = Choice(self.measured(quant, plain), self.measured(quant, path))
        if choice.is_plain:
            plain.replace(path)
            return replace(file, choice=choice)
        plain.unlink()
        return replace(fitted, slopes=numbers.slopes, choice=choice)

    def take(self, quant: Quant, made: MadeFile) -> WrittenFile:
        """A file that an earlier export made by the same recipe, in place of `write`; InputError: it is another."""
        record, path, wanted = made.record, self._path(quant), self.job.recipe(quant)
        if replace(record.recipe, n_threads=wanted.n_threads) != wanted:
            raise InputError(f"{made.path} is made otherwise: {record.recipe.differs_from(wanted)}")
        shutil.copyfile(made.path, path)
        if sha256_file(path) != record.sha256:
            raise InputError(f"{made.path} is not the file of its record: its SHA-256 is another")
        mixture = choice = None
        if record.chosen_types:
            mixture = Mixture(record.chosen_types, record.predicted_loss or 0.0, record.file_bytes)
        if record.plain_kl is not None and record.rounded_kl is not None:
            now = self.measured(quant, path)
            plain, rounded = (replace(now, kl_mean=kl) for kl in (record.plain_kl, record.rounded_kl))
            choice = Choice(plain, rounded)
            choice = Choice(now, rounded) if choice.is_plain else Choice(plain, now)
        return WrittenFile(
            path,
            quant,
            self.imatrix if record.imatrix_tensors else {},
            mixture,
            gptq_tensors=record.gptq_tensors,
            tuned_tensors=record.tuned_tensors,
            trained_tensors=record.trained_tensors,
            slopes=record.slopes,
            choice=choice,
        )

    def measured(self, quant: Quant, path: Path) -> ParityReport:
        """Run a file in llama.cpp and hold it against the checkpoint; its limits are stored, not checked."""
        n_ctx = self.job.reference.windows.ids.shape[1]
        context = Context(n_ctx, _LOGITS_CHUNK, _LOGITS_CHUNK, PARITY_CACHE)
        with runtime.open_model(path, context, n_threads=self.job.n_threads) as model:
            return self.job.compare(quant, model.iter_logits, is_kept=quant in self.quants)

    def _read_imatrix(self) -> Imatrix:
        """The text's input moments by the file's tensor names, or else the checkpoint's; empty if none are used."""
        settings, chosen = self.job.settings, self.chosen
        used = settings.use_imatrix and any(quant.uses_imatrix for quant in self.quants)
        moments = None
        if used and settings.calibration is not None:
            with self.job.placed() as model:
                moments = collect_input_moments(model, moment_windows(settings.calibration))
        elif used:
            moments = stored_moments(self.job.checkpoint)
        needing = [quant.name for quant in self.quants if quant.needs_imatrix]
        if not moments and not needing:
            return {}
        if not moments:
            raise InputError(
                "cannot be written without an importance matrix",
                field="quant",
                value=needing[0],
                allowed="--calibration text, or a checkpoint with the input moments that prune leaves; "
                "and no --set imatrix=false",
            )
        result = {}
        for spec in (one for one in tensor_specs(chosen) if one.is_matrix):
            for source, shape in spec.sources:
                module = source.removesuffix(".weight")
                if module in moments:
                    values = moments[module].detach().to(torch.float32).numpy()
                    if values.shape != shape[1:] or not np.isfinite(values).all() or (values < 0).any():
                        what = "input moments do not belong to this checkpoint"
                        raise InputError(what, field=module, value=tuple(values.shape))
                    result[spec.name] = floored(spec.of_inputs(values))
        return result

    def mixture(self, quant: Quant, text: torch.Tensor) -> Mixture:
        """Types with which a file takes no more than its size; the smallest if it is too small and need not fit."""
        budget_bytes = quant.budget_bytes or 0
        specs = [spec for spec in tensor_specs(self.chosen) if spec.is_matrix]
        if self.options is None:
            self.options = self._measure_types(specs, text)
        matrices = {spec.name for spec in specs}
        stored = [len(tensor.data) for tensor in read_gguf(self.base).tensors if tensor.name in matrices]
        rest = self.base.stat().st_size - sum(map(padded, stored))
        least = rest + sum(each[0].n_bytes for each in self.options.values())
        if least > budget_bytes and self.job.settings.must_fit:
            raise InputError(
                "no types are small enough for the size",
                field="mixed",
                value=budget_bytes,
                allowed=f"{least} bytes or more",
            )
        chosen = solve(self.options, max(budget_bytes, least) - rest)
        return Mixture(
            {name: option.kind for name, option in chosen.items()},
            sum(option.loss for option in chosen.values()),
            rest + sum(option.n_bytes for option in chosen.values()),
        )

    def _measure_types(self, specs: Sequence[TensorSpec], text: torch.Tensor) -> dict[str, list[Option[str]]]:
        """What each type costs each tensor, the smallest first: some rows are rounded in every type."""
        job, modules = self.job, dict[str, tuple[str, ...]]()
        for spec in specs:
            readers = tuple(name.removesuffix(".weight") for name, _ in spec.sources)
            if readers == (TABLE,):
                readers = (HEAD, LOOKUP) if self.chosen.config.tie_word_embeddings else (LOOKUP,)
            modules[spec.name] = readers
        names = [name for several in modules.values() for name in several]
        with nullcontext(job.model) if job.settings.device == "cpu" else job.whole() as model:
            moments = collect_weight_moments(model, names, text[:GRADIENT_WINDOWS], progress=job.progress)
        if job.settings.use_imatrix:
            # The checkpoint's goes before what the text's few windows say.
            found = {
                spec.name: floored(spec.of_inputs(moments[modules[spec.name][0]].inputs.float().numpy()))
                for spec in specs
            }
            self.mixed_imatrix = found | dict(self.imatrix)
        options = {}
        for done, spec in enumerate(specs, 1):
            importance = self.mixed_imatrix.get(spec.name)
            losses = {
                kind: 0.0
                for kind in TYPES
                if spec.shape[1] % block_of(kind)[0] == 0
                and (kind not in WHOLE_BLOCKS or importance is not None)
            }
            for name in modules[spec.name]:
                module = job.model.get_submodule(TABLE if name == LOOKUP else name)
                weight: torch.Tensor = module.weight.detach()
                is_table = name in (HEAD, LOOKUP) or isinstance(module, nn.Embedding)
                sample = draw(weight, moments[name], TABLE_ROWS if is_table else ROWS)
                values = spec.of_inputs(weight[sample.rows].float().numpy())
                columns = torch.from_numpy(spec.of_inputs(sample.columns.numpy()))
                sample = sample._replace(columns=columns)
                for kind in losses:
                    change = StoredMatrix.nearest(values, kind, importance).values() - values
                    losses[kind] += float(sample.cost(torch.from_numpy(change)).sum())
            each = [
                Option(kind, padded(stored_bytes(spec.shape, kind)), loss)
                for kind, loss in (losses or {"F16": 0.0}).items()
            ]
            options[spec.name] = sorted(each, key=lambda option: option.n_bytes)
            job.progress("measuring types", done, len(specs))
        return options


def stored_moments(checkpoint: Path) -> dict[str, torch.Tensor] | None:
    """The input moments that pruning has left; None for any other folder."""
    return load_input_moments(checkpoint) if is_pruned_checkpoint(checkpoint) else None


def draft_gguf(
    checkpoint: Path, folder: Path, quants: Sequence[str], settings: ExportOptions = DEFAULT_OPTIONS
) -> dict[str, Path]:
    """Write the bytes that `export_gguf` writes to the caller's folder, not proven, by name of their row."""
    _, written = draft_files(checkpoint, folder, quants, settings)
    return {file.quant.name: file.path for file in written}


def draft_files(
    checkpoint: Path, folder: Path, quants: Sequence[str], settings: ExportOptions
) -> tuple[Files, list[WrittenFile]]:
    rows = find_rows(checkpoint, quants, settings)
    settings = settled(checkpoint, replace(settings, n_threads=settings.n_threads or 1), rows)
    chosen = read_layout(checkpoint)
    files = Files(Job(checkpoint, folder, settings, chosen.config, chosen.context_length), chosen, rows)
    written = [files.write(quant) for quant in dict.fromkeys((files.first, *rows))]
    if files.first not in rows:
        files.base.unlink()
    return files, [file for file in written if file.quant in rows]


def type_losses(checkpoint: Path, folder: Path, settings: ExportOptions) -> dict[str, list[Option[str]]]:
    """What each type costs each matrix of a mixture, nats a token for the text of the settings, the smallest first."""
    row = find_quant("mixed:1GB")
    settings = settled(checkpoint, settings, [row])
    chosen = read_layout(checkpoint)
    files = Files(Job(checkpoint, folder, settings, chosen.config, chosen.context_length), chosen, [row])
    assert settings.calibration is not None
    specs = [spec for spec in tensor_specs(chosen) if spec.is_matrix]
    return files._measure_types(specs, settings.calibration)


class GGUFRounding:
    """See `cfsp.recovery.rounding.Rounding`."""

    def check(self, name: str) -> None:
        """See `Rounding`: Q8_0 and floats lose nothing to speak of."""
        row = find_quant(name)
        if not row.uses_imatrix:
            allowed = ", ".join((*(known.name for known in QUANTS.values() if known.uses_imatrix), MIXED))
            raise InputError(
                "loses nothing that training could win back",
                field="for_quant",
                value=row.name,
                allowed=allowed,
            )

    def start(
        self, checkpoint: Path, name: str, input_ids: torch.Tensor, device: str, progress: Progress
    ) -> RoundedModel:
        """See `Rounding`."""
        row = find_quant(name)
        settings = ExportOptions(calibration=input_ids, device=device, progress=progress)
        with LargeScratch("rounded") as scratch:
            files, (file,) = draft_files(checkpoint, scratch.path, [row.name], settings)
            numbers = FileNumbers(file.path, file.path, files.chosen)
            placed = numbers.placed()
            types = {name: numbers.stored[name].kind.name for name in placed}
        return RoundedModel(
            RoundedFormat(row.name, types, file.mixture.loss if file.mixture else None), placed
        )
