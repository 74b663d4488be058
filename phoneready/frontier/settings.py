"""What to measure for a frontier, and where to stop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType

from cfsp.errors import InputError
from cfsp.evaluation.task_results import READS as OF_TASKS
from cfsp.evaluation.task_results import TaskSettings
from cfsp.pruning.settings import ALIGN
from cfsp.settings import Reads, setting
from cfsp.units import parse_bytes
from exporters.gguf.family import GGUF
from phoneready.evaluation.settings import WindowSettings
from phoneready.settings.structures import SearchedStructures, Structures

BASE_QUANT = "Q4_0"
"""What speeds are relative to: the dense file in this quantization."""


def parse_sizes(text: str, field: str) -> tuple[int, ...]:
    """Sizes as `70MB,80MB`.

    Raises:
        InputError: One of them is none; `field` is named.
    """
    sizes = tuple(parse_bytes(part, field) for part in text.split(",") if part.strip())
    if not sizes:
        raise InputError("empty", field=field, allowed="such as 70MB,80MB")
    return tuple(dict.fromkeys(sizes))


@dataclass(frozen=True)
class FrontierSettings(SearchedStructures, TaskSettings, WindowSettings):
    """Which files to measure on what, and where to stop."""

    quants: tuple[str, ...] = setting(
        (),
        f"Quantizations of every model: {', '.join(GGUF.names)}.",
        look_up=lambda name: GGUF.find(name).name,
        metavar="QUANT,...",
        shown="all that round",
    )
    prune_ratios: tuple[float, ...] = setting(
        (0.0,), "Shares of FFN channels to remove; 0: none.", ge=0, lt=1, metavar="RATIO,..."
    )
    recover: bool = setting(
        False, "Measure every pruned model trained, too, as the options of recovery say.", option="--recover"
    )
    align: int = setting(
        0,
        replace(
            ALIGN,
            help=f"{ALIGN.help[:-1]}; 0: what each quantization needs.",
            ge=0,
            shown="by the quantization",
        ),
    )
    at: tuple[int, ...] | None = setting(
        None,
        "Sizes to name the best file of, such as 70MB,80MB.",
        ge=1,
        le=2**50,
        parse=parse_sizes,
        metavar="SIZE,...",
        shown="those at which it changes",
    )
    at_speed: tuple[float, ...] = setting(
        (1.2, 1.5),
        f"Decode speeds to name the best file of, times that of the dense {BASE_QUANT} file.",
        gt=0,
        le=1000,
        metavar="TIMES,...",
    )
    max_size: int | None = setting(
        None, "Make no file that will be larger.", ge=1, le=2**50, parse=parse_bytes, metavar="SIZE"
    )
    max_points: int | None = setting(None, "Most files to measure, those of an earlier run included.", ge=1)
    trials: int = setting(
        0,
        "Search: measure so many pruned files that Optuna proposes, of ratios between the least and the largest given; "
        "several runs may share the folder. 0: measure all combinations.",
        ge=0,
        le=10**6,
    )
    keep: bool = setting(False, "Keep all files; else those that others dominate are deleted.")
    speed: bool = setting(
        True,
        "Measure decode speed and peak memory.",
        option="--no-speed",
        off="Measure no decode speed and no memory.",
    )

    @property
    def removes_something(self) -> bool:
        """Whether any model is made but the dense one."""
        return any(self.prune_ratios) or not all(one.is_whole for one in self.combined(Structures()))

    @property
    def chosen_quants(self) -> tuple[str, ...]:
        """The quantizations; where none is named, all that round."""
        rounded = (name for name, row in GGUF.formats.items() if row.width_multiple > 1)
        return self.quants or tuple(rounded)


READS: Reads = MappingProxyType(
    {
        **OF_TASKS,
        "recover": (
            lambda asked: asked.removes_something,
            "without something that goes, such as --prune-ratios 0.1: the dense model is not trained",
        ),
    }
)
