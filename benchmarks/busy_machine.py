"""What a command takes while other processes want the cores, with OpenMP's threads that sleep and with those that look.

    python benchmarks/busy_machine.py [--busy CORES] [--rounds 1] [-- prune smollm2-135m -o OUT --force ...]

`phoneready` sets OMP_WAIT_POLICY=passive unless the environment says something, so it is told `passive` and `active`,
in turns. The command is given behind `--`; unless it is, a model is pruned into a temporary folder.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from taken import run_phoneready

from runtime_bench.workload import default_threads

POLICIES = ("passive", "active")
BUSY = "while True: pass"


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--busy", type=int, default=default_threads(), help="processes that never rest")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("command", nargs="*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, others(arguments.busy):
        command = arguments.command or [
            *("prune", "smollm2-135m", "-o", f"{folder}/pruned", "--force", "--prune-ratio", "0.2"),
            *("--calibration", "builtin:python-docs", "--nsamples", "8", "--seqlen", "256"),
        ]
        for _ in range(arguments.rounds):
            for policy in POLICIES:
                took = run_phoneready("the command", command, OMP_WAIT_POLICY=policy)
                print(
                    f"{policy}: {took.seconds:.0f} s, {took.cpu_seconds:.0f} s of processor time", flush=True
                )


@contextmanager
def others(count: int) -> Iterator[None]:
    """Processes that want a core each."""
    with ExitStack() as running:
        for _ in range(count):
            process = running.enter_context(subprocess.Popen([sys.executable, "-c", BUSY]))
            running.callback(process.kill)
        yield


if __name__ == "__main__":
    main()
