"""Pruned checkpoints: Hugging Face folders that load with and without phoneready.

Uniform widths give a plain folder. Different widths are written as `per_layer_config`, the schema of
transformers 5, with a small modelling file through `auto_map`, so that transformers 4 and 5 both build them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from cfsp.model_reference import LoadedModel, ModelSource
from cfsp.records import Record

__all__ = [
    "CheckpointInfo",
    "is_pruned_checkpoint",
    "load_input_moments",
    "load_pruned",
    "read_checkpoint_info",
    "save_checkpoint",
]

INFO_FILE = "phoneready.json"
PLAN_FILE = "pruning_plan.json"
MOMENTS_FILE = "input_moments.safetensors"


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is and where it came from.

    Attributes:
        source: The dense model.
        widths: intermediate_size of every block, first to last.
        plan_sha256: Of the checkpoint's plan file; None without a plan.
        weights_sha256: Of the checkpoint's model.safetensors (shards in order of name).
        dtype: Of the weights, such as "float32".
        versions: Package name to version, of what wrote the checkpoint.
        seed: Seed of the run.
    """

    KIND: ClassVar[str] = "checkpoint"
    SCHEMA_VERSION: ClassVar[int] = 1

    source: ModelSource
    widths: tuple[int, ...]
    plan_sha256: str | None
    weights_sha256: str
    dtype: str
    versions: dict[str, str]
    seed: int


def save_checkpoint(
    loaded: LoadedModel,
    directory: Path,
    *,
    plan: Record | None = None,
    input_moments: Mapping[str, torch.Tensor] | None = None,
    seed: int = 0,
    force: bool = False,
) -> CheckpointInfo:
    """Write a model, pruned or dense, with its tokenizer, licence and provenance, atomically.

    Args:
        loaded: The model as it is now; its widths are taken from the weights.
        directory: Destination.
        plan: Stored as pruning_plan.json.
        input_moments: Module name to mean squared input per channel, (in_features,) float32.
        seed: Stored in the info.
        force: Replace an existing folder.

    Raises:
        InputError: The folder exists, or cannot be written.
    """
    raise NotImplementedError


def load_pruned(directory: Path, dtype: torch.dtype | None = None) -> Any:
    """Load a checkpoint's model in eval mode, without running code from the folder.

    Args:
        directory: A folder written by `save_checkpoint` or by `save_pretrained` of a model loaded from one.
        dtype: Cast the weights to it; None keeps what is stored.

    Raises:
        InputError: Not a checkpoint, damaged, or its widths disagree with its weights.
    """
    raise NotImplementedError


def is_pruned_checkpoint(directory: Path) -> bool:
    """Whether a folder was written by `save_checkpoint`."""
    return (directory / INFO_FILE).is_file()


def read_checkpoint_info(directory: Path) -> CheckpointInfo:
    """Read phoneready.json; raises InputError where it is missing or malformed."""
    raise NotImplementedError


def load_input_moments(directory: Path) -> dict[str, torch.Tensor] | None:
    """The stored input moments, or None where the checkpoint has none."""
    raise NotImplementedError
