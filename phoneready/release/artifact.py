"""An exported model of a release."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exporters.families import family_of
from runtime_bench.devices.model_facts import FACTS, ModelFacts


@dataclass(frozen=True)
class Artifact:
    """A GGUF file or the folder of an ONNX variant.

    Attributes:
        role: `dense` or `pruned`, as in Figure.
        item: The quantization or variant.
        name: What it is called in the release folder.
        root: The file, or the folder.
        path: What a benchmark opens: the file, or the graph in the folder that gives the last position's logits.
    """

    role: str
    item: str
    name: str
    root: Path
    path: Path

    @property
    def facts(self) -> ModelFacts:
        """What a projection needs to know of it, of formats that are projected."""
        return FACTS[family_of(self.item).name](self.path)
