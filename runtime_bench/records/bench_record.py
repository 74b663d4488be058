"""The record of one measured row.

Field names are llama-bench's where it has the field. Samples are stored, summaries are derived from them:
they stand in the JSON for its readers and are computed again, not trusted, when a record is read. Unmeasured
is null, never 0.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pydantic

from cfsp.errors import InputError
from runtime_bench.records import summary
from runtime_bench.records.conditions import Conditions
from runtime_bench.records.contention import Contention
from runtime_bench.records.energy import ProcessEnergy
from runtime_bench.records.engine_settings import PROCESSOR, EngineSettings, fell_back
from runtime_bench.records.throttling import Throttling
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
    """The machine at the time; what it does not tell is None.

    Attributes:
        cpu_model: Marketing name of the processor.
        cpus_usable: Cores the measurement may use; None where the machine did not answer.
        governor: Frequency governor of the first core.
        load_average: Load of the last minute, just before the first sample.
        memory_bytes: Size of the main memory.
        platform: Operating system and instruction set.
        versions: Names of libraries to their versions.
        system_info: The engine's line about the processor features it uses.
        core_max_khz: Highest clock of each core that says it.
        core_cap_khz: Highest clock that the system lets each of them have just then.
        temperatures_c: Thermal zones' kinds to degrees Celsius, just before the first sample.
    """

    cpu_model: str | None
    cpus_usable: int | None
    governor: str | None
    load_average: float | None
    memory_bytes: int | None
    platform: str
    versions: dict[str, str]
    system_info: str | None = None
    core_max_khz: _PositiveInts = ()
    core_cap_khz: _PositiveInts = ()
    temperatures_c: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class MeasuredOn:
    """That a row's samples were looked at, and more taken where they decided nothing.

    Attributes:
        looks: Most looks; its intervals are surer in proportion.
        seconds: How long it was measured on.
        time_over: Whether that ended it, undecided.
    """

    looks: pydantic.PositiveInt
    seconds: pydantic.NonNegativeFloat = 0.0
    time_over: bool = False


@dataclass(frozen=True)
class BenchRecord:
    """One row: a file, a workload, a thread count.

    Attributes:
        kind: One of KINDS.
        target: Where it ran.
        engine: What it ran in.
        status: `ok` or `failed`; a failed row keeps the samples it got.
        failure: Why it failed, one line.
        session: Id of the interleaved session; samples of one session may be compared pair by pair.
        workload: Kind of workload: pp, tg, ttft, start, load.
        test: The workload's name in tables, e.g. pp512.
        model_filename: The file as it was named.
        model_type: The engine's description of it.
        model_size: Bytes of its weights.
        model_n_params: Number of its weights.
        file_size_bytes: Size of the file.
        file_sha256: Hash of the file.
        n_prompt: Prompt tokens timed.
        n_gen: Generated tokens timed.
        n_depth: Tokens in the context before.
        regime: In what state file and process were, of runtime_bench.workload.REGIMES.
        anchor_sha256: Hash of the file that was measured in turns with the others of the session, so that sessions of
            other days and machines can be compared with it; None where none was.
        is_anchor: Whether it is that file's own row.
        sustained_s: For how long samples were taken, where that was said and not their number.
        n_batch: Most tokens given to the engine at once.
        n_ubatch: Most tokens computed at once.
        n_threads: Threads.
        backends: What the engine computes on.
        build_commit: Source revision of the engine.
        cpu_info: Processor.
        test_time: UTC time at which the first sample began, RFC 3339.
        warmup: Whether one run was made and thrown away before the samples of each process.
        samples_per_process: Most samples that came from one process.
        samples_ns: Wall times, nanoseconds, in the order taken.
        sequence: For each sample, the number of its process within the session, counted from 0.
        load_samples_ns: Time to open the file in each process.
        page_cache: What was done to the page cache before opening: warm, cold, as_found.
        page_cache_shares: Share of the file in the page cache when it was opened, for each process; None
            unknown.
        baseline_rss_bytes: Least resident memory, over processes, with the engine imported and nothing
            opened.
        peak_rss_samples_bytes: Most resident memory of each process.
        quarantined_ns: Samples of a first round that spread too widely and was measured once more.
        spread_limit: p90 / p50 above which that happens.
        environment: The machine.
        memory_limit_bytes: What a run might use; None where nothing limited it.
        memory_verdict: Under that limit: fits, thrashes (pages of the file were dropped and read again) or does not
            fit (killed); the worst of all processes.
        reread_bytes: Bytes of files that were read again, the most of any process.
        clock_caps: For each process, the least share of its highest clock that any core was allowed around it; None
            where the machine shows no clocks.
        hottest_c: For each process, the hottest thermal zone around it, degrees Celsius; None without zones.
        text_sample: What the file writes, the first of a few continuations; None where that was not checked.
        degenerate: Why all it writes is degenerate, which voids the row's speed; None where it is not.
        cpu_samples_ns: Processor time of all threads in each sample; empty where nothing tells.
        throttling: How the processor was slowed down to a device's score; None where it was not.
        waited_samples_ns: How long all threads waited for a core in each sample; empty where nothing tells.
        contention: For each process, what else used the machine's cores; None where that is not known.
        held_samples_ns: How long something kept each sample from running that no other program explains; None where it
            waited for the disk; empty where nothing tells.
        conditions: For each process, what the machine went through meanwhile; None where nobody looked.
        energy: For each process, what meters of energy told of its samples; None where they could not be read, and
            empty where nobody asked for energy.
        engine_settings: How the engine computed.
        measured_on: Whether samples were added until budgets were decided; None where nobody looked at them before.
    """

    kind: str
    target: str
    engine: str
    status: str
    failure: str | None
    session: str
    workload: str
    test: str
    model_filename: str
    model_type: str | None
    model_size: _Size
    model_n_params: _Size
    file_size_bytes: _Size
    file_sha256: str | None
    n_prompt: pydantic.NonNegativeInt
    n_gen: pydantic.NonNegativeInt
    n_depth: pydantic.NonNegativeInt
    n_batch: pydantic.PositiveInt
    n_ubatch: pydantic.PositiveInt
    n_threads: pydantic.PositiveInt
    backends: str | None
    build_commit: str | None
    cpu_info: str | None
    test_time: str | None
    warmup: bool
    samples_per_process: pydantic.PositiveInt
    environment: Environment
    samples_ns: _PositiveInts = ()
    sequence: tuple[int, ...] = ()
    load_samples_ns: _PositiveInts = ()
    page_cache: str = "as_found"
    page_cache_shares: tuple[float | None, ...] = ()
    baseline_rss_bytes: _Size = None
    peak_rss_samples_bytes: _PositiveInts = ()
    quarantined_ns: _PositiveInts = ()
    spread_limit: float | None = None
    memory_limit_bytes: _Size = None
    memory_verdict: str | None = None
    reread_bytes: _Size = None
    clock_caps: tuple[float | None, ...] = ()
    hottest_c: tuple[float | None, ...] = ()
    text_sample: str | None = None
    degenerate: str | None = None
    cpu_samples_ns: _PositiveInts = ()
    throttling: Throttling | None = None
    waited_samples_ns: tuple[pydantic.NonNegativeInt, ...] = ()
    contention: tuple[Contention | None, ...] = ()
    held_samples_ns: tuple[pydantic.NonNegativeInt | None, ...] = ()
    conditions: tuple[Conditions | None, ...] = ()
    regime: str = FRESH
    sustained_s: float | None = None
    anchor_sha256: str | None = None
    is_anchor: bool = False
    energy: tuple[ProcessEnergy | None, ...] = ()
    engine_settings: EngineSettings = dataclasses.field(default_factory=EngineSettings)
    measured_on: MeasuredOn | None = None

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
        """Type of a key-value cache of few bits; None for one of floats."""
        return self.engine_settings.quantized_cache

    @property
    def on_processor(self) -> bool:
        """Whether the processor computed; rows whose engine does not say are taken to be the processor's. The threads
        that wait for another chip neither compute nor want a core, and their times tell nothing of it."""
        return self.backends is None or self.backends in PROCESSOR

    @property
    def fallback(self) -> str | None:
        """What was asked to compute and did not; None where it did, or where nothing was asked for."""
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
