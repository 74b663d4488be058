"""Does a comparison's verdict hold? The same file twice, and one that is slower by a known amount, many times over.

    python benchmarks/null_comparison.py [MODEL.gguf] [-n 20] [-r 10] [-t 1] [--comparisons 20] [--slower 0.15]
        [--busy N]

Three copies of one file are measured in turns, as `phoneready bench` does. Two are measured alike: any difference
between them is the machine's. The third gets exactly that share more tokens to generate (23 for 20) and is recorded as
if it had got as many: it is slower by 15 % whatever the machine does, which no second model file could promise.
After each session both are compared as `phoneready compare` does. With --record a run that was stopped goes on. With
--busy, N processes of pure load run beside it; they come and go, beside four of every eight processes.

The table goes to stdout, progress to stderr. Exit status 1: more than one of twenty null comparisons found a
difference, or fewer than sixteen of twenty found the slower one. On a busy machine "too noisy to tell" is a right
answer to both, and calling the slower one faster a wrong one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cfsp.errors import InputError, LimitError
from cfsp.models.builtin import fetch_builtin
from phoneready.console import errors_as_exit_status
from runtime_bench.environment import describe_environment
from runtime_bench.measuring.measure import run_bench
from runtime_bench.presentation.table import table_of
from runtime_bench.records import summary
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.compare import DEFAULTS, VERDICTS, Comparison, ComparisonSettings, compare_records
from runtime_bench.records.jsonl import append_jsonl, read_jsonl
from runtime_bench.targets import Local
from runtime_bench.worker import WorkerRequest, WorkerResult
from runtime_bench.workload import BenchSettings

BASE, SAME, SLOW = "base.gguf", "same.gguf", "slow.gguf"
NULL_LIMIT = 1 / 20
"""Most of the null comparisons that may find a difference."""
FOUND_LIMIT = 16 / 20
"""Least of the slower ones that must be found."""


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Processes that do nothing but use a core each."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


class Slowing(Local):
    """This machine, where one file gets more to do than its record says, beside neighbours that come and go."""

    def __init__(self, extra_tokens: int, busy: int) -> None:
        self.extra_tokens, self.busy = extra_tokens, busy
        self.runs = 0

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        """See `Target`. Neighbours come and go within rounds of three files: four runs with them, four without."""
        self.runs += 1
        with neighbours(self.busy if self.runs // 4 % 2 else 0):
            return self._run(request, timeout_s)

    def _run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        if Path(request.path).name == SLOW:
            longer = replace(request.workload, n_gen=request.workload.n_gen + self.extra_tokens)
            request = replace(request, workload=longer)
        return super().run(request, timeout_s)


def session(folder: Path, settings: BenchSettings, target: Slowing) -> list[BenchRecord]:
    """Base, the same again, and the slower one, in turns."""
    files = [folder / name for name in (BASE, SAME, SLOW)]
    records = run_bench(files, settings, target=target)
    failed = [record.failure for record in records if not record.ok]
    if failed:
        raise InputError(f"a measurement failed: {failed[0]}")
    return records


def recorded(path: Path | None, settings: BenchSettings) -> list[list[BenchRecord]]:
    """The whole sessions of an earlier run.

    Raises:
        InputError: They were measured otherwise.
    """
    sessions: dict[str, list[BenchRecord]] = {}
    for record in read_jsonl(path) if path and path.exists() else []:
        sessions.setdefault(record.session, []).append(record)
    whole = [records for records in sessions.values() if len(records) == 3]
    wanted = (settings.n_gen, settings.n_threads, settings.repetitions, settings.samples_per_process)
    for record in (record for records in whole for record in records):
        was = ((record.n_gen,), (record.n_threads,), len(record.samples_ns), record.samples_per_process)
        if was != wanted:
            raise InputError(f"{path} was measured otherwise", value=was, allowed=str(wanted))
    return whole


def verdict_rows(
    sessions: list[list[BenchRecord]], threshold: float, slower: float
) -> dict[str, list[Comparison]]:
    """What is compared -> a comparison of each session."""
    found: dict[str, list[Comparison]] = {"the same file": [], f"{slower:.0%} slower": []}
    for base, *others in sessions:
        for rows, other in zip(found.values(), others, strict=True):
            compared = compare_records(base, other, ComparisonSettings(threshold=threshold))
            if not isinstance(compared, Comparison):
                raise InputError(f"{base.test}: {compared.reason}")
            rows.append(compared)
    return found


def report(found: dict[str, list[Comparison]], sessions: list[list[BenchRecord]]) -> str:
    """The Markdown table and what the machine was like."""
    rows = []
    for name, comparisons in found.items():
        counts = Counter(c.verdict for c in comparisons)
        ratios = [c.ratio for c in comparisons if c.ratio is not None]
        widths = [c.high / c.low for c in comparisons if c.high is not None and c.low is not None]
        rows.append(
            {"compared": name}
            | {verdict: str(counts[verdict]) for verdict in VERDICTS}
            | {
                "median ratio": f"{summary.median(ratios):.3f}" if ratios else "-",
                "ratios": f"{min(ratios):.3f} to {max(ratios):.3f}" if ratios else "-",
                "interval high/low": f"{summary.median(widths):.2f}" if widths else "-",
            }
        )
    bases = [base for base, *_ in sessions]
    spreads = [base.spread for base in bases if base.spread]
    loads = [base.environment.load_average for base in bases if base.environment.load_average is not None]
    again = sum(bool(record.quarantined_ns) for records in sessions for record in records)
    machine = describe_environment()
    return table_of(rows).markdown() + (
        f"\n{machine.cpu_model}, {machine.cpus_usable} cores, load average {min(loads):.1f} to {max(loads):.1f}; "
        f"{bases[0].test}, {bases[0].n_threads} threads, {len(set(bases[0].rounds))} processes of "
        f"{bases[0].samples_per_process} samples a side; p90/p50 of the base "
        f"{min(spreads):.2f} to {max(spreads):.2f}; {again} of {3 * len(sessions)} rows measured once more\n"
    )


def check(found: dict[str, list[Comparison]], busy: bool) -> None:
    """Hold the counts against the limits.

    Args:
        found: What was compared, with the comparisons.
        busy: Whether there were neighbours: then nothing has to be found.

    Raises:
        LimitError: Names what was missed.
    """
    null, slow = found.values()
    wrong = sum(c.verdict in ("faster", "slower") for c in null)
    caught, turned = (sum(c.verdict == verdict for c in slow) for verdict in ("slower", "faster"))
    if max(wrong, turned) > NULL_LIMIT * len(null) or (caught < FOUND_LIMIT * len(slow) and not busy):
        raise LimitError(
            f"{wrong} of {len(null)} found a difference in one file, {caught} of {len(slow)} the slower one, "
            f"which {turned} called faster"
        )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments, named as `phoneready bench` names them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a GGUF file (the built-in model's)")
    parser.add_argument("-n", "--n-gen", type=int, default=20, help="tokens to generate (20)")
    parser.add_argument("-r", "--repetitions", type=int, default=10, help="rounds of a session (10)")
    parser.add_argument("-t", "--threads", type=int, default=1, help="threads (1)")
    parser.add_argument("--samples-per-process", type=int, default=1, help="samples of a process (1)")
    parser.add_argument("--comparisons", type=int, default=20, help="sessions (20)")
    parser.add_argument(
        "--slower", type=float, default=0.15, help="share of tokens that the slow file gets more"
    )
    parser.add_argument(
        "--threshold", type=float, default=DEFAULTS.threshold, help="as of `phoneready compare`"
    )
    parser.add_argument("--busy", type=int, default=0, help="processes of pure load beside it (0)")
    parser.add_argument(
        "--record", type=Path, help="append each session's records, and begin with those there"
    )
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, judge."""
    model = arguments.model or fetch_builtin("smollm2-135m")
    extra = arguments.n_gen * arguments.slower
    if extra < 1 or abs(extra - round(extra)) > 1e-6:
        raise InputError("is no whole number of tokens", field="--n-gen times --slower", value=extra)
    settings = BenchSettings(
        n_prompt=(),
        n_gen=(arguments.n_gen,),
        ttft=(),
        load=False,
        repetitions=arguments.repetitions,
        n_threads=(arguments.threads,),
        samples_per_process=arguments.samples_per_process,
    )
    target = Slowing(round(extra), arguments.busy)
    sessions = recorded(arguments.record, settings)[: arguments.comparisons]
    with tempfile.TemporaryDirectory() as name:
        for copy in (BASE, SAME, SLOW):
            Path(name, copy).symlink_to(model.resolve())
        while len(sessions) < arguments.comparisons:
            sessions.append(session(Path(name), settings, target))
            if arguments.record:
                append_jsonl(arguments.record, sessions[-1])
            print(f"session {len(sessions)} of {arguments.comparisons}", file=sys.stderr, flush=True)
    found = verdict_rows(sessions, arguments.threshold, arguments.slower)
    sys.stdout.write(report(found, sessions))
    check(found, busy=arguments.busy > 0)


def main(argv: list[str] | None = None) -> None:
    """Run, with expected failures as one line and an exit status."""
    with errors_as_exit_status():
        run(parse(argv))


if __name__ == "__main__":
    main()
