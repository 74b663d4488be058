"""What a loaded model is and where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from cfsp.validation import WhereSet


@dataclass(frozen=True)
class ModelSource:
    """Where a model came from.

    Attributes:
        reference: As the user gave it.
        kind: "builtin", "hub", "folder" or "gguf".
        name: Short name for files and titles, such as "SmolLM2-135M-Instruct".
        path: The GGUF file or the folder that was read; absolute in a checkpoint's record.
        revision: Hub commit.
        sha256: Of the GGUF file, or of the folder's safetensors files in order of name.
        license: Identifier such as "apache-2.0", as the source states it.
        base_model: The model that this one is made from, as the source states it.
        made_from: Hash of the dense model's weights, of a checkpoint or a file that states it.
        tied: Where a file's output matrix was found to be its embedding in other bits, what was done.
        rounded: bfloat16 or float16, where its weights were rounded to that when they were read.
    """

    reference: str
    kind: str
    name: str
    path: str | None = None
    revision: str | None = None
    sha256: str | None = None
    license: str | None = None
    base_model: str | None = None
    made_from: str | None = None
    tied: str | None = None
    rounded: Annotated[str | None, WhereSet] = None

    @property
    def again(self) -> str:
        """What leads to the model from any working directory; `reference` where a file or folder is gone."""
        is_local = self.kind in ("folder", "gguf")
        return self.path if is_local and self.path and Path(self.path).exists() else self.reference


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM and where it came from.

    Attributes:
        model: In eval mode.
        tokenizer: A transformers fast tokenizer.
        source: Its origin.
        stored_dtype: In which its weights are stored, there and in what is made of it; None where that is the model's.
    """

    model: Any
    tokenizer: Any
    source: ModelSource
    stored_dtype: torch.dtype | None = None
