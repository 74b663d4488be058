"""From a model reference to a model and its tokenizer.

A reference is one of
    smollm2-135m         a built-in alias (see cfsp.builtin)
    FOLDER               a Hugging Face folder with safetensors, or a checkpoint that phoneready saved
    FILE.gguf            a GGUF file, dequantized
    OWNER/NAME[@REV]     a model on the Hugging Face hub
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cfsp.progress import Progress, no_progress

__all__ = ["LoadedModel", "ModelSource", "load_model", "load_tokenizer"]


@dataclass(frozen=True)
class ModelSource:
    """Where a model came from.

    Attributes:
        reference: As the user gave it.
        kind: "builtin", "hub", "folder" or "gguf".
        name: Short name for files and titles, such as "SmolLM2-135M-Instruct".
        path: The GGUF file or the folder that was read.
        revision: Hub commit.
        sha256: Of the GGUF file, or of the folder's safetensors files in order of name.
        license: SPDX-like identifier, as the source states it.
        base_model: The model that this one is made from, as the source states it.
    """

    reference: str
    kind: str
    name: str
    path: str | None = None
    revision: str | None = None
    sha256: str | None = None
    license: str | None = None
    base_model: str | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM in eval mode, its tokenizer (a transformers fast tokenizer) and its origin."""

    model: Any
    tokenizer: Any
    source: ModelSource


def load_model(
    reference: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> LoadedModel:
    """Load a causal LM and its tokenizer.

    Args:
        reference: See the module's docstring.
        dtype: The weights are cast to it.
        trust_remote_code: Let transformers run code that a folder or hub model brings along.
        progress: Told about downloads and loading.

    Raises:
        InputError: The reference leads nowhere, or what it leads to cannot be used.
    """
    raise NotImplementedError


def load_tokenizer(reference: str | Path) -> Any:
    """Load only the tokenizer of a reference.

    Raises:
        InputError: As `load_model`.
    """
    raise NotImplementedError
