"""Hold the native runner against the Python worker on this machine, on the same file, alternately.

    python benchmarks/native_runner.py MODEL.gguf [-p 128] [-n 32] [-t 1] [-r 10] [--build native]

Each round takes one sample of each workload in the Python worker and one in the runner, each in a process of its own
with its own warm-up, so that slow drift of the machine meets both alike. The table goes to stdout. Exit status 1: an
interval of the ratio lies wholly outside the tolerance.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cfsp.errors import InputError, LimitError
from phoneready.console import errors_as_exit_status
from runtime_bench.environment import describe_environment
from runtime_bench.measuring.measure import run_bench
from runtime_bench.native.build import build_runner
from runtime_bench.records import summary
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.targets import LOCAL, Target
from runtime_bench.targets.local import Native
from runtime_bench.workload import BenchSettings

Samples = dict[tuple[str, str], list[BenchRecord]]
MIB = 2**20


def alternate(model: Path, settings: BenchSettings, targets: dict[str, Target], rounds: int) -> Samples:
    """Records of every round, by test and target."""
    found: Samples = {}
    for number in range(rounds):
        for name, target in targets.items():
            for record in run_bench([model], settings, target=target):
                if not record.ok:
                    raise InputError(f"{record.test} in {name} failed: {record.failure}")
                found.setdefault((record.test, name), []).append(record)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return found


def report(found: Samples, build: str, tolerance: float) -> bool:
    """Print the table; whether every interval touches the tolerance."""
    machine = describe_environment()
    print(f"{machine.cpu_model}, load average {machine.load_average}\n")
    print("| test | Python, ms | runner, ms | speed of runner / Python | 95% interval | peak RSS, MiB |")
    print("|------|-----------:|-----------:|-------------------------:|-------------:|--------------:|")
    agree = True
    for test in dict.fromkeys(test for test, _ in found):
        sides = [found[test, name] for name in ("python", build)]
        left, right = ([ns for record in side for ns in record.samples_ns] for side in sides)
        # Speeds are inverse to times.
        ratio = summary.ratio_interval(left, right, paired=True)
        agree &= ratio.low <= 1 + tolerance and ratio.high >= 1 / (1 + tolerance)
        medians = " | ".join(f"{(summary.median(side) or 0) / 1e6:.1f}" for side in (left, right))
        memory = " and ".join(f"{max(r.peak_rss_bytes or 0 for r in side) / MIB:.0f}" for side in sides)
        interval = f"{ratio.low:.3f} to {ratio.high:.3f}"
        print(f"| {test} | {medians} | {ratio.ratio:.3f} | {interval} | {memory} |")
    return agree


def main(argv: list[str] | None = None) -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("-p", "--n-prompt", type=int, default=128, help="prompt size (128)")
    parser.add_argument("-n", "--n-gen", type=int, default=32, help="generation size (32)")
    parser.add_argument("-t", "--threads", type=int, default=1, help="threads (1)")
    parser.add_argument("-r", "--rounds", type=int, default=10, help="rounds (10)")
    parser.add_argument("--build", default="native", help="of `phoneready devices build-runner` (native)")
    parser.add_argument("--tolerance", type=float, default=0.05, help="see exit status (default 0.05)")
    arguments = parser.parse_args(argv)
    settings = BenchSettings(
        n_prompt=(arguments.n_prompt,),
        n_gen=(arguments.n_gen,),
        ttft=(arguments.n_prompt,),
        repetitions=1,
        n_threads=(arguments.threads,),
        check_text=False,
    )
    with errors_as_exit_status():
        targets: dict[str, Target] = {"python": LOCAL, arguments.build: Native(build_runner(arguments.build))}
        found = alternate(arguments.model, settings, targets, arguments.rounds)
        if not report(found, arguments.build, arguments.tolerance):
            raise LimitError(f"the two differ by more than {arguments.tolerance:.0%}")


if __name__ == "__main__":
    main()
