"""The record of one measured row. Field names are llama-bench's if it has the field. Samples are stored; summaries in
the JSON are computed again, not trusted, when a record is read. Unmeasured is null, never 0."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from itertools import accumulate

import pydantic

from cfsp.errors import InputError
from runtime_bench.records import summary
from runtime_bench.records.reported import (
    PROCESSOR,
    Conditions,
    Contention,
    EngineSettings,
    ProcessEnergy,
    Throttling,
    fell_back,
)
from runtime_bench.workload import FRESH, Workload

EMULATED = "emulated"
KINDS = ("measured", "constrained-host", EMULATED, "projected")
"""How a number came about; different kinds are never ranked together."""
MEMORY_VERDICTS = FITS, THRASHES, DOES_NOT_FIT = "fits", "thrashes", "does not fit"
"""How a run can stand to its memory limit, the best first."""

_PositiveInts = tuple[pydantic.PositiveInt, ...]
_Size = pydantic.NonNegativeInt | None


@dataclass(frozen=True)
class Environment:
    """The machine at the time; None is unknown."""

    cpu_model: str | None  # Marketing name of the processor
    cpus_usable: int | None  # Cores the measurement may use; None if unknown
    governor: str | None  # Frequency governor of the first core
    load_average: float | None  # Load of the last minute, just before the first sample
    memory_bytes: int | None  # Size of the main memory
    platform: str  # Operating system and instruction set
    versions: dict[str, str]  # Names of libraries to their versions
    system_info: str | None = None  # The engine's line about the processor features it uses


@dataclass(frozen=True)
class MeasuredOn:
    """That a row's samples were looked at, and more taken if they decided nothing."""

    looks: pydantic.PositiveInt  # Most looks; its intervals are surer in proportion
    seconds: pydantic.NonNegativeFloat = 0.0  # How long it was measured on
    time_over: bool = False  # Whether that ended it, undecided


@dataclass(frozen=True)
class BenchRecord:
    """One row: a file, a workload, a thread count."""

    kind: str  # One of KINDS
    target: str
    engine: str
    status: str  # `ok` or `failed`; a failed row keeps the samples it got
    failure: str | None  # Why it failed, one line
    session: str  # Id of the interleaved session; samples of one session may be compared pair by pair
    workload: str  # Kind of workload: pp, tg, ttft, start, load
    test: str  # The workload's name in tables, e.g. pp512.
    model_filename: str  # The file as it was named
    model_type: str | None  # The engine's description of it
    model_size: _Size  # Bytes of its weights
    model_n_params: _Size  # Number of its weights
    file_size_bytes: _Size  # Size of the file
    file_sha256: str | None  # Hash of the file
    n_prompt: pydantic.NonNegativeInt  # Prompt tokens timed
    n_gen: pydantic.NonNegativeInt  # Generated tokens timed
    n_depth: pydantic.NonNegativeInt  # Tokens in the context before
    n_batch: pydantic.PositiveInt  # Most tokens given to the engine at once
    n_ubatch: pydantic.PositiveInt  # Most tokens computed at once
    n_threads: pydantic.PositiveInt
    backends: str | None  # What the engine computes on
    cpu_info: str | None
    test_time: str | None  # UTC time at which the first sample began, RFC 3339
    warmup: bool  # Whether one run was made and thrown away before the samples of each process
    samples_per_process: pydantic.PositiveInt  # Most samples that came from one process
    environment: Environment
    samples_ns: _PositiveInts = ()  # Wall times, nanoseconds, in the order taken
    sequence: tuple[int, ...] = ()  # Of each sample: the number of its process within the session, from 0
    load_samples_ns: _PositiveInts = ()  # Time to open the file in each process
    page_cache: str = "as_found"  # What was done to the page cache before opening: warm, cold, as_found
    page_cache_shares: tuple[
        float | None, ...
    ] = ()  # Of each process: share of the file in it when it was opened
    baseline_rss_bytes: _Size = None  # Least resident memory of a process before anything is opened
    peak_rss_samples_bytes: _PositiveInts = ()  # Most resident memory of each process
    quarantined_ns: _PositiveInts = ()  # Samples of a first round that spread too widely and was repeated
    spread_limit: float | None = None  # p90 / p50 above which that happens
    memory_limit_bytes: _Size = None  # What a run might use
    memory_verdict: str | None = None  # Of MEMORY_VERDICTS, the worst of all processes
    reread_bytes: _Size = None  # Bytes of files that were read again, the most of any process
    text_sample: str | None = None  # The first of a few continuations that the file writes
    degenerate: str | None = None  # Why all it writes is degenerate, which voids the row's speed
    cpu_samples_ns: _PositiveInts = ()  # Processor time of all threads in each sample
    throttling: Throttling | None = None  # How the processor was slowed down to a device's score
    waited_samples_ns: tuple[
        pydantic.NonNegativeInt, ...
    ] = ()  # How long threads waited for a core, each sample
    contention: tuple[Contention | None, ...] = ()  # What else used the cores, of each process
    # How long something else than another program kept each sample from running; None if it waited for the disk
    held_samples_ns: tuple[pydantic.NonNegativeInt | None, ...] = ()
    conditions: tuple[Conditions | None, ...] = ()  # What the machine went through, of each process
    regime: str = FRESH  # In what state file and process were, of runtime_bench.workload.REGIMES
    sustained_s: float | None = None  # For how long samples were taken, if that was said and not their number
    anchor_sha256: str | None = None  # The file that all of the session took turns with
    is_anchor: bool = False  # Whether it is that file's own row
    energy: tuple[
        ProcessEnergy | None, ...
    ] = ()  # What the meters told, of each process; empty if not asked for
    engine_settings: EngineSettings = dataclasses.field(default_factory=EngineSettings)  # How it computed
    measured_on: MeasuredOn | None = None  # Whether samples were added until budgets were decided

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(
                "unknown kind of number", field="kind", value=self.kind, allowed=", ".join(KINDS)
            )
        if self.status not in ("ok", "failed"):
            raise InputError("unknown status", field="status", value=self.status, allowed="ok, failed")
        if self.test != self.timed.test:
            raise InputError("does not match the workload's sizes", field="test", value=self.test)

    @property
    def timed(self) -> Workload:
        """What was timed."""
        return Workload(self.workload, self.n_prompt, self.n_gen, self.n_depth, self.regime)

    @property
    def ok(self) -> bool:
        """Whether every sample was taken."""
        return self.status == "ok"

    @property
    def void(self) -> bool:
        """Whether the speed counts for nothing: the file writes no text that makes sense."""
        return self.degenerate is not None

    @property
    def quantized_cache(self) -> str | None:
        """Type of a quantized key-value cache, or None."""
        return self.engine_settings.quantized_cache

    @property
    def on_processor(self) -> bool:
        """Whether the processor computed; rows whose engine does not say are taken to be the processor's."""
        return self.backends is None or self.backends in PROCESSOR

    @property
    def fallback(self) -> str | None:
        """The backend that was asked for and did not compute, or None."""
        return fell_back(self.engine_settings.asked_backend, self.backends)

    @property
    def rounds(self) -> tuple[int, ...]:
        """For each sample, which process it came from, counted from 0: 0, 0, 1, 1 for two of each."""
        if len(self.sequence) != len(self.samples_ns):
            return tuple(range(len(self.samples_ns)))
        order = {number: place for place, number in enumerate(dict.fromkeys(self.sequence))}
        return tuple(order[number] for number in self.sequence)

    @property
    def n_tokens(self) -> int:
        """Tokens of a sample; 0 for workloads that are no rate (ttft, load)."""
        return self.n_prompt + self.n_gen if self.timed.is_rate else 0

    @property
    def samples_ts(self) -> tuple[float, ...]:
        """Tokens per second of each sample; empty for workloads that are no rate."""
        return tuple(1e9 * self.n_tokens / ns for ns in self.samples_ns) if self.n_tokens else ()

    @property
    def median_ts(self) -> float | None:
        """Tokens per second at the median time; None for workloads that are no rate."""
        return self.speed_at(self.median_ns)

    def speed_at(self, time_ns: float | None) -> float | None:
        """Tokens per second of a sample that takes so long; None for workloads that are no rate."""
        return 1e9 * self.n_tokens / time_ns if self.n_tokens and time_ns else None

    @property
    def median_ns(self) -> float | None:
        """Median wall time of a sample."""
        return summary.median(self.samples_ns)

    @property
    def load_ns(self) -> float | None:
        """Median time to open the file."""
        return summary.median(self.load_samples_ns)

    @property
    def peak_rss_bytes(self) -> int | None:
        """Highest resident memory of any of its processes."""
        return max(self.peak_rss_samples_bytes, default=None)

    @property
    def sustained_curve(self) -> tuple[tuple[float, float], ...]:
        """(second at which it began, tokens per second) of each sample; empty unless generation was sustained."""
        if self.sustained_s is None:
            return ()
        conditions = self.conditions[0] if self.conditions else None
        if conditions and len(conditions.samples_s) == len(self.samples_ns):
            began = [begin - conditions.samples_s[0][0] for begin, _ in conditions.samples_s]
        else:
            began = list(accumulate((ns / 1e9 for ns in self.samples_ns[:-1]), initial=0.0))
        return tuple(zip(began, self.samples_ts, strict=False))

    def sustained_ts(self, since: float, until: float) -> float | None:
        """Tokens per second of the samples that began from `since` to before `until`, in seconds."""
        curve = zip(self.sustained_curve, self.samples_ns, strict=False)
        times = [ns for (second, _), ns in curve if since <= second < until]
        return 1e9 * self.n_tokens * len(times) / sum(times) if times else None

    @property
    def first_minute_ts(self) -> float | None:
        """Speed of the first minute of sustained generation."""
        return self.sustained_ts(0.0, 60.0)

    @property
    def last_third_ts(self) -> float | None:
        """Speed of the last third of sustained generation."""
        curve = self.sustained_curve
        whole = curve[-1][0] + self.samples_ns[-1] / 1e9 if curve else 0.0
        return self.sustained_ts(whole * 2 / 3, math.inf)

    @property
    def spread(self) -> float | None:
        """p90 / p50 of the samples."""
        return summary.spread(self.samples_ns)

    @property
    def page_cache_state(self) -> str:
        """`warm` if every process found the whole file in memory, `cold` if none of it, else `mixed` or
        `unknown`."""
        shares = self.page_cache_shares
        if not shares or None in shares:
            return "unknown"
        known = [share for share in shares if share is not None]
        return "warm" if min(known) > 0.99 else "cold" if max(known) < 0.01 else "mixed"
