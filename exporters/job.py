"""What every export shares: the checkpoint's side of the proof, the record, the folder that appears when all holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cfsp.errors import InputError
from cfsp.files import atomic_directory, refuse_existing, sha256_file
from cfsp.models.checkpoint import load_pruned
from cfsp.models.offload import NARROW, keeping_of_files
from cfsp.models.reference import load_tokenizer
from cfsp.models.weights import safetensors_files, uniform_dtype
from cfsp.progress import Progress
from cfsp.records import write_record
from cfsp.text.self_sampling import stop_tokens
from exporters.checkpoint_reader import ModelConfig, read_config
from exporters.export_record import ExportFormat, ExportManifest, ExportRecord, ParityReport
from exporters.options import ExportOptions
from exporters.parity import Choice, Reference, choose_windows, compare, reference_of
from exporters.provenance import Provenance, read_provenance

MANIFEST_FILE = "export.json"
UNTRAINED = "scales were not trained: that takes all of the model in memory, which is read block by block"
"""A warning."""


@dataclass(frozen=True)
class Job:
    """What all files of one export have in common.

    Attributes:
        checkpoint: Hugging Face folder.
        folder: Where files are written; it becomes the output folder at the end.
        settings: How to export.
        config: The checkpoint's.
        context_length: Longest context for which the files hold the model.
        provenance: The checkpoint's.
        tokenizer: The checkpoint's.
        stops: Tokens at which its texts end.
        reference: The checkpoint's logits, to hold files against.
    """

    checkpoint: Path
    folder: Path
    settings: ExportOptions
    config: ModelConfig
    context_length: int
    provenance: Provenance
    tokenizer: Any
    stops: frozenset[int]
    reference: Reference

    @property
    def n_threads(self) -> int:
        """Threads of quantizers and of the parity run."""
        return self.settings.n_threads or torch.get_num_threads()

    def unproven_window(self) -> Iterator[str]:
        """What to say where the text of the proof ends inside the window that some blocks see."""
        narrowest, seqlen = self.config.narrowest, self.reference.windows.ids.shape[1]
        if narrowest is not None and seqlen <= narrowest < self.context_length:
            yield f"the proof's text, {seqlen} tokens a window, does not go beyond what attention sees, {narrowest}"

    @property
    def progress(self) -> Progress:
        """Told about every step."""
        return self.settings.progress

    def compare(
        self, row: ExportFormat, run: Callable[[npt.NDArray[np.int32]], Iterable[npt.NDArray[np.float32]]]
    ) -> ParityReport:
        """Hold a file against the checkpoint; its limits are stored in the report, not checked."""
        return held(self.reference, row, run, self.settings)

    def record(self, path: Path, row: ExportFormat, choice: Choice | None = None, **own: Any) -> ExportRecord:
        """Describe a proven file.

        Args:
            path: The file.
            row: What it is.
            choice: Whose numbers it has, if any were chosen for a text.
            own: Fields of ExportRecord that depend on the family.
        """
        return ExportRecord(
            file=str(path.relative_to(self.folder)),
            quant=row.name,
            sha256=sha256_file(path),
            shape=self.config.shape,
            context_length=self.context_length,
            source_model=self.provenance.source_model,
            source_sha256=self.provenance.source_sha256,
            checkpoint_sha256=self.provenance.checkpoint_sha256,
            plan_sha256=self.provenance.plan_sha256,
            seed=self.provenance.seed,
            plain_kl=choice.plain.kl_mean if choice else None,
            rounded_kl=choice.rounded.kl_mean if choice else None,
            **own,
        )


def check_input(checkpoint: Path, output: Path, *, force: bool) -> None:
    """Refuse what cannot be exported before anything is loaded.

    Raises:
        InputError: The output exists or would replace the input, or the input is no checkpoint folder.
    """
    refuse_existing(output, force=force, inputs=[checkpoint])
    if not (checkpoint / "config.json").is_file():
        raise InputError(f"{checkpoint} is not a checkpoint folder (it has no config.json)")


def settled(checkpoint: Path, settings: ExportOptions) -> ExportOptions:
    """Settings that say how the model is read: decided once for all of an export, as free memory comes and goes.

    16 bits are taken where they are asked for and the checkpoint has them. They are no reason to read all of a model:
    what files are held against is float32.
    """
    has = settings.dtype in NARROW and has_dtype(checkpoint, settings.dtype)
    is_narrow = has and not keeping_of_files(checkpoint, settings.dtype).is_whole
    # A block that is given more than hidden states is not proven alone.
    alone = settings.device == "cpu" and not read_config(checkpoint).spec.own_arguments
    by_blocks = alone and keeping_of_files(checkpoint, "float32").in_files
    return replace(settings, dtype=settings.dtype if is_narrow else "float32", by_blocks=by_blocks)


def has_dtype(checkpoint: Path, dtype: str) -> bool:
    """Whether all weights of a checkpoint are of a dtype, a name in `cfsp.models.offload.NARROW`."""
    return NARROW[dtype] == uniform_dtype(safetensors_files(checkpoint))


def load_checkpoint(checkpoint: Path, *, by_blocks: bool = False) -> Any:
    """The model as float32; see `load_pruned`."""
    return load_pruned(checkpoint, dtype=torch.float32, by_blocks=by_blocks)


def reference_for(
    model: Any, tokenizer: Any, context_length: int, config: ModelConfig, settings: ExportOptions
) -> Reference:
    """The checkpoint's logits on the text of the proof."""
    windows = choose_windows(tokenizer, context_length, config.narrowest, settings.parity_windows)
    return reference_of(model, windows, progress=settings.progress)


def held(
    reference: Reference,
    row: ExportFormat,
    run: Callable[[npt.NDArray[np.int32]], Iterable[npt.NDArray[np.float32]]],
    settings: ExportOptions,
) -> ParityReport:
    """Hold a file against the checkpoint; its limits are stored in the report, not checked."""
    return compare(
        reference,
        run,
        settings.limits_of(row).as_dict(),
        progress=lambda _, done, total: settings.progress(f"parity {row.name}", done, total),
    )


@contextmanager
def open_job(
    checkpoint: Path, output: Path, model: Any, settings: ExportOptions, context_length: int | None = None
) -> Iterator[Job]:
    """Run the checkpoint on the parity text, and make the output folder, which appears when the block ends well.

    Args:
        checkpoint: Hugging Face folder.
        output: Folder to create.
        model: `load_checkpoint`'s; it is let go.
        settings: The rest.
        context_length: Longest context for which the format holds the model; None where that is the model's own.

    Raises:
        InputError: Unusable windows.
    """
    config = read_config(checkpoint)
    context_length = context_length or config.max_position_embeddings
    provenance = read_provenance(checkpoint, settings.name)
    tokenizer = load_tokenizer(checkpoint.resolve())  # a bare name could be a built-in alias
    stops = frozenset(stop_tokens(model.generation_config, tokenizer))
    reference = reference_for(model, tokenizer, context_length, config, settings)
    del model
    with atomic_directory(output, force=settings.force) as folder:
        yield Job(
            checkpoint, folder, settings, config, context_length, provenance, tokenizer, stops, reference
        )


def write_manifest(job: Job, records: Sequence[ExportRecord]) -> tuple[ExportRecord, ...]:
    """Write export.json; returns what is in it."""
    manifest = ExportManifest(tuple(records), job.settings.warnings)
    write_record(job.folder / MANIFEST_FILE, manifest)
    return manifest.exports
