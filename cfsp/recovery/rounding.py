"""Training through a rounding: what the model is while it is trained, and what is left when it is done.

Which numbers a format can hold is the business of whoever writes its files; here is what recovery asks of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from cfsp.models.checkpoint import RoundedNumbers
from cfsp.progress import Progress


class RoundedModel(Protocol):
    """A model as a file of few bits holds it."""

    @property
    def sha256(self) -> str:
        """Hash of what it starts from."""

    def attach(self, model: Any) -> None:
        """Give a causal LM, float32, the file's weights; what training may change, and nothing else, has gradients."""

    def finish(self, model: Any) -> RoundedNumbers:
        """Leave the trained weights as a file will hold them, in plain modules, and return its numbers."""


class Rounding(Protocol):
    """What knows formats of few bits."""

    def check(self, name: str) -> None:
        """Raise InputError for a format that cannot be trained through."""

    def start(
        self, checkpoint: Path, name: str, input_ids: torch.Tensor, device: str, progress: Progress
    ) -> RoundedModel:
        """A checkpoint as a file of a format holds it, its numbers chosen for a text.

        Raises:
            InputError: As `check`, or the format cannot hold the checkpoint.
        """
