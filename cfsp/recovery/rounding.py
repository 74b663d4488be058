"""What recovery asks of formats of few bits: which numbers one can hold is the business of whoever writes its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from cfsp.models.checkpoint import RoundedNumbers
from cfsp.progress import Progress


class RoundedModel(Protocol):
    """A model as a file of few bits holds it; `sha256` is of what it starts from."""

    @property
    def sha256(self) -> str: ...

    def attach(self, model: Any) -> None:
        """Give a causal LM, float32, the file's weights; only what training may change has gradients."""

    def finish(self, model: Any) -> RoundedNumbers:
        """Leave the trained weights as a file will hold them, in plain modules, and return its numbers."""


class Rounding(Protocol):
    """Knows formats of few bits; raises InputError for one that cannot be trained through."""

    def check(self, name: str) -> None: ...

    def start(
        self, checkpoint: Path, name: str, input_ids: torch.Tensor, device: str, progress: Progress
    ) -> RoundedModel:
        """A checkpoint as a file of a format holds it, its numbers chosen for a text."""
