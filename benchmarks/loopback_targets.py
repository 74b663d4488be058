"""What does the way to another machine cost? The native runner here, over ssh and over adb, all on this machine.

    python benchmarks/loopback_targets.py MODEL.gguf [-p 128] [-n 32] [-t 1] [-r 20]

The same program measures the same file three times a round: started here, behind an sshd, behind an adbd. All three
run the one copy that was pushed, as the pages of two copies lie unlike in memory and make a difference by themselves.
Rounds follow each other, so that slow drift of the machine meets all alike. sshd and adbd are started for this on
loopback, with keys of their own, and end with it (Debian's packages openssh-server, adb and adbd; adbd needs root).
The table goes to stdout, progress to stderr. Exit status 1: an interval lies wholly outside the tolerance.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

from cfsp.errors import InputError, LimitError
from cfsp.files import sha256_file
from phoneready.console import errors_as_exit_status
from runtime_bench.engines import SessionSettings
from runtime_bench.environment import describe_environment
from runtime_bench.native.build import build_runner, read_build
from runtime_bench.process import measure_in
from runtime_bench.records import summary
from runtime_bench.targets.remote import Remote
from runtime_bench.targets.remote_shell import Adb, Ssh
from runtime_bench.worker import WorkerRequest, WorkerResult
from runtime_bench.workload import Workload

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 600.0
HERE = "here"
Samples = dict[tuple[str, str], list[int]]
"""Workload's name and place -> wall times in nanoseconds, one a round."""


class Here:
    """The runner, started by this process, in a session of its own as those that sshd and adbd start: a busy Linux
    shares the processor out among sessions first (sched_autogroup), and this one's share may be another."""

    name = HERE

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        """Measure once, with what was pushed to the folder."""
        program, model = (str(next(self._folder.glob(f"*/{name}"))) for name in ("runner", "model.gguf"))
        return measure_in(["setsid", program], asdict(replace(request, path=model)), timeout_s)


def daemons() -> ModuleType:
    """tools/loopback_daemons.py, which is in no package."""
    path = ROOT / "tools" / "loopback_daemons.py"
    spec = importlib.util.spec_from_file_location("loopback_daemons", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_places(stack: ExitStack, program: Path) -> list[Here | Remote]:
    """The three ways to the same machine.

    Raises:
        InputError: A daemon cannot be had here.
    """
    tools = daemons()
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="phoneready-far-"))
    try:
        board = stack.enter_context(tools.ssh_server())
        phones = stack.enter_context(tools.adb_devices())
        serial = phones.start()
    except tools.NotPossible as error:
        raise InputError(str(error)) from error
    os.environ.update(phones.environment)
    return [
        Remote(Ssh("board", board.config), runner=program, folder=folder),
        Remote(Adb(serial), runner=program, folder=folder),
        Here(Path(folder)),
    ]


def measure(
    places: list[Here | Remote], model: Path, workloads: list[Workload], threads: int, rounds: int
) -> Samples:
    """All rounds; the order of the places turns with every round.

    Raises:
        InputError: A run failed.
    """
    found: Samples = {}
    for number in range(rounds):
        turn = number % len(places)
        for workload in workloads:
            session = SessionSettings(workload.n_ctx, threads, 2048, 512)
            request = WorkerRequest(str(model), "llama.cpp", workload, session)
            for place in places[turn:] + places[:turn]:
                result = place.run(request, TIMEOUT_S)
                if result.error:
                    raise InputError(f"{place.name}, {workload.test}: {result.error}")
                found.setdefault((workload.test, place.name), []).extend(result.samples_ns)
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return found


def report(samples: Samples, tolerance: float) -> tuple[str, bool]:
    """The Markdown table, and whether every interval touches the tolerance."""
    lines = [
        "| test | target | median ms | speed there / here | 95% interval |",
        "|------|--------|----------:|-------------------:|-------------:|",
    ]
    agree = True
    for (test, place), times in sorted(samples.items(), key=lambda row: (row[0][0], row[0][1] != HERE)):
        here = samples[test, HERE]
        median = f"{(summary.median(times) or 0) / 1e6:.1f}"
        if place == HERE:
            lines.append(f"| {test} | {place} | {median} | 1 | |")
            continue
        # Speeds are inverse to times.
        ratio = summary.ratio_interval(here, times, paired=True)
        agree &= ratio.low <= 1 + tolerance and ratio.high >= 1 / (1 + tolerance)
        interval = f"{ratio.low:.3f} to {ratio.high:.3f}"
        lines.append(f"| {test} | {place.partition(':')[0]} | {median} | {ratio.ratio:.3f} | {interval} |")
    return "\n".join(lines) + "\n", agree


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments, named as llama-bench names them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("-p", "--n-prompt", type=int, default=128, help="prompt size (128), 0 for none")
    parser.add_argument("-n", "--n-gen", type=int, default=32, help="generated tokens (32), 0 for none")
    parser.add_argument("-t", "--threads", type=int, default=1, help="threads (1)")
    parser.add_argument("-r", "--rounds", type=int, default=20, help="rounds (20)")
    parser.add_argument("--tolerance", type=float, default=0.05, help="see exit status (default 0.05)")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Measure and print.

    Raises:
        PhonereadyError: Nothing to measure, a run that failed, or an interval outside the tolerance.
    """
    sizes = ("pp", arguments.n_prompt, 0), ("tg", 0, arguments.n_gen)
    workloads = [Workload(kind, prompt, gen) for kind, prompt, gen in sizes if prompt or gen]
    if not workloads or arguments.rounds < 1 or not arguments.model.is_file():
        raise InputError("nothing to measure", allowed="a file, a size and one round or more")
    program = build_runner("native")
    model = arguments.model.resolve()
    with ExitStack() as stack:
        places = open_places(stack, program)
        samples = measure(places, model, workloads, arguments.threads, arguments.rounds)
    machine = describe_environment()
    sys.stdout.write(
        f"{model.name}, {model.stat().st_size / 2**20:.1f} MiB, sha256 {sha256_file(model)[:16]}\n"
        f"{machine.cpu_model}, {machine.cpus_usable} cores, load average {machine.load_average:.1f}; "
        f"runner {read_build(program).target}, {arguments.threads} thread(s), {arguments.rounds} rounds in turns\n\n"
    )
    text, agree = report(samples, arguments.tolerance)
    sys.stdout.write(text)
    if not agree:
        raise LimitError(f"a target differs from here by more than {arguments.tolerance:.0%}")


def main(argv: list[str] | None = None) -> None:
    """One line and a status instead of a traceback, for what is expected to go wrong."""
    with errors_as_exit_status():
        run(parse(argv))


if __name__ == "__main__":
    main()
