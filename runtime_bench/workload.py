"""What is measured: workloads in llama-bench's terms, and the settings of one benchmark session."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from cfsp.errors import InputError
from cfsp.settings import Settings, check_settings, setting
from cfsp.units import parse_seconds
from exporters.gguf.quants import DEFAULT_CACHE, MEASURED_CACHES

FRESH, SUSTAINED = "fresh", "sustained"
"""Regimes that are there without being named: of every row, and where a time is given."""


@dataclass(frozen=True)
class Workload:
    """One thing to time."""

    kind: str  # `pp`, `tg`, `ttft`, `start` or `load`; see WORKLOAD_KINDS
    n_prompt: int = 0  # Prompt tokens that are timed
    n_gen: int = 0  # Generated tokens that are timed
    n_depth: int = 0  # Tokens already in the context, put there before the clock starts
    regime: str = FRESH  # In what state the file and the process are; see REGIMES

    def __post_init__(self) -> None:
        if self.kind not in WORKLOAD_KINDS:
            raise InputError(
                "unknown workload", field="kind", value=self.kind, allowed=", ".join(WORKLOAD_KINDS)
            )
        if self.regime not in REGIMES:
            raise InputError("unknown regime", field="regime", value=self.regime, allowed=", ".join(REGIMES))

    @property
    def test(self) -> str:
        """Its name in tables, as llama-bench writes it: pp512, tg128, pp512 @ d1024; ours: ttft128, start128, load,
        tg128 @ cold."""
        size = {"tg": self.n_gen, "load": ""}.get(self.kind, self.n_prompt)
        depth = f" @ d{self.n_depth}" if self.n_depth else ""
        return f"{self.kind}{size}{depth}" + (f" @ {self.regime}" if self.regime != FRESH else "")

    @property
    def opens(self) -> bool:
        """Whether the opening of the file is timed, which a process does but once."""
        return self.kind in ("start", "load")

    @property
    def is_rate(self) -> bool:
        """Whether tokens a second are timed, of prefill or of decode alone."""
        return self.kind in ("pp", "tg")

    @property
    def n_ctx(self) -> int:
        """Context length it needs."""
        return max(self.n_prompt + self.n_gen + self.n_depth, 1)


WORKLOAD_KINDS = MappingProxyType(
    {
        "pp": "prompt processing: random tokens, logits of the last one only, in batches of n_batch",
        "tg": "token generation: random tokens one at a time, logits of each",
        "ttft": "time to first token: a real text tokenized and processed, its first token sampled greedily",
        "start": "opening the file and then the time to first token: what waits for whoever opens an application",
        "load": "opening the file until the context is ready for tokens",
    }
)


class Regime(NamedTuple):
    """In what state the file and the process are when a sample begins."""

    help: str
    page_cache: str | None = None  # What is done to it before opening; None leaves it to the workload
    warmup: bool = True  # Whether an uncounted run comes first, if the settings have one
    least_samples: int = 1  # Of a process
    lasting: bool = False  # Whether one process generates for as long as the settings say

    @property
    def opened_before(self) -> bool:
        """Whether samples follow others in their process, which opens its file but once."""
        return self.least_samples > 1 or self.lasting


REGIMES = MappingProxyType(
    {
        FRESH: Regime("a fresh process for each sample, warmed up"),
        "cold": Regime(
            "a fresh process, the file dropped from the page cache, nothing warmed up",
            page_cache="cold",
            warmup=False,
        ),
        "warm": Regime(
            "three samples or more in each process, warmed up, so that a verdict needs -r 15", least_samples=3
        ),
        SUSTAINED: Regime("generation for as long as --sustained says, in one process", lasting=True),
    }
)


def default_threads() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class SamplingSettings(Settings):
    """What is measured and how often. A size of 0 in `n_prompt`, `n_gen` or `ttft` leaves that workload out, as in
    llama-bench.
    """

    n_prompt: tuple[int, ...] = setting(
        (512,), "Prompt sizes of pp.", ge=0, le=2**20, option="-p --n-prompt", metavar="N,..."
    )
    n_gen: tuple[int, ...] = setting(
        (128,), "Generated tokens of tg.", ge=0, le=2**20, option="-n --n-gen", metavar="N,..."
    )
    ttft: tuple[int, ...] = setting(
        (128,), "Prompt sizes of time to first token.", ge=0, le=2**20, metavar="N,...", rare=True
    )
    n_threads: tuple[int, ...] = setting(
        (),
        "Thread counts.",
        ge=1,
        le=4096,
        option="-t --threads",
        metavar="N,...",
        shown="all cores that the target lets a process use",
    )
    repetitions: int = setting(
        5, "Samples of each row; a verdict needs five.", ge=1, le=10_000, option="-r --repetitions"
    )
    samples_per_process: int = setting(
        1,
        "Samples that one process takes. 1 is the most independent and costs a load and a warm-up a sample; "
        "raise it for files that load slowly.",
        ge=1,
        le=10_000,
        rare=True,
    )
    warmup: bool = setting(
        True, "Run each workload once, unrecorded, before its first sample in a process.", rare=True
    )
    check_text: bool = setting(
        True, "Let each file write first: degenerate text voids its speeds.", rare=True
    )
    delay_s: float = setting(
        0.0, "Seconds to pause before each process, to cool off.", ge=0, le=86_400, rare=True
    )
    cooldown_timeout_s: float = setting(
        0.0,
        "Seconds to wait at most before each process until clocks are free, nothing is hotter than 45 °C and the "
        "system reports no heat; a row for which that is not enough fails.",
        ge=0,
        le=86_400,
        rare=True,
    )
    energy: bool = setting(
        False,
        "Also read energy meters, RAPL's or an unplugged battery's: joules per token of pp and tg.",
    )
    cache_type: str | None = setting(
        None,
        "Type of the key-value cache of GGUF files.",
        choices=MEASURED_CACHES,
        metavar="TYPE",
        shown=DEFAULT_CACHE,
        example="q8_0",
        rare=True,
    )
    backend: str | None = setting(
        None,
        "What shall compute: a provider of ONNX Runtime, such as cuda, coreml, qnn or nnapi; gpu in llama.cpp, in its "
        "native runner also a backend or a device by name. The record says what did.",
        look_up=str.lower,
        metavar="NAME",
        shown="the CPU",
        example="gpu",
        rare=True,
    )
    timeout_s: float = setting(
        600.0, "Seconds after which a process is ended and its row fails.", gt=0, le=10**6, rare=True
    )


@dataclass(frozen=True)
class BenchSettings(SamplingSettings):
    """One benchmark session."""

    n_depth: tuple[int, ...] = setting(
        (0,),
        "Tokens in the context before, of pp and tg.",
        ge=0,
        le=2**20,
        least=1,
        metavar="N,...",
        rare=True,
    )
    start: tuple[int, ...] = setting(
        (),
        "Prompt sizes of opening the file and then time to first token.",
        ge=0,
        le=2**20,
        metavar="N,...",
        rare=True,
    )
    regimes: tuple[str, ...] = setting(
        (FRESH,),
        f"{'; '.join(f'{name}: {regime.help}' for name, regime in REGIMES.items())}.",
        choices="runtime_bench.workload:REGIMES",
        least=1,
        metavar="NAME,...",
        rare=True,
    )
    sustained_s: float = setting(
        0.0,
        "Also generate for so long in one process: how the speed holds, beside clocks and heat.",
        ge=0,
        le=43_200,
        parse=parse_seconds,
        option="--sustained",
        metavar="TIME",
    )
    load: bool = True  # Whether load is measured by itself (every process notes its load time anyway)
    n_batch: int = 2048  # Most tokens given to the engine at once
    n_ubatch: int = 512  # Most tokens it computes at once
    spread_limit: float = 1.25  # p90 / p50 above which a row is measured once more
    seed: int = setting(0, "Seed of the random tokens.", rare=True)

    def __post_init__(self) -> None:
        check_settings(self)

    def threads(self, cores: int | None = None) -> tuple[int, ...]:
        """Thread counts, each once, in the order given; all `cores` where none is given.

        A machine that does not answer does not say how many it has: one thread is tried, and fails.
        """
        return tuple(dict.fromkeys(self.n_threads or (cores or 1,)))


def workloads_of(settings: BenchSettings) -> tuple[Workload, ...]:
    """The workloads of a session, each once, regime by regime in the order of the table: load, pp, tg, ttft,
    start. Raises InputError: the settings leave nothing to measure, or contradict each other."""
    warm = [name for name in settings.regimes if REGIMES[name].least_samples > 1]
    opening = any(not REGIMES[name].opened_before for name in settings.regimes)
    refused = (
        (SUSTAINED in settings.regimes and not settings.sustained_s, "no time is given", "--set regimes", SUSTAINED,
         "--sustained TIME"),
        (bool(settings.sustained_s) and not any(settings.n_gen), "nothing is generated", "--sustained",
         settings.sustained_s, "with it a size in --n-gen"),
        (bool(warm) and not settings.warmup, "nothing is warmed up", "--set regimes", ", ".join(warm),
         "without --set warmup=false"),
        (any(settings.start) and not opening, "the file is open already", "--set start", settings.start,
         "with --set regimes=fresh or cold"),
    )  # fmt: skip
    for found, problem, option, value, allowed in refused:
        if found:
            raise InputError(problem, field=option, value=value, allowed=allowed)
    rows: list[Workload] = []
    for regime in settings.regimes + ((SUSTAINED,) if settings.sustained_s else ()):
        opens, lasting = not REGIMES[regime].opened_before, REGIMES[regime].lasting
        if settings.load and opens:
            rows.append(Workload("load", regime=regime))
        for depth in settings.n_depth:
            sizes = () if lasting else settings.n_prompt
            rows += (Workload("pp", n_prompt=n, n_depth=depth, regime=regime) for n in sizes if n)
            rows += (Workload("tg", n_gen=n, n_depth=depth, regime=regime) for n in settings.n_gen if n)
        for kind, sizes in (
            ("ttft", () if lasting else settings.ttft),
            ("start", settings.start if opens else ()),
        ):
            rows += (Workload(kind, n_prompt=n, n_gen=1, regime=regime) for n in sizes if n)
    if not rows:
        raise InputError("nothing to measure", allowed="a size in n_prompt, n_gen, ttft or start, or load")
    return tuple(dict.fromkeys(rows))
