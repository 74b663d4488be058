"""What a pruned model may take, in place of how much of each axis goes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from types import MappingProxyType

from cfsp.errors import InputError
from cfsp.settings import Settings, setting
from cfsp.units import parse_bytes, parse_count
from exporters.families import DEFAULT_FORMAT, FAMILIES, find_format

AXIS_SETTINGS = MappingProxyType(
    {"vocabulary": "vocabulary", "ffn": "prune_ratio", "attentions": "attentions", "blocks": "blocks"}
)
"""Axis -> the setting that says how much of it goes."""


def _size(text: str) -> str:
    parse_bytes(text, "target_size")
    return text


def _parameters(text: str) -> str:
    parse_count(text, "target_parameters")
    return text


@dataclass(frozen=True)
class TargetSettings(Settings):
    """One target, and what may be removed for it."""

    for_quant: tuple[str, ...] = setting(
        (),
        "Quantizations the widths must fit, and whose files a target size is of.",
        option="--for --for-quant",
        look_up=lambda name: find_format(name).name,
        metavar="QUANT,...",
        shown=f"{DEFAULT_FORMAT}; in release.toml what [export] makes",
    )
    target_size: str | None = setting(
        None,
        "Remove what brings the GGUF file to this size at the least predicted loss.",
        look_up=_size,
        metavar="SIZE",
        example="60MB",
    )
    target_parameters: str | None = setting(
        None,
        "The same for a number of parameters, such as 100M.",
        look_up=_parameters,
        metavar="N",
        example="100M",
    )
    target_axes: tuple[str, ...] = setting(
        tuple(AXIS_SETTINGS),
        "What a target may remove; what has a setting of its own that is given goes by that.",
        choices=AXIS_SETTINGS,
        metavar="AXIS,...",
    )

    @property
    def target(self) -> str:
        """The target in words, "" where there is none."""
        return self.target_size or self.target_parameters or ""

    @property
    def target_problem(self) -> str | None:
        """What is wrong between the settings."""
        if not self.target:
            return None
        if self.target_size and self.target_parameters:
            return "target_size and target_parameters: give one of the two"
        return None if self.target_axes else "nothing is left that the target may remove"

    def frees(self, axis: str) -> bool:
        """Whether a target says how much of an axis goes."""
        return bool(self.target) and axis in self.target_axes

    def sized_formats(self, made: Collection[str]) -> tuple[str, ...]:
        """Formats that a target size is of: those of `for_quant`, else those that are made anyway.

        Raises:
            InputError: No file of them has a size that follows from the model's shape.
        """
        names = self.for_quant or tuple(made) or (DEFAULT_FORMAT,)
        gguf = FAMILIES["gguf"]
        found = tuple(name for name in names if gguf.has(name) and gguf.find(name).is_sized)
        if self.target_size and not found:
            raise InputError(
                "no file of a size that follows from the shape",
                field="target_size",
                value=", ".join(names),
                allowed=f"one of {', '.join(gguf.formats)}",
            )
        return found
