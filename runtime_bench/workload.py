"""What is measured: workloads in llama-bench's terms, and the settings of one benchmark session."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from cfsp.errors import InputError


@dataclass(frozen=True)
class Workload:
    """One thing to time.

    Attributes:
        kind: `pp`, `tg`, `ttft` or `load`; see WORKLOAD_KINDS.
        n_prompt: Prompt tokens that are timed.
        n_gen: Generated tokens that are timed.
        n_depth: Tokens already in the context, put there before the clock starts.
    """

    kind: str
    n_prompt: int = 0
    n_gen: int = 0
    n_depth: int = 0

    def __post_init__(self) -> None:
        if self.kind not in WORKLOAD_KINDS:
            raise InputError(
                "unknown workload", field="kind", value=self.kind, allowed=", ".join(WORKLOAD_KINDS)
            )

    @property
    def test(self) -> str:
        """Its name in tables, as llama-bench writes it: pp512, tg128, pp512 @ d1024; ours: ttft128, load."""
        size = {"pp": self.n_prompt, "tg": self.n_gen, "ttft": self.n_prompt}.get(self.kind, "")
        return f"{self.kind}{size}" + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def n_ctx(self) -> int:
        """Context length it needs."""
        return max(self.n_prompt + self.n_gen + self.n_depth, 1)


WORKLOAD_KINDS = MappingProxyType(
    {
        "pp": "prompt processing: random tokens, logits of the last one only, in batches of n_batch",
        "tg": "token generation: random tokens one at a time, logits of each",
        "ttft": "time to first token: a real text tokenized and processed, its first token sampled greedily",
        "load": "opening the file until the context is ready for tokens",
    }
)


def default_threads() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class BenchSettings:
    """One benchmark session. A size of 0 in `n_prompt`, `n_gen` or `ttft` leaves that workload out, as in
    llama-bench.

    Attributes:
        n_prompt: Sizes of pp.
        n_gen: Sizes of tg.
        ttft: Prompt lengths of ttft, in tokens.
        load: Whether load is measured by itself (every process notes its load time anyway).
        n_depth: Context depths of pp and tg.
        repetitions: Samples of each row.
        n_threads: Thread counts; empty means all cores that the target lets a process use.
        n_batch: Most tokens given to the engine at once.
        n_ubatch: Most tokens it computes at once.
        warmup: Run each workload once, unrecorded, before its first sample in a process.
        samples_per_process: Samples that one process takes. 1 makes every sample a fresh process, which is
            the most independent and costs one load and one warm-up a sample; raise it for files that load
            slowly.
        cold_load: Ask the system to drop the file from its page cache before each load of the `load`
            workload.
        delay_s: Pause before each process, to cool off.
        timeout_s: A process that takes longer is ended and its row fails.
        spread_limit: p90 / p50 above which a row is measured once more.
        seed: Of the random tokens.
        check_text: Let each file write first; what is degenerate voids its speeds.
    """

    n_prompt: tuple[int, ...] = (512,)
    n_gen: tuple[int, ...] = (128,)
    ttft: tuple[int, ...] = (128,)
    load: bool = True
    n_depth: tuple[int, ...] = (0,)
    repetitions: int = 5
    n_threads: tuple[int, ...] = ()
    n_batch: int = 2048
    n_ubatch: int = 512
    warmup: bool = True
    samples_per_process: int = 1
    cold_load: bool = False
    delay_s: float = 0.0
    timeout_s: float = 600.0
    spread_limit: float = 1.25
    seed: int = 0
    check_text: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)!r} (allowed: {allowed})"
            for names, allowed, holds in _RULES
            for name in names
            if not holds(getattr(self, name))
        ]
        if problems:
            raise InputError("benchmark settings out of range: " + "; ".join(problems))

    def threads(self, cores: int | None = None) -> tuple[int, ...]:
        """Thread counts, each once, in the order given; all `cores` where none is given.

        A machine that does not answer does not say how many it has: one thread is tried, and fails.
        """
        return tuple(dict.fromkeys(self.n_threads or (cores or 1,)))


def _sizes(least: int) -> Callable[[Sequence[int]], bool]:
    return lambda values: all(isinstance(v, int) and v >= least for v in values)


_RULES: tuple[tuple[tuple[str, ...], str, Callable[..., bool]], ...] = (
    (("n_prompt", "n_gen", "ttft"), "whole numbers, 0 or more", _sizes(0)),
    (("n_depth",), "at least one whole number, 0 or more", lambda v: bool(v) and _sizes(0)(v)),
    (("n_threads",), "whole numbers, 1 or more", _sizes(1)),
    (("repetitions", "n_batch", "n_ubatch", "samples_per_process"), "1 or more", lambda v: v >= 1),
    (("delay_s",), "0 or more", lambda v: 0 <= v < math.inf),
    (("timeout_s",), "more than 0", lambda v: 0 < v < math.inf),
    (("spread_limit",), "more than 1", lambda v: v > 1),
)


def workloads_of(settings: BenchSettings) -> tuple[Workload, ...]:
    """The workloads of a session, each once, in the order of the table: load, pp, tg, ttft.

    Raises:
        InputError: The settings leave nothing to measure.
    """
    rows = [Workload("load")] if settings.load else []
    for depth in settings.n_depth:
        rows += [Workload("pp", n_prompt=n, n_depth=depth) for n in settings.n_prompt if n]
        rows += [Workload("tg", n_gen=n, n_depth=depth) for n in settings.n_gen if n]
    rows += [Workload("ttft", n_prompt=n, n_gen=1) for n in settings.ttft if n]
    if not rows:
        raise InputError("nothing to measure", allowed="a size in n_prompt, n_gen or ttft, or load")
    return tuple(dict.fromkeys(rows))
