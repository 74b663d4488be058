"""What a pruned model may take, in place of how much of each axis goes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from types import MappingProxyType

from cfsp.errors import InputError
from cfsp.settings import Reads, Settings, setting
from cfsp.units import parse_bytes, parse_count
from exporters.families import BASE, DEFAULT_FORMAT, FAMILIES, find_format

AXIS_SETTINGS = MappingProxyType(
    {
        "vocabulary": "vocabulary",
        "ffn": "prune_ratio",
        "attentions": "attentions",
        "kv_groups": "kv_groups",
        "blocks": "blocks",
    }
)
"""Axis -> the setting that says how much of it goes."""

_TARGETS = ("target_size", "target_parameters", "target_speed")
AIMED: Reads = MappingProxyType(
    {"target_axes": (lambda asked: bool(asked.target), f"without one of {', '.join(_TARGETS)}")}
)
"""What is read of a target's settings."""


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
        "Quantizations and ONNX variants the widths must fit, and whose files a target size or speed is of.",
        option="--for --for-quant",
        look_up=lambda name: find_format(name).name,
        metavar="QUANT,...",
        shown=f"{DEFAULT_FORMAT}; in release.toml what [export] makes",
    )
    target_size: str | None = setting(
        None,
        "Remove what brings the exported file to this size at the least predicted loss.",
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
    target_speed: float | None = setting(
        None,
        "The same for decode of the GGUF file, so many times as fast as the dense one's, by the bytes a token reads.",
        gt=1,
        le=1000,
        metavar="FACTOR",
        example=1.5,
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
        speed = f"{self.target_speed:g}x" if self.target_speed else ""
        return self.target_size or self.target_parameters or speed

    @property
    def target_problem(self) -> str | None:
        """What is wrong between the settings."""
        given = [name for name in _TARGETS if getattr(self, name)]
        if len(given) > 1:
            return f"{' and '.join(given)}: give one of them"
        return "nothing is left that the target may remove" if given and not self.target_axes else None

    @property
    def reads_files(self) -> bool:
        """Whether the target is one of files, not of the model alone."""
        return bool(self.target_size or self.target_speed)

    def frees(self, axis: str) -> bool:
        """Whether a target says how much of an axis goes."""
        return bool(self.target) and axis in self.target_axes

    def sized_formats(self, made: Collection[str]) -> tuple[str, ...]:
        """Formats that a target size or speed is of: those of `for_quant`, else those that are made anyway.

        Raises:
            InputError: No file of them has a size that follows from the model's shape.
        """
        names = self.for_quant or tuple(made) or (DEFAULT_FORMAT,)
        # What a token reads of a file is known of GGUF alone.
        families = FAMILIES.values() if self.target_size else (BASE,)
        known = [row.name for family in families for row in family.formats.values() if row.is_sized]
        sized = tuple(name for name in names if find_format(name).name in known)
        if self.reads_files and not sized:
            raise InputError(
                "no file of a size that follows from the shape",
                field="target_size" if self.target_size else "target_speed",
                value=", ".join(names),
                allowed=f"one of {', '.join(known)}",
            )
        return sized
