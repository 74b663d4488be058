"""A checkpoint in several quantizations: an unquantized file, and what is made of it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cfsp.errors import InputError
from cfsp.files import LargeScratch
from cfsp.models.checkpoint import (
    RoundedFormat,
    RoundedNumbers,
    is_pruned_checkpoint,
    load_input_moments,
    read_rounded,
    read_rounded_format,
)
from cfsp.models.gguf_file import read_gguf
from cfsp.models.weights import safetensors_files, uniform_dtype
from cfsp.progress import Progress
from cfsp.pruning.statistics import collect_input_moments
from exporters.export_record import ParityReport
from exporters.family import DEFAULT_OPTIONS, ExportOptions
from exporters.gguf import runtime
from exporters.gguf.architecture import ChosenLayout, read_layout
from exporters.gguf.cache_types import PARITY_CACHE
from exporters.gguf.matrix import WHOLE_BLOCKS, StoredMatrix, block_of, floored, quantize
from exporters.gguf.numbers import FileNumbers
from exporters.gguf.quants import MIXED, QUANTS, Quant, find_quant
from exporters.gguf.runtime import Context, FloatArray
from exporters.gguf.size import padded
from exporters.gguf.tensors import TensorSpec, linear_inputs, tensor_specs
from exporters.gguf.writer import write_gguf
from exporters.job import Job, settled
from exporters.proof import Choice
from exporters.quantize.mixture import (
    GRADIENT_WINDOWS,
    LOOKUP,
    ROWS,
    TABLE_ROWS,
    Option,
    Sample,
    WeightMoments,
    collect_weight_moments,
    draw,
    solve,
)
from exporters.quantize.training import RoundedModel

Imatrix = Mapping[str, FloatArray]
"""llama.cpp's importance matrix: tensor name -> mean squared input per channel, (in_features in the file,), by which a
block's error in every input channel is weighted when it is quantized."""
TYPES = (
    *("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_1", "Q4_K", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K", "Q2_K"),
    *WHOLE_BLOCKS,
)
"""Of mixtures."""
_SLOW = {"IQ2_S": "IQ3_S"}
"""Types of which ggml rounds few weights in the time that all others take, and one that costs rows alike: some rows
tell how much more a slow one costs."""
_FEW_ROWS = 16
_EXACT = {torch.bfloat16: QUANTS["bf16"], torch.float16: QUANTS["f16"]}
"""Of weights in a dtype, a file that holds the same numbers in as many bytes."""
_HEAD, _TABLE = "lm_head", "model.embed_tokens"
_LOGITS_CHUNK = 128


@dataclass(frozen=True)
class Mixture:
    """Types that were chosen for a size.

    Attributes:
        types: Tensor -> ggml type, of all that are quantized.
        loss: Nats a token, predicted.
        file_bytes: Size of the file.
    """

    types: dict[str, str]
    loss: float
    file_bytes: int


@dataclass(frozen=True)
class WrittenFile:
    """A file that is not proven yet.

    Attributes:
        path: Where it is.
        quant: What it is.
        imatrix: The importance matrix that it was quantized with, of the tensors that have one.
        mixture: Types that were chosen for a size.
        gptq_tensors: Matrices whose numbers were chosen for a text.
        tuned_tensors: Tensors that training on it changed: matrices in their scales, and norms.
        untrained: Whether that was asked for and not done: it takes all of the model in memory.
        trained_tensors: Matrices that hold what training through this format's rounding has left.
        slopes: Of matrices whose numbers were chosen, when they were (`exporters.proof`).
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
        is_trained = trained is not None and trained.format == row.name
        if row.budget_bytes is not None and settings.calibration is None and not is_trained:
            raise InputError("wants text to choose types by", field="quant", value=row.name)
    return rows


class Files:
    """The files of a job: one that others are quantized from, and what is made of it.

    Args:
        job: Whose folder they are written to, as <name>-<quant>.gguf.
        chosen: How the model goes into them.
        quants: What is to be written.

    Raises:
        InputError: A quantization wants an importance matrix and there is none.
    """

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
        """The first file."""
        return self._path(self.first)

    def _path(self, quant: Quant) -> Path:
        return self.job.folder / f"{self.job.provenance.name}-{quant.name}.gguf"

    def write(self) -> Iterator[WrittenFile]:
        """Each file, the first one first; it is deleted at the end unless it is asked for.

        Raises:
            InputError: The checkpoint is unusable, or llama.cpp cannot represent or quantize it; a size is too small;
                or what layers read of the text is not finite.
        """
        for quant in dict.fromkeys((self.first, *self.quants)):
            yield self._write(quant, self._path(quant))
        if self.first not in self.quants:
            self.base.unlink()

    def _write(self, quant: Quant, path: Path) -> WrittenFile:
        job = self.job
        if quant.is_plain:
            origin, progress = job.provenance, job.progress
            write_gguf(job.checkpoint, path, job.tokenizer, origin, quant=quant.name, progress=progress)
            return WrittenFile(path, quant)
        trained = read_rounded(job.checkpoint, quant.name)
        if trained is not None:
            return self._write_trained(quant, path, trained)
        used, mixture = self.imatrix if quant.uses_imatrix else {}, None
        if quant.budget_bytes is not None and job.settings.calibration is not None:
            mixture = self.mixture(quant.budget_bytes, job.settings.calibration)
            used = self.mixed_imatrix
        self._quantize(quant, path, used, mixture.types if mixture else None)
        return self._fit_to_text(WrittenFile(path, quant, used, mixture))

    def _quantize(self, quant: Quant, path: Path, used: Imatrix, types: Mapping[str, str] | None) -> None:
        self.job.progress(f"quantizing {quant.name}", 0, 1)
        quantize(self.base, path, quant.ftype, n_threads=self.job.n_threads, imatrix=used, types=types)
        self.job.progress(f"quantizing {quant.name}", 1, 1)

    def _write_trained(self, quant: Quant, path: Path, numbers: RoundedNumbers) -> WrittenFile:
        """A file whose matrices are those that training has left; the rest is the checkpoint's."""
        stored = numbers.format
        self._quantize(quant, path, self.imatrix, stored.types)
        mixture = None
        if quant.budget_bytes is not None:
            mixture = Mixture(dict(stored.types), stored.predicted_loss or 0.0, path.stat().st_size)
        file = FileNumbers(self.base, path, self.chosen)
        file.put(numbers)
        count, slopes = len(numbers.tensors), file.slopes
        return WrittenFile(path, quant, self.imatrix, mixture, trained_tensors=count, slopes=slopes)

    def _fit_to_text(self, file: WrittenFile) -> WrittenFile:
        """Choose a file's codes and train its scales for the text, if that is asked for, and if it loses less then."""
        settings, reads, path = self.job.settings, file.quant.reads, file.path
        text, progress = settings.calibration, settings.progress
        codes = settings.gptq and "gptq" in reads
        scales = settings.tune_scales and "tune_scales" in reads
        if text is None or not (codes or scales):
            return file
        plain = path.with_suffix(".plain")
        shutil.copyfile(path, plain)
        numbers, fitted = FileNumbers(self.base, path, self.chosen), file
        with self.job.placed() as model:
            if codes:
                numbers.fit_to_text(model, text, progress)
                fitted = replace(fitted, gptq_tensors=len(numbers.slopes))
        if scales and settings.by_blocks:
            fitted = replace(fitted, untrained=True)
        elif scales:
            with self.job.whole() as model:
                fitted = replace(fitted, tuned_tensors=numbers.tune(model, text, progress))
        choice = Choice(self.measured(file.quant, plain), self.measured(file.quant, path))
        if choice.is_plain:
            plain.replace(path)
        else:
            plain.unlink()
        return replace(file if choice.is_plain else replace(fitted, slopes=numbers.slopes), choice=choice)

    def measured(self, quant: Quant, path: Path) -> ParityReport:
        """Run a file in llama.cpp and hold it against the checkpoint; its limits are stored, not checked."""
        n_ctx = self.job.reference.windows.ids.shape[1]
        context = Context(n_ctx, _LOGITS_CHUNK, _LOGITS_CHUNK, PARITY_CACHE)
        with runtime.open_model(path, context, n_threads=self.job.n_threads) as model:
            return self.job.compare(quant, model.iter_logits)

    def _read_imatrix(self) -> Imatrix:
        """The checkpoint's input moments by the file's tensor names, or else those of the text; empty if none are used.

        Padded channels get moment 0: their weights are zero.
        """
        settings = self.job.settings
        used = settings.use_imatrix and any(quant.uses_imatrix for quant in self.quants)
        moments = stored_moments(self.job.checkpoint) if used else None
        if used and not moments and settings.calibration is not None:
            with self.job.placed() as model:
                moments = collect_input_moments(model, settings.calibration)
        if not moments:
            for quant in self.quants:
                if quant.needs_imatrix:
                    raise InputError(
                        "cannot be written without an importance matrix",
                        field="quant",
                        value=quant.name,
                        allowed="--calibration text, or a checkpoint with the input moments that prune leaves; "
                        "and no --no-imatrix",
                    )
            return {}
        chosen, result = self.chosen, {}
        specs = {spec.name: spec for spec in tensor_specs(chosen)}
        for module, in_features in linear_inputs(chosen.config).items():
            if module not in moments:
                continue
            values = moments[module].detach().to(torch.float32).numpy()
            if values.shape != (in_features,) or not np.isfinite(values).all() or (values < 0).any():
                raise InputError(
                    "input moments do not belong to this checkpoint", field=module, value=tuple(values.shape)
                )
            if chosen.padded_width and module.endswith(f".{chosen.config.spec.down}"):
                values = np.pad(values, (0, chosen.padded_width - len(values)))
            name = chosen.name(module)
            result[name] = floored(specs[name].of_inputs(values))
        return result

    def mixture(self, budget_bytes: int, text: torch.Tensor) -> Mixture:
        """Types with which a file takes no more than a size; the smallest if it is too small and need not fit."""
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
        job, tied = self.job, self.chosen.config.tie_word_embeddings
        modules = {spec.name: _modules(spec, tied) for spec in specs}
        names = [name for several in modules.values() for name in several]
        with nullcontext(job.model) if job.settings.device == "cpu" else job.whole() as model:
            moments = collect_weight_moments(model, names, text[:GRADIENT_WINDOWS], progress=job.progress)
        if job.settings.use_imatrix:
            # The checkpoint's goes before what the text's few windows say.
            found = {}
            for spec in specs:
                values = spec.of_inputs(moments[modules[spec.name][0]].inputs.float().numpy())
                found[spec.name] = floored(np.pad(values, (0, spec.shape[1] - len(values))))
            self.mixed_imatrix = found | dict(self.imatrix)
        options = {}
        for done, spec in enumerate(specs, 1):
            importance = self.mixed_imatrix.get(spec.name)
            kinds = [
                kind
                for kind in TYPES
                if spec.shape[1] % block_of(kind)[0] == 0
                and (kind not in WHOLE_BLOCKS or importance is not None)
            ]
            costs = [
                _costs(*_drawn(job.model, spec, name, moments[name]), kinds, importance)
                for name in modules[spec.name]
            ]
            each = []
            for kind in kinds or ["F16"]:
                elements, size = block_of(kind)
                n_bytes = padded(math.prod(spec.shape) // elements * size)
                each.append(Option(kind, n_bytes, sum(one[kind] for one in costs) if kinds else 0.0))
            options[spec.name] = sorted(each, key=lambda option: option.n_bytes)
            job.progress("measuring types", done, len(specs))
        return options


def _modules(spec: TensorSpec, tied: bool) -> tuple[str, ...]:
    """The modules that read a tensor, as `collect_weight_moments` names them."""
    names = [name.removesuffix(".weight") for name, _ in spec.sources]
    if names == [_TABLE]:
        return (_HEAD, LOOKUP) if tied else (LOOKUP,)
    return tuple(names)


def _drawn(model: Any, spec: TensorSpec, name: str, moments: WeightMoments) -> tuple[FloatArray, Sample]:
    """Some rows of a module's weight, as wide as they are in the file, (n, columns) float32."""
    module = model.get_submodule(_TABLE if name == LOOKUP else name)
    weight = module.weight.detach()
    is_table = name in (_HEAD, LOOKUP) or isinstance(module, nn.Embedding)
    sample = draw(weight, moments, TABLE_ROWS if is_table else ROWS)
    values = spec.of_inputs(weight[sample.rows].float().numpy())
    columns = torch.from_numpy(spec.of_inputs(sample.columns.numpy()))
    padding = spec.shape[1] - values.shape[1]
    return np.pad(values, ((0, 0), (0, padding))), replace(sample, columns=columns)


def _costs(
    values: FloatArray, sample: Sample, kinds: Sequence[str], importance: FloatArray | None
) -> dict[str, float]:
    """Nats a token that each type costs, in an order in which the likes of slow ones come before them."""

    def of_rows(kind: str, step: int = 1) -> torch.Tensor:
        some = values[::step]
        return sample.cost(
            torch.from_numpy(StoredMatrix.nearest(some, kind, importance).values() - some), step
        )

    rows: dict[str, torch.Tensor] = {}
    totals: dict[str, float] = {}
    step = -(-len(values) // _FEW_ROWS)
    for kind in kinds:
        like = _SLOW.get(kind)
        if like is None:
            rows[kind] = of_rows(kind)
            totals[kind] = float(rows[kind].sum())
        else:
            some, known = of_rows(kind, step), rows[like][::step].sum()
            totals[kind] = float(some.sum() * totals[like] / known) if known else 0.0
    return totals


def stored_moments(checkpoint: Path) -> dict[str, torch.Tensor] | None:
    """The input moments that pruning has left; None for any other folder."""
    return load_input_moments(checkpoint) if is_pruned_checkpoint(checkpoint) else None


def draft_gguf(
    checkpoint: Path, folder: Path, quants: Sequence[str], settings: ExportOptions = DEFAULT_OPTIONS
) -> dict[str, Path]:
    """Write files for a search: the bytes that `export_gguf` writes, but not proven.

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
    _, written = draft_files(checkpoint, folder, quants, settings)
    return {file.quant.name: file.path for file in written}


def draft_files(
    checkpoint: Path, folder: Path, quants: Sequence[str], settings: ExportOptions
) -> tuple[Files, list[WrittenFile]]:
    rows = find_rows(checkpoint, quants, settings)
    settings = settled(checkpoint, replace(settings, n_threads=settings.n_threads or 1))
    chosen = read_layout(checkpoint)
    files = Files(Job(checkpoint, folder, settings, chosen.config, chosen.context_length), chosen, rows)
    return files, [file for file in files.write() if file.quant in rows]


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
