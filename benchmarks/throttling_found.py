"""Is a run that was throttled in its middle found, and one that was not left alone?

    python benchmarks/throttling_found.py [MODEL.gguf] [--rounds 20] [--way quota,stop] [-n 192] [-r 5] [-t 1]

Round by round one row is measured as it is, and one for each way in which a process is kept from running. `quota` gives
its control group half of one core (as root; version 1 or 2), `stop` stops it for half of the time, as cpulimit does.
That begins in the middle of the row's third process, as soon as that has computed for half a second, and ends with the
row. It stands for machines that hide their clocks: a phone's caps are read from its files, which needs no finding.

The table goes to stdout, progress to stderr. Exit status 1: fewer than 19 of 20 throttled rows were found, or more than
1 of 20 others was called throttled.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import psutil

from cfsp.errors import InputError, LimitError
from cfsp.models.builtin import fetch_builtin
from phoneready.console import errors_as_exit_status
from runtime_bench.conditions.script import WATCH
from runtime_bench.environment import describe_environment
from runtime_bench.measuring.measure import run_bench
from runtime_bench.presentation.table import table_of
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.fairness import THROTTLED, VERDICTS, fairness
from runtime_bench.workload import BenchSettings

NOTHING = "nothing"
FOUND_LIMIT, FALSE_LIMIT = 19 / 20, 1 / 20
SHARE = 0.5
"""Of one core that a throttled process gets, or of the time in which it is not stopped."""
PERIOD_S = 0.1
COMPUTED_S = 0.5
"""What the third process has computed when it begins."""
_CPU = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))


def workers() -> list[psutil.Process]:
    """Processes that measure for this one."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any("runtime_bench.worker" in word for word in process.cmdline()):
                found.append(process)
    return found


@contextmanager
def stopping(over: threading.Event) -> Iterator[Callable[[psutil.Process], None]]:
    """Stop a process for a share of each period."""

    def once(process: psutil.Process) -> None:
        process.send_signal(signal.SIGSTOP)
        over.wait(PERIOD_S * (1 - SHARE))
        process.send_signal(signal.SIGCONT)
        time.sleep(PERIOD_S * SHARE)

    yield once


@contextmanager
def limiting(over: threading.Event) -> Iterator[Callable[[psutil.Process], None]]:
    """Put a process into a group that has a share of a core.

    Raises:
        InputError: No such group can be made here.
    """
    group = _group()
    try:

        def once(process: psutil.Process) -> None:
            (group / "cgroup.procs").write_text(str(process.pid))
            over.wait(PERIOD_S)

        yield once
    finally:
        while (group / "cgroup.procs").read_text():
            time.sleep(0.05)
        group.rmdir()


def _group() -> Path:
    files = {"cpu.max": f"{int(SHARE * 1e5)} 100000", "cpu.cfs_quota_us": f"{int(SHARE * 1e5)}"}
    for root in _CPU:
        folder = root / f"phoneready-throttled-{os.getpid()}-{time.monotonic_ns()}"
        with contextlib.suppress(OSError):
            folder.mkdir()
            for name, content in files.items():
                if (folder / name).exists():
                    (folder / name).write_text(content)
                    return folder
            folder.rmdir()
    raise InputError(
        "no control group can be limited here", field="--way", value="quota", allowed="run it as root"
    )


WAYS = MappingProxyType({"quota": limiting, "stop": stopping})


@contextmanager
def throttled(way: str) -> Iterator[None]:
    """From the middle of the third process on, whatever measures is kept from running."""
    over = threading.Event()
    seen: list[int] = []

    def work() -> None:
        with WAYS[way](over) as once:
            while not over.wait(0.02):
                for process in workers():
                    with contextlib.suppress(psutil.Error, OSError):
                        seen.extend([process.pid] if process.pid not in seen else [])
                        late = len(seen) > 3 or sum(process.cpu_times()[:2]) > COMPUTED_S
                        if len(seen) >= 3 and late:
                            once(process)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def measure(path: Path, settings: BenchSettings, way: str) -> BenchRecord:
    """One row.

    Raises:
        InputError: It could not be measured.
    """
    with throttled(way) if way != NOTHING else contextlib.nullcontext():
        (record,) = run_bench([path], settings)
    if not record.ok:
        raise InputError(f"a measurement failed: {record.failure}")
    return record


def looking_cost(seconds: float = 10.0) -> float:
    """Share of a core that looking takes, beside a process that sleeps."""
    with subprocess.Popen([sys.executable, "-c", f"__import__('time').sleep({seconds})"]) as sleeper:
        command = ["sh", "-c", WATCH, "phoneready", str(sleeper.pid)]
        watcher = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        sleeper.wait()
        watcher.terminate()
        _, _, used = os.wait4(watcher.pid, 0)
    return (used.ru_utime + used.ru_stime) / seconds


def report(found: dict[str, list[BenchRecord]]) -> str:
    """The Markdown table and what the machine was like."""
    rows = []
    for way, records in found.items():
        verdicts = Counter(fairness(record).verdict for record in records)
        since = [fairness(record).process for record in records if fairness(record).verdict == THROTTLED]
        third = sum(process in (3, 4) for process in since)
        rows.append(
            {"imposed": way}
            | {verdict: str(verdicts[verdict]) for verdict in VERDICTS}
            | {"from the process it began in, or the next": f"{third} of {len(since)}"}
        )
    machine = describe_environment()
    one = next(iter(found.values()))[0]
    return table_of(rows).markdown() + (
        f"\n{machine.cpu_model}, {machine.cpus_usable} cores, load average {machine.load_average}; {one.test}, "
        f"{one.n_threads} threads, {len(one.samples_ns)} processes a row; "
        f"looking takes {looking_cost():.2%} of a core\n"
    )


def check(found: dict[str, list[BenchRecord]]) -> None:
    """Hold the counts against the limits.

    Raises:
        LimitError: Names what was missed.
    """
    for way, records in found.items():
        count = sum(fairness(record).verdict == THROTTLED for record in records)
        share = count / len(records)
        if share > FALSE_LIMIT if way == NOTHING else share < FOUND_LIMIT:
            raise LimitError(f"{count} of {len(records)} rows were called throttled where it was {way}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments, named as `phoneready bench` names them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a GGUF file (the built-in model's)")
    parser.add_argument("--rounds", type=int, default=20, help="rows of each sort (20)")
    parser.add_argument("--way", default=",".join(WAYS), help=f"of {', '.join(WAYS)} (all)")
    parser.add_argument("-n", "--n-gen", type=int, default=192, help="tokens to generate (192)")
    parser.add_argument("-r", "--repetitions", type=int, default=5, help="processes of a row (5)")
    parser.add_argument("-t", "--threads", type=int, default=1, help="threads (1)")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, judge."""
    ways = arguments.way.split(",")
    if strange := [way for way in ways if way not in WAYS]:
        raise InputError("unknown", field="--way", value=strange[0], allowed=", ".join(WAYS))
    if arguments.repetitions < 4:
        raise InputError(
            "too few to have a middle", field="-r", value=arguments.repetitions, allowed="4 or more"
        )
    model = arguments.model or fetch_builtin("smollm2-135m")
    settings = BenchSettings(
        check_text=False, n_prompt=(), n_gen=(arguments.n_gen,), ttft=(), load=False,
        repetitions=arguments.repetitions, n_threads=(arguments.threads,), spread_limit=1e9,
    )  # fmt: skip
    found: dict[str, list[BenchRecord]] = {way: [] for way in (NOTHING, *ways)}
    for number in range(arguments.rounds):
        for way, records in found.items():
            records.append(measure(model, settings, way))
            print(
                f"round {number + 1} of {arguments.rounds}, {way}: {fairness(records[-1]).text}",
                file=sys.stderr,
            )
    sys.stdout.write(report(found))
    check(found)


def main(argv: Sequence[str] | None = None) -> None:
    """Run, with expected failures as one line and an exit status."""
    with errors_as_exit_status():
        run(parse(argv))


if __name__ == "__main__":
    main()
