"""What every export shares: the checkpoint, loaded once; where it comes from; its side of the proof; records."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cfsp.devices import moved
from cfsp.errors import InputError
from cfsp.files import refuse_existing, sha256_file, short_name
from cfsp.memory import give_back_memory
from cfsp.models.checkpoint import (
    PLAN_FILE,
    is_pruned_checkpoint,
    load_pruned,
    open_pruned,
    read_checkpoint_info,
)
from cfsp.models.offload import NARROW, keeping_of_files
from cfsp.models.reference import load_tokenizer
from cfsp.models.weights import safetensors_files, sha256_files, uniform_dtype
from cfsp.pruning.plan import PruningPlan
from cfsp.records import fields_to_json, read_record, write_record
from cfsp.recovery.recovery_record import RECOVERY_FILE, RecoveryRecord
from cfsp.text.self_sampling import stop_tokens
from cfsp.text.tokens import tokens_sha256
from exporters.checkpoint_reader import ModelConfig, read_config
from exporters.export_record import ExportFormat, ExportManifest, ExportRecord, ParityReport
from exporters.family import ExportOptions
from exporters.proof import Choice, Reference, choose_windows, compare, reference_of
from exporters.recipe import Recipe

MANIFEST_FILE = "export.json"
UNTRAINED = "scales were not trained: that takes all of the model in memory, which is read block by block"
"""A warning."""
SOME_HASH = "0" * 64
"""In place of one that is not known yet: as long as any."""
_MADE_OF = ("config.json", "generation_config.json", "tokenizer*", "chat_template*")
_LONGEST = 200
"""Bytes of the beginning of a file's name; a format, a size and the mark of what is not finished follow."""


class Provenance(NamedTuple):
    """What a checkpoint says about its origin; None if it says nothing."""

    name: str  # short, for titles and file names
    source_model: str  # the dense model
    source_sha256: str | None = None  # of its weights
    checkpoint_sha256: str | None = None  # of the checkpoint's weights
    plan_sha256: str | None = None
    license: str | None = None  # SPDX-like
    base_model: str | None = None  # that the dense one is made from
    seed: int | None = None  # of the run that made the checkpoint

    def metadata(self) -> dict[str, str]:
        """What an exported file says of it under keys of our own."""
        keys = ("source_model", "source_sha256", "checkpoint_sha256", "plan_sha256")
        return {f"phoneready.{key}": getattr(self, key) for key in keys if getattr(self, key)}


def read_provenance(checkpoint: Path, name: str | None = None) -> Provenance:
    """Provenance of a checkpoint, or of a plain Hugging Face folder, of which only the name is known."""
    if not is_pruned_checkpoint(checkpoint):
        folder = short_name(checkpoint.resolve().name)
        return Provenance(name=file_stem(name or folder), source_model=folder)
    info = read_checkpoint_info(checkpoint)
    return Provenance(
        name=file_stem(name or info.source.name),
        source_model=info.source.name,
        source_sha256=info.source.sha256,
        # Not what the info says: the weights may have been trained since it was written.
        checkpoint_sha256=sha256_files(safetensors_files(checkpoint)),
        plan_sha256=info.plan_sha256,
        license=info.source.license,
        base_model=info.source.base_model,
        seed=info.seed,
    )


def file_stem(name: str) -> str:
    """The last part of a name, if files can be called that; raises InputError if they cannot."""
    stem = name.rsplit("/", 1)[-1]
    if not stem or stem.startswith(".") or any(c in '\\:*?"<>|' or ord(c) < 32 for c in stem):
        raise InputError("not usable as a file name", field="name", value=name)
    if len(stem.encode()) > _LONGEST:
        raise InputError("too long a file name", field="name", value=name, allowed=f"up to {_LONGEST} bytes")
    return stem


class Job:
    """An export by `settled` settings; what it needs is read once. Files hold texts of up to `context_length`."""

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
        self.n_threads: int = settings.n_threads or torch.get_num_threads()
        self.progress = settings.progress

    @cached_property
    def provenance(self) -> Provenance:
        return read_provenance(self.checkpoint, self.settings.name)

    @cached_property
    def _checkpoint_sha256(self) -> str:
        """Of weights, settings and tokenizer: all of a checkpoint that goes into a file."""
        files = [path for pattern in _MADE_OF for path in sorted(self.checkpoint.glob(pattern))]
        return sha256_files([*files, *safetensors_files(self.checkpoint)])

    def recipe(self, row: ExportFormat) -> Recipe:
        """How a file of this format is made."""
        settings, text = self.settings, self.settings.calibration
        plan, trained = self.checkpoint / PLAN_FILE, self.checkpoint / RECOVERY_FILE
        return replace(
            settings.recipe,
            pruning=fields_to_json(read_record(PruningPlan, plan).settings) if plan.is_file() else {},
            recovery=fields_to_json(read_record(RecoveryRecord, trained).settings)
            if trained.is_file()
            else {},
            source_sha256=self.provenance.source_sha256,
            checkpoint_sha256=self._checkpoint_sha256,
            format=row.name,
            rounding={name: getattr(settings, name) for name in sorted(row.reads - {"calibration"})},
            rounding_sha256=tokens_sha256(text) if text is not None and "calibration" in row.reads else None,
            n_threads=torch.get_num_threads() if text is not None and "calibration" in row.reads else None,
        )

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.checkpoint.resolve())  # a bare name could be a built-in alias

    @cached_property
    def model(self) -> Any:
        """The checkpoint's model on the CPU, float32 or kept in fewer bytes; nobody changes it."""
        return open_pruned(self.checkpoint, keeping=self.settings.keeping)

    @cached_property
    def model_config(self) -> Any:
        """transformers' configuration of the model."""
        return self.model.config

    @cached_property
    def n_params(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def drop_model(self) -> None:
        """Give its memory back; who asks for it has it read anew. Of the reference the output matrix stays."""
        self.__dict__.pop("model", None)
        gc.collect()
        give_back_memory()

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
        self,
        row: ExportFormat,
        run: Callable[[npt.NDArray[np.int32]], Iterable[npt.NDArray[np.float32]]],
        *,
        is_kept: bool = True,
    ) -> ParityReport:
        """Hold a file against the checkpoint, or one that goes again on one window; limits are stored, not checked."""
        return compare(
            self.reference if is_kept else self.reference.first_window(),
            run,
            self.settings.limits_of(row).as_dict(),
            progress=lambda _, done, total: self.progress(f"parity {row.name}", done, total),
        )

    def record(self, path: Path, row: ExportFormat, choice: Choice | None = None, **own: Any) -> ExportRecord:
        """Describe a proven file; `own` are fields that depend on the family."""
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
            recipe=self.recipe(row),
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
    """Refuse an output that exists or would replace the input, and an input that is no checkpoint folder."""
    refuse_existing(output, force=force, inputs=[checkpoint])
    if not (checkpoint / "config.json").is_file():
        raise InputError(f"{checkpoint} is not a checkpoint folder (it has no config.json)")


def settled(checkpoint: Path, settings: ExportOptions, rows: Iterable[ExportFormat]) -> ExportOptions:
    """Settings that say how the model is read: decided once for all of an export, as free memory comes and goes.

    Text that no format reads is left out.
    16 bits are taken if they are asked for and the checkpoint has them. They are no reason to read all of a model:
    what files are held against is float32.
    """
    if not any("calibration" in row.reads for row in rows):
        settings = replace(settings, calibration=None, recipe=Recipe())
    has = settings.dtype in NARROW and has_dtype(checkpoint, settings.dtype)
    is_narrow = has and not keeping_of_files(checkpoint, settings.dtype).is_whole
    # A block that is given more than hidden states is not proven alone.
    alone = settings.device == "cpu" and not read_config(checkpoint).spec.own_arguments
    by_blocks = alone and keeping_of_files(checkpoint, "float32").in_files
    return replace(settings, dtype=settings.dtype if is_narrow else "float32", by_blocks=by_blocks)


def has_dtype(checkpoint: Path, dtype: str) -> bool:
    """Whether all weights of a checkpoint are of a dtype, a name in `cfsp.models.offload.NARROW`."""
    return NARROW[dtype] == uniform_dtype(safetensors_files(checkpoint))
