"""What a search chooses from, where it stops, and one point of it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import NonNegativeInt

from cfsp.errors import InputError
from cfsp.settings import setting
from cfsp.units import format_bytes, megabytes, parse_bytes
from cfsp.validation import Share
from exporters.families import GGUF, required_multiple
from phoneready.evaluation.settings import WindowSettings
from phoneready.figures.figures import INCONCLUSIVE, MISSED, PASS
from runtime_bench.devices import load_profiles
from runtime_bench.targets.table import check_target

STRATEGIES = GRID, BISECT, STEPS, OPTUNA = "grid", "bisect", "steps", "optuna"
AUTO = "auto"
_QUANTS = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q8_0")
_STEP = 0.01
"""Ratios that a bisection tells apart."""
_MOST_BISECTED = 0.5
_LEAST_TOKENS = 4096
"""Of a vocabulary that nobody asked for."""


@dataclass(frozen=True)
class Point:
    """A file: what is pruned of the dense model, whether the rest is trained, and how it is quantized."""

    quant: str
    vocabulary: NonNegativeInt = 0  # tokens that are kept; 0: all
    ratio: Share = 0.0  # of FFN channels that go
    groups: Share = 0.0  # of key-value groups that go
    recovered: bool = False
    steps: tuple[Share, ...] = ()  # ratios at which it was pruned and trained before, ascending

    @property
    def is_dense(self) -> bool:
        return not (self.vocabulary or self.ratio or self.groups)

    @property
    def align(self) -> int:
        """What widths are multiples of."""
        return required_multiple((self.quant,)) if self.ratio else 1

    @property
    def model(self) -> str:
        parts = [f"{self.vocabulary} tokens"] if self.vocabulary else []
        parts += [f"KV groups -{100 * self.groups:g} %"] if self.groups else []
        parts += [f"FFN -{100 * self.ratio:g} %"] if self.ratio else []
        parts += [f"recovered in {len(self.steps) + 1} steps" if self.steps else "recovered"] * self.recovered
        return ", ".join(parts) or "dense"

    @property
    def label(self) -> str:
        return f"{self.model} {self.quant}"

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint; quantizations that need the same alignment share it."""
        from exporters.job import file_stem  # loads torch

        parts = [f"{self.vocabulary}tokens"] if self.vocabulary else []
        parts += [f"groups{100 * self.groups:g}"] if self.groups else []
        parts += [f"ffn{100 * self.ratio:g}by{self.align}"] if self.ratio else []
        parts += ["recovered"] if self.recovered else []
        parts += ["after" + "_".join(f"{100 * one:g}" for one in self.steps)] if self.steps else []
        return file_stem("-".join(parts) or "dense")

    @property
    def key(self) -> str:
        return f"{self.checkpoint}-{self.quant}"


@dataclass(frozen=True)
class Held:
    """A file against one limit; `over` is by how much of it the limit is missed, negative if it is kept."""

    limit: str
    figure: str
    outcome: str
    over: float


@functools.cache
def _is_profile(name: str) -> bool:
    return name in load_profiles()


def _find_place(name: str) -> str:
    try:
        return name if _is_profile(name) else check_target(name)
    except InputError as error:
        raise InputError(f"{error}; or a device profile: {', '.join(load_profiles())}") from error


@dataclass(frozen=True)
class SearchSettings(WindowSettings):
    """Points, limits, and how many points are made."""

    quants: tuple[str, ...] = setting(
        (),
        f"Quantizations to choose from: {', '.join(GGUF.names)}.",
        look_up=lambda name: GGUF.find(name).name,
        metavar="QUANT,...",
        shown=f"{','.join(_QUANTS)}; with --max-size mixed:SIZE,Q4_0,Q4_K_M",
    )
    vocabularies: tuple[int, ...] = setting(
        (),
        "Numbers of tokens to keep; 0: all.",
        ge=0,
        le=2**24,
        metavar="N,...",
        shown="0; with a limit on what a file takes two thirds and a third of them, too",
    )
    ratios: tuple[float, ...] = setting(
        (),
        "Shares of FFN channels to remove; the ends of the range for bisect, the steps for steps.",
        ge=0,
        lt=1,
        metavar="RATIO,...",
        shown="0; for bisect 0,0.5",
    )
    groups: tuple[float, ...] = setting(
        (0.0,), "Shares of key-value groups to remove.", ge=0, lt=1, metavar="SHARE,...", rare=True
    )
    recover: Path | None = setting(
        None,
        "Also train every pruned model as this file says, in the keys of [recover] in release.toml.",
        metavar="FILE.toml",
        rare=True,
    )
    strategy: str = setting(
        AUTO,
        "grid: all combinations; optuna: those that its sampler proposes; bisect: the least ratio that meets the "
        "limits on size, speed and memory, else the largest within those on quality; steps: prune and train from "
        "ratio to ratio while the quality is within its limits.",
        choices=(AUTO, *STRATEGIES),
        shown="optuna where there are more combinations than --set max_points, else grid",
        rare=True,
    )
    max_points: int | None = setting(
        None, "Most files to make, those of an earlier run included.", ge=1, rare=True
    )
    storage: str | None = setting(
        None,
        "Share the search with other processes or machines: an Optuna storage, a journal file or an SQL URL. Each "
        "process has a folder of its own.",
        metavar="FILE|URL",
        rare=True,
    )
    max_size: int | None = setting(None, "Largest file.", ge=1, le=2**50, parse=parse_bytes, metavar="SIZE")
    min_speed: float | None = setting(None, "Least decode speed, tokens per second.", gt=0, le=1e6)
    max_memory: int | None = setting(
        None, "Most memory while it decodes.", ge=1, le=2**50, parse=parse_bytes, metavar="SIZE"
    )
    max_kl: float | None = setting(None, "Largest mean KL divergence from the dense model.", gt=0)
    max_bits: float | None = setting(
        None, "Most bits per byte, times the dense model's in float32, such as 1.05.", gt=0, rare=True
    )
    on: str | None = setting(
        None,
        "Where speed and memory are measured, as bench --on; or a device profile, to which they are projected, and "
        "whose memory the file must fit.",
        look_up=_find_place,
        metavar="PLACE|PROFILE",
        shown="local if there is a limit on them, else nowhere",
    )

    @property
    def device(self) -> str | None:
        """The device profile that speed and memory are projected to."""
        return self.on if self.on is not None and _is_profile(self.on) else None

    @property
    def limits_cost(self) -> bool:
        return any(one is not None for one in (self.max_size, self.min_speed, self.max_memory, self.device))

    @property
    def limits_quality(self) -> bool:
        return self.max_kl is not None or self.max_bits is not None

    @property
    def place(self) -> str | None:
        """Where speed and memory are measured; None: nowhere."""
        limited = self.min_speed is not None or self.max_memory is not None
        return (self.on or ("local" if limited else None)) if self.device is None else None

    def check(self) -> None:
        given = [ratio for ratio in self.ratios if ratio]
        if self.strategy == BISECT and not (self.limits_cost or self.limits_quality):
            raise InputError(
                "--set strategy=bisect looks for a limit: give one, such as --max-size or --max-kl"
            )
        if self.strategy == STEPS and not (self.recover and given):
            raise InputError(
                "--set strategy=steps prunes and trains from ratio to ratio: give --set recover=FILE and --ratios"
            )
        if self.storage and self.strategy in (BISECT, STEPS):
            raise InputError(
                f"--set storage shares grid and optuna: leave out --set strategy={self.strategy}"
            )
        if self.strategy == OPTUNA and self.max_points is None:
            raise InputError("--set strategy=optuna: give --set max_points=N")

    def settled(self, vocabulary: int) -> SearchSettings:
        """With the defaults that depend on other settings and on the size of the dense model's vocabulary."""
        sized = (GGUF.find(f"mixed:{self.max_size}").name, *_QUANTS[:2]) if self.max_size else _QUANTS
        nothing_said = not (self.vocabularies or self.ratios or any(self.groups))
        # Bytes, special tokens and what chats are written in have to stay of any vocabulary.
        thirds = (0, *(size for n in (2, 1) if (size := vocabulary * n // 3 // 256 * 256) >= _LEAST_TOKENS))
        tokens = thirds if nothing_said and self.limits_cost else (0,)
        bisected = (0.0, _MOST_BISECTED)
        return replace(
            self,
            quants=self.quants or sized,
            vocabularies=self.vocabularies or tuple(dict.fromkeys(tokens)),
            ratios=self.ratios or (bisected if self.strategy == BISECT else (0.0,)),
        )

    def points(self, ratios: Iterable[float] | None = None) -> Iterator[Point]:
        """All combinations: the dense model's first, one vocabulary and checkpoint after the other, few bits first."""
        dense = [Point(quant) for quant in self.quants]
        tokens = sorted(set(self.vocabularies), key=lambda size: (size > 0, -size))
        axes = (tokens, sorted(set(self.groups)), sorted(set(self.ratios if ratios is None else ratios)))
        made = [
            Point(quant, vocabulary, ratio, groups, recovered)
            for vocabulary, groups, ratio in itertools.product(*axes)
            for recovered in ((False, True) if self.recover else (False,))
            for quant in self.quants
            if vocabulary or groups or ratio
        ]
        order = list(dict.fromkeys(one.checkpoint for one in (*dense, *made)))
        bits = {quant: GGUF.find(quant).bits for quant in self.quants}
        yield from sorted((*dense, *made), key=lambda one: (order.index(one.checkpoint), bits[one.quant]))

    def bisected(self) -> list[list[Point]]:
        """Lines of points of ascending ratio, all else alike."""
        low, high = min(self.ratios), max(self.ratios)
        count = round((high - low) / _STEP)
        ratios = [round(low + step * _STEP, 6) for step in range(count + 1)]
        heads = dict.fromkeys(replace(one, ratio=0.0) for one in self.points(ratios))
        lines = [[replace(head, ratio=ratio) for ratio in ratios] for head in heads]
        return [
            [replace(one, recovered=one.recovered and not one.is_dense) for one in line] for line in lines
        ]

    def held(
        self,
        *,
        size: int | None = None,
        memory: float | None = None,
        fits: bool | None = None,
        speed: tuple[float, float] | None = None,
        kl: float | None = None,
        bits: float | None = None,
    ) -> Iterator[Held]:
        """How a file stands to the limits on what is known of it.

        Size and memory are bytes, `speed` the slowest and fastest tokens per second, `bits` times the dense model's.
        """
        rows: tuple[tuple[float | None, float | None, str, Callable[[float], str]], ...] = (
            (size, self.max_size, "size", lambda count: megabytes(int(count))),
            (memory, self.max_memory, "memory", format_bytes),
            (kl, self.max_kl, "KL", "{:.4f}".format),
            (bits, self.max_bits, "bits over dense", "{:.4f}".format),
        )
        for value, limit, name, words in rows:
            if value is not None and limit is not None:
                outcome = MISSED if value > limit else PASS
                yield Held(f"{name} up to {words(limit)}", words(value), outcome, value / limit - 1)
        if self.min_speed is not None and speed is not None:
            low, high = speed
            outcome = PASS if low >= self.min_speed else MISSED if high < self.min_speed else INCONCLUSIVE
            figure = f"{low:.1f} to {high:.1f} t/s"
            yield Held(f"decode of {self.min_speed:g} t/s", figure, outcome, 1 - low / self.min_speed)
        if self.device is not None and fits is not None:
            yield Held(
                f"memory of {self.device}", "fits" if fits else "does not fit", PASS if fits else MISSED,
                0.0 if fits else 1.0,
            )  # fmt: skip

    @property
    def limits(self) -> tuple[str, ...]:
        every = self.held(size=0, memory=0, fits=True, speed=(0, 0), kl=0, bits=0)
        return tuple(one.limit for one in every)
