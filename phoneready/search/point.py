"""What a search chooses from, its limits, and one point of it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pydantic import NonNegativeInt

from cfsp.errors import InputError
from cfsp.settings import Settings, setting
from cfsp.text.settings import BUILTIN_TEXT, SELF, TEXT_FORMS
from cfsp.units import parse_bytes
from cfsp.validation import Share
from exporters.families import GGUF, ONNX
from phoneready.figures.figures import BudgetConfig
from runtime_bench.devices import find_profile, load_profiles, memory_limit
from runtime_bench.targets.table import check_target

QUANTS = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q8_0")
GENERATED = 64
"""Tokens of the decode speed that is measured."""
LEAST_TOKENS = 4096
"""Of a vocabulary that nobody asked for: bytes, special tokens and what chats are written in have to stay."""
LEAST_SHARE, STEP = 1 / 8, 256
"""Of the dense model's tokens; and what numbers of tokens are multiples of."""


@dataclass(frozen=True)
class Point:
    """A file: what is pruned of the dense model, and how it is quantized."""

    quant: str
    vocabulary: NonNegativeInt = 0  # tokens that are kept; 0: all
    ratio: Share = 0.0  # of FFN channels that go

    @property
    def is_dense(self) -> bool:
        return not (self.vocabulary or self.ratio)

    @property
    def model(self) -> str:
        parts = [f"{self.vocabulary} tokens"] if self.vocabulary else []
        parts += [f"FFN -{100 * self.ratio:g} %"] if self.ratio else []
        return ", ".join(parts) or "dense"

    @property
    def label(self) -> str:
        return f"{self.model} {self.quant}"

    @property
    def which(self) -> str:
        """Ends the names of what is made of its checkpoint, which quantizations that fit the same widths share."""
        from exporters.families import required_multiple

        tokens = f"-{self.vocabulary}tokens" if self.vocabulary else ""
        by = f"by{required_multiple((self.quant,))}" if self.ratio else ""
        return tokens + (f"-ffn{100 * self.ratio:g}{by}".replace(".", "_") if self.ratio else "")

    @property
    def key(self) -> str:
        return f"{self.which}-{self.quant}".lstrip("-")


@functools.cache
def _is_profile(name: str) -> bool:
    return name in load_profiles()


def _find_place(name: str) -> str:
    try:
        return name if _is_profile(name) else check_target(name)
    except InputError as error:
        raise InputError(f"{error}; or a device profile: {', '.join(load_profiles())}") from error


def _find_quant(name: str) -> str:
    if ONNX.has(name) and not GGUF.has(name):
        raise InputError(
            "search makes GGUF files, whose sizes it can foretell; make others with quantize --to", value=name,
            allowed=", ".join(GGUF.names),
        )  # fmt: skip
    return GGUF.find(name).name


@dataclass(frozen=True)
class SearchSettings(Settings):
    """Points, limits, and what files are measured on."""

    text: tuple[str, ...] = setting((BUILTIN_TEXT,), f"Text to measure on: {TEXT_FORMS}.", metavar="REF")
    chats: tuple[str, ...] = setting(
        (SELF,),
        "Chats to measure on, as `text`, or `self`: sampled from the model with another seed.",
        metavar="REF",
    )
    eval_seqlen: int | None = setting(
        None,
        "Tokens in a window of them.",
        ge=2,
        le=2**20,
        rare=True,
        shown="1024, or the model's context",
    )
    max_windows: int = setting(16, "Most windows of each text.", ge=2, le=2**20, rare=True)
    quants: tuple[str, ...] = setting(
        (),
        f"Quantizations to choose from: {', '.join(GGUF.names)}.",
        look_up=_find_quant,
        metavar="QUANT,...",
        shown=f"a type for each tensor with --max-size or --max-kl, else {','.join(QUANTS)}",
    )
    vocabularies: tuple[int, ...] = setting(
        (),
        "Numbers of tokens to keep; 0: all.",
        ge=0,
        le=2**24,
        metavar="N,...",
        shown="what the limits want",
    )
    ratios: tuple[float, ...] = setting(
        (0.0,), "Shares of FFN channels to remove.", ge=0, lt=1, metavar="RATIO,..."
    )
    max_points: int = setting(
        12, "Most files to make; what is known of an earlier run is not counted.", ge=1, rare=True
    )
    max_size: int | None = setting(None, "Largest file.", ge=1, le=2**50, parse=parse_bytes, metavar="SIZE")
    min_speed: float | None = setting(None, "Least decode speed, tokens per second.", gt=0, le=1e6)
    max_memory: int | None = setting(
        None, "Most memory while it decodes.", ge=1, le=2**50, parse=parse_bytes, metavar="SIZE"
    )
    max_kl: float | None = setting(
        None, "Largest mean KL divergence from the dense model, on each text.", gt=0
    )
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
    def sources(self) -> tuple[tuple[str, str], ...]:
        """(`text` or `chats`, reference) of all of them."""
        return (*(("text", one) for one in self.text), *(("chats", one) for one in self.chats))

    @property
    def device(self) -> str | None:
        """The device profile that speed and memory are projected to."""
        return self.on if self.on is not None and _is_profile(self.on) else None

    @property
    def place(self) -> str | None:
        """Where speed and memory are measured; None: nowhere."""
        limited = self.min_speed is not None or self.max_memory is not None
        return (self.on or ("local" if limited else None)) if self.device is None else None

    @property
    def limits_cost(self) -> bool:
        return any(one is not None for one in (self.max_size, self.min_speed, self.max_memory, self.device))

    @property
    def refines(self) -> bool:
        """Whether tokens and sizes are chosen by what the limits want; else all combinations are made."""
        named = self.quants or self.vocabularies or any(self.ratios)
        return not named and (self.max_size is not None or self.max_kl is not None)

    @property
    def budgets(self) -> tuple[BudgetConfig, ...]:
        """The limits, as a release has them; relative to the dense model in float32."""
        speed, memory = f"tg{GENERATED}", "peak_rss_bytes"
        if self.device is not None:
            speed, memory = "projected_tg", "projected_memory_bytes"
        room = memory_limit(find_profile(self.device, load_profiles()).profile)[0] if self.device else None
        rows: tuple[tuple[str, str, float | None, str | None], ...] = (
            ("file_bytes", "at_most", self.max_size, None),
            (memory, "at_most", min(filter(None, (self.max_memory, room)), default=None), None),
            (speed, "at_least", self.min_speed, None),
            ("kl_mean", "at_most", self.max_kl, None),
            ("bits_per_byte", "at_most", self.max_bits, "dense"),
        )
        return tuple(
            BudgetConfig.model_validate({"metric": metric, side: limit, "relative_to": relative})
            for metric, side, limit, relative in rows
            if limit is not None
        )

    def settled(self, vocabulary: int) -> SearchSettings:
        """With the defaults that depend on other settings and on the size of the dense model's vocabulary."""
        thirds = (size for n in (2, 1) if (size := vocabulary * n // 3 // STEP * STEP) >= LEAST_TOKENS)
        tokens = (0, *thirds) if self.limits_cost and not (self.quants or any(self.ratios)) else (0,)
        return replace(self, quants=self.quants or QUANTS, vocabularies=self.vocabularies or tokens)

    def points(self) -> Iterator[Point]:
        """All combinations: the dense model's first, one checkpoint after the other, few bits first."""
        tokens = sorted({0, *self.vocabularies}, key=lambda size: (size > 0, -size))
        bits = {quant: GGUF.find(quant).bits for quant in self.quants}
        for vocabulary, ratio in itertools.product(tokens, sorted({0.0, *self.ratios})):
            one = Point("", vocabulary, ratio)
            if one.is_dense or (vocabulary in self.vocabularies and ratio in self.ratios):
                for quant in sorted(self.quants, key=lambda quant: bits[quant]):
                    yield replace(one, quant=quant)
