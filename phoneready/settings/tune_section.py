"""The section [tune] of release.toml: what may vary, and what is best."""

from __future__ import annotations

from dataclasses import dataclass

from cfsp.settings import Settings, setting
from exporters.families import find_format

GOALS = QUALITY, SIZE = "quality", "size"


@dataclass(frozen=True)
class TuneConfig(Settings):
    """What `phoneready tune` may vary; what is not listed stays as the other sections say."""

    goal: str = setting(
        QUALITY,
        "quality: the least KL divergence that meets all budgets; size: the smallest file that does.",
        choices=GOALS,
    )
    judge: str = setting(
        "file",
        "Whose divergence that is, the exported file's or the checkpoint's before export.",
        choices=("file", "checkpoint"),
    )
    min_prune_ratio: float = setting(0.0, "Least share of FFN channels to remove.", ge=0, lt=1)
    max_prune_ratio: float = setting(0.5, "Largest share to remove.", gt=0, lt=1)
    files: tuple[str, ...] = setting(
        (),
        "Quantizations and ONNX variants, of which one is chosen; those of [export] when empty.",
        look_up=lambda name: find_format(name).name,
    )
    allocations: tuple[str, ...] = setting(
        (), "As prune.allocation.", choices="cfsp.pruning.allocation:ALLOCATIONS"
    )
    aligns: tuple[int, ...] = setting((), "As prune.align; 0 means what the quantization needs.", ge=0)
    recover: tuple[bool, ...] = setting(
        (), "With recovery, without, or both; as [recover] is there or not when empty."
    )
    trials: int = setting(12, "Most points to make and measure.", ge=1, le=10**6)
    tolerance: float = setting(
        0.01, "A point that is expected to be better by less than this share is not tried.", ge=0, lt=1
    )

    @property
    def problem(self) -> str | None:
        """What is wrong between fields."""
        if self.min_prune_ratio < self.max_prune_ratio:
            return None
        return "min_prune_ratio is not below max_prune_ratio"
