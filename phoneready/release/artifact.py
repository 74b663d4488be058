"""An exported model of a release, and what the exports answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cfsp.errors import InputError
from exporters.families import family_of
from phoneready.evaluation.measured_file import MeasuredFile
from phoneready.figures.figure_set import DENSE
from runtime_bench.devices.model_facts import FACTS, ModelFacts

SIDE_BY_SIDE_FILE = "side-by-side.json"


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


@dataclass(frozen=True)
class FileLosses(MeasuredFile):
    """What an export loses.

    Attributes:
        role: `dense` or `pruned`.
        item: The quantization or variant.
    """

    role: str
    item: str

    @property
    def is_dense(self) -> bool:
        """Whether nothing was removed."""
        return self.role == DENSE

    @property
    def label(self) -> str:
        """The file, for people."""
        return f"{self.role} {self.item}"

    @property
    def family(self) -> str:
        """What it is held against: files of the same family."""
        return family_of(self.item).name


@dataclass(frozen=True)
class SideBySide:
    """All exports on the same windows of text."""

    KIND: ClassVar[str] = "side-by-side"
    SCHEMA_VERSION: ClassVar[int] = 1

    files: tuple[FileLosses, ...]


@dataclass(frozen=True)
class Answers:
    """Greedy answers of exports, each in its own runtime, in the chat template where the model has one.

    Attributes:
        prompts: The questions.
        answers: Name of an export to its answers.
    """

    KIND: ClassVar[str] = "answers"
    SCHEMA_VERSION: ClassVar[int] = 1

    prompts: tuple[str, ...]
    answers: dict[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError("empty", field="prompts")
        for file, answers in self.answers.items():
            if len(answers) != len(self.prompts):
                told = f"{len(answers)} answers to {len(self.prompts)} prompts"
                raise InputError(told, field=f"answers, {file}")
