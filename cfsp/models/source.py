"""What a loaded model is and where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from cfsp.validation import WhereSet


@dataclass(frozen=True)
class ModelSource:
    """Where a model came from."""

    reference: str  # as the user gave it
    kind: str  # "builtin", "hub", "folder" or "gguf"
    name: str  # short name for files and titles, such as "SmolLM2-135M-Instruct"
    path: str | None = None  # the GGUF file or the folder that was read; absolute in a checkpoint's record
    revision: str | None = None  # hub commit
    sha256: str | None = None  # of the GGUF file, or of the folder's safetensors files in order of name
    license: str | None = None  # identifier such as "apache-2.0", as the source states it
    base_model: str | None = None  # the model that this one is made from, as the source states it
    made_from: str | None = None  # hash of the dense model's weights, if a checkpoint or file states it
    tied: str | None = None  # what was done with an output matrix that is the embedding in other bits
    rounded: Annotated[str | None, WhereSet] = None  # to bfloat16 or float16 when it was read

    @property
    def again(self) -> str:
        """What leads to the model from any working directory; `reference` where a file or folder is gone."""
        is_local = self.kind in ("folder", "gguf")
        return self.path if is_local and self.path and Path(self.path).exists() else self.reference


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM and where it came from."""

    model: Any  # in eval mode
    tokenizer: Any  # a transformers fast tokenizer
    source: ModelSource
    stored_dtype: torch.dtype | None = None  # of its files, and of what is made of it; None: the model's
