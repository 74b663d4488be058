"""What every export shares: the checkpoint, loaded once; its side of the proof; the record of a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cfsp.devices import moved
from cfsp.errors import InputError
from cfsp.files import refuse_existing, sha256_file
from cfsp.models.checkpoint import load_pruned, open_pruned
from cfsp.models.offload import NARROW, keeping_of_files
from cfsp.models.reference import load_tokenizer
from cfsp.models.weights import safetensors_files, uniform_dtype
from cfsp.progress import Progress
from cfsp.records import write_record
from cfsp.text.self_sampling import stop_tokens
from exporters.checkpoint_reader import ModelConfig, read_config
from exporters.export_record import ExportFormat, ExportManifest, ExportRecord, ParityReport
from exporters.family import ExportOptions
from exporters.proof import Choice, Reference, choose_windows, compare, reference_of
from exporters.provenance import Provenance, read_provenance

MANIFEST_FILE = "export.json"
UNTRAINED = "scales were not trained: that takes all of the model in memory, which is read block by block"
"""A warning."""


class Job:
    """An export of a checkpoint, of which everything is read when it is first wanted, and once.

    Args:
        checkpoint: Hugging Face folder.
        settings: How to export, `settled`.
        config: The checkpoint's.
        context_length: Longest context for which the files hold the model.

    Attributes:
        folder: Where files are written.
    """

    def __init__(
        self,
        checkpoint: Path,
        folder: Path,
        settings: ExportOptions,
        config: ModelConfig,
        context_length: int,
    ) -> None:
        self.checkpoint, self.folder, self.settings = checkpoint, folder, settings
        self.config, self.context_length = config, context_length

    @property
    def n_threads(self) -> int:
        """Threads of quantizers and of the parity run."""
        return self.settings.n_threads or torch.get_num_threads()

    @property
    def progress(self) -> Progress:
        """Told about every step."""
        return self.settings.progress

    @cached_property
    def provenance(self) -> Provenance:
        """The checkpoint's."""
        return read_provenance(self.checkpoint, self.settings.name)

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's."""
        return load_tokenizer(self.checkpoint.resolve())  # a bare name could be a built-in alias

    @cached_property
    def model(self) -> Any:
        """The checkpoint's model on the CPU, float32 or kept in fewer bytes; nobody changes it."""
        return open_pruned(self.checkpoint, keeping=self.settings.keeping)

    @contextmanager
    def placed(self) -> Iterator[Any]:
        """The model where numbers are chosen, while the context is open."""
        device = self.settings.device
        if device == "cpu":
            yield self.model
        elif self.settings.keeping.is_whole:
            with moved(self.model, device):
                yield self.model
        else:
            yield open_pruned(self.checkpoint, device, self.settings.keeping)

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """The model in float32 where numbers are chosen, for gradients, while the context is open."""
        if self.settings.keeping.is_whole:
            with self.placed() as model:
                yield model
        else:
            yield load_pruned(self.checkpoint, torch.float32).to(self.settings.device)

    @cached_property
    def stops(self) -> frozenset[int]:
        """Tokens at which the checkpoint's texts end."""
        return frozenset(stop_tokens(self.model.generation_config, self.tokenizer))

    @cached_property
    def reference(self) -> Reference:
        """The checkpoint's logits on the text of the proof."""
        given, narrowest = self.settings.parity_windows, self.config.narrowest
        windows = choose_windows(self.tokenizer, self.context_length, narrowest, given)
        return reference_of(self.model, windows, progress=self.progress)

    def unproven_window(self) -> Iterator[str]:
        """A warning if the text of the proof ends inside the sliding window of some blocks."""
        narrowest, seqlen = self.config.narrowest, self.reference.windows.ids.shape[1]
        if narrowest is not None and seqlen <= narrowest < self.context_length:
            yield f"the proof's text, {seqlen} tokens a window, does not go beyond what attention sees, {narrowest}"

    def compare(
        self, row: ExportFormat, run: Callable[[npt.NDArray[np.int32]], Iterable[npt.NDArray[np.float32]]]
    ) -> ParityReport:
        """Hold a file against the checkpoint; its limits are stored in the report, not checked."""
        return compare(
            self.reference,
            run,
            self.settings.limits_of(row).as_dict(),
            progress=lambda _, done, total: self.progress(f"parity {row.name}", done, total),
        )

    def record(self, path: Path, row: ExportFormat, choice: Choice | None = None, **own: Any) -> ExportRecord:
        """Describe a proven file.

        Args:
            path: The file.
            row: What it is.
            choice: Whose numbers it has, if any were chosen for a text.
            own: Fields of ExportRecord that depend on the family.
        """
        origin = self.provenance
        return ExportRecord(
            file=str(path.relative_to(self.folder)),
            quant=row.name,
            sha256=sha256_file(path),
            shape=self.config.shape,
            context_length=self.context_length,
            source_model=origin.source_model,
            source_sha256=origin.source_sha256,
            checkpoint_sha256=origin.checkpoint_sha256,
            plan_sha256=origin.plan_sha256,
            seed=origin.seed,
            plain_kl=choice.plain.kl_mean if choice else None,
            rounded_kl=choice.rounded.kl_mean if choice else None,
            **own,
        )

    def write_manifest(self, records: Sequence[ExportRecord]) -> tuple[ExportRecord, ...]:
        """Write export.json; returns what is in it."""
        manifest = ExportManifest(tuple(records), self.settings.warnings)
        write_record(self.folder / MANIFEST_FILE, manifest)
        return manifest.exports


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

    16 bits are taken if they are asked for and the checkpoint has them. They are no reason to read all of a model:
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
