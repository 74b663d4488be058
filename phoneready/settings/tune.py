"""The section [tune] of release.toml: what may vary, and what is best."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import pydantic

from cfsp.pruning.settings import PruneSettings, check_settings
from cfsp.validation import Section, as_value_error
from exporters.gguf import QUANTS, find_quant
from exporters.onnx import find_variant

GOALS = QUALITY, SIZE = "quality", "size"


class TuneConfig(Section):
    """What `phoneready tune` may vary; what is not listed stays as the other sections say.

    Attributes:
        goal: `quality`: the least KL divergence that meets all budgets; `size`: the smallest file that does.
        judge: Whose divergence that is, the exported `file`'s or the `checkpoint`'s before export.
        min_prune_ratio: Least share of FFN channels to remove.
        max_prune_ratio: Largest share to remove.
        files: Quantizations and ONNX variants, of which one is chosen; those of [export] when empty.
        allocations: As prune.allocation.
        aligns: As prune.align; 0 means what the quantization needs.
        recover: With recovery, without, or both; as [recover] is there or not when empty.
        trials: Most points to make and measure.
        tolerance: A point that is expected to be better by less than this share is not tried.
    """

    goal: Literal["quality", "size"] = "quality"
    judge: Literal["file", "checkpoint"] = "file"
    min_prune_ratio: float = pydantic.Field(default=0.0, ge=0, lt=1)
    max_prune_ratio: float = pydantic.Field(default=0.5, gt=0, lt=1)
    files: tuple[str, ...] = ()
    allocations: tuple[str, ...] = ()
    aligns: tuple[Annotated[int, pydantic.Field(ge=0)], ...] = ()
    recover: tuple[bool, ...] = ()
    trials: int = pydantic.Field(default=12, ge=1)
    tolerance: float = pydantic.Field(default=0.01, ge=0, lt=1)

    @pydantic.field_validator("files")
    @classmethod
    def _known_files(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        found: list[str] = []
        lower = {quant.lower() for quant in QUANTS}

        def look_up() -> None:
            for name in names:
                found.append(find_quant(name).name if name.lower() in lower else find_variant(name).name)

        as_value_error(look_up)
        return tuple(dict.fromkeys(found))

    @pydantic.field_validator("allocations")
    @classmethod
    def _known_allocations(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            chosen: dict[str, Any] = {"allocation": name}
            as_value_error(lambda: check_settings(PruneSettings(**chosen)))  # noqa: B023 - called at once
        return tuple(dict.fromkeys(names))

    @pydantic.model_validator(mode="after")
    def _range(self) -> Self:
        if self.min_prune_ratio >= self.max_prune_ratio:
            raise ValueError("min_prune_ratio is not below max_prune_ratio")
        return self
