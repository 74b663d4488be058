"""Kill commands while they read a model block by block, and see that the same command then makes the same bytes.

Each command runs once undisturbed. Then it is killed (SIGKILL) at moments that are spread evenly over the time from
when it claims its output to its end, and after a few kills it is let finish. It fails where

    a part of an output is in its place, or an output has other bytes than the undisturbed run's,
    what a killed run left beside the output is there when the next one is killed, or
    anything is left, there or in the folder for large temporary files, by a run that was let finish.

    python benchmarks/kill_streamed.py [--kills 25] [--each 5] [--only prune] [--folder DIR]
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kill_release import Run, begun, tiny_model, tree

_TEXT = ("builtin:python-docs", "--set", "nsamples=4", "--set", "seqlen=64")
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "prune": ("prune", "--calibration", *_TEXT),
    "gguf": ("quantize", "--to", "Q4_0", "--calibration", *_TEXT),
    "onnx": ("quantize", "--to", "int4", "--calibration", *_TEXT),
}
"""Name -> a command without its model and its output."""


@dataclass
class Place:
    """Where one command's runs are.

    Attributes:
        model: Its model.
        folder: Of everything that it writes.
    """

    model: Path
    folder: Path

    @property
    def output(self) -> Path:
        """What it makes."""
        return self.folder / "out" / "made"

    @property
    def scratch(self) -> Path:
        """Its folder for large temporary files."""
        return self.folder / "scratch"

    def start(self, command: Sequence[str]) -> Run:
        """Start it."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        environment = {"PHONEREADY_STREAM": "always", "TMPDIR": str(self.scratch)}
        environment |= {"PHONEREADY_CACHE": str(self.folder / "cache")}
        name, *options = command
        line = [name, str(self.model), "-o", str(self.output), "--threads", "1", *options]
        return begun(line, environment)

    def beside(self) -> set[Path]:
        """What is not finished beside the output."""
        return set(self.output.parent.glob(".*.tmp-*"))

    def left(self) -> list[str]:
        """All that lies beside the output, and what is ours in the folder for temporary files."""
        there = [path for path in self.output.parent.glob("*") if path != self.output]
        return sorted(
            str(path.relative_to(self.folder)) for path in (*there, *self.scratch.glob("*phoneready-*"))
        )


@dataclass
class Outcome:
    """What the kills did.

    Attributes:
        kills: How many.
        finished: Runs that were let finish.
        problems: What went wrong; empty is good.
    """

    kills: int = 0
    finished: int = 0
    problems: list[str] = field(default_factory=list)


def claimed(run: Run, place: Place) -> bool:
    """Wait until a run has claimed its output; False where it ends before."""
    lock = place.output.with_name(f".{place.output.name}.lock")
    while not lock.exists():
        if run.process.poll() is not None:
            return False
        time.sleep(0.005)
    return True


def whole(run: Run, place: Place, outcome: Outcome) -> dict[str, bytes | None]:
    """Let a run finish, and see that it leaves its output alone; what is in that."""
    outcome.problems += run.failure()
    outcome.problems += [f"left: {name}" for name in place.left()]
    return tree(place.output)


def kill_and_repeat(name: str, model: Path, folder: Path, kills: int, each: int = 5) -> Outcome:
    """The experiment with one command.

    Args:
        name: Of the command.
        model: A folder of weights in one dtype.
        folder: Scratch.
        kills: How often.
        each: After so many kills a run is let finish.
    """
    outcome, command = Outcome(), COMMANDS[name]
    place = Place(model, folder / name)
    undisturbed = place.start(command)
    claimed(undisturbed, place)
    began = time.monotonic()
    expected = whole(undisturbed, place, outcome)
    took = time.monotonic() - began
    for number in range(kills):
        kill_once(place, command, took * (number + 0.5) / kills, expected, outcome)
        if outcome.kills % each == 0 or outcome.kills == kills:
            remove(place.output)
            if whole(place.start(command), place, outcome) != expected:
                outcome.problems.append(f"after kill {number} other bytes were made")
            outcome.finished += 1
        if outcome.problems:
            break
    return outcome


def kill_once(
    place: Place, command: Sequence[str], after_s: float, expected: dict[str, bytes | None], outcome: Outcome
) -> None:
    """Start a run, kill it some seconds after it has claimed its output, and look at what there is then."""
    remove(place.output)
    before = place.beside()
    run = place.start(command)
    if not claimed(run, place):
        outcome.problems += run.failure()
        return
    time.sleep(after_s)
    outcome.problems += [f"left running: {process.pid}" for process in run.kill()]
    outcome.kills += 1
    outcome.problems += [f"not cleared: {path.name}" for path in place.beside() & before]
    if place.output.exists() and tree(place.output) != expected:
        outcome.problems.append(f"killed after {after_s:.2f} s: a part of the output is in its place")


def remove(output: Path) -> None:
    """Delete what a run made."""
    shutil.rmtree(output, ignore_errors=True)


def main() -> int:
    """Run it and say what came out; 1 where anything was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=25, help="of each command")
    parser.add_argument("--each", type=int, default=5)
    parser.add_argument("--only", choices=COMMANDS, action="append")
    parser.add_argument("--folder", type=Path, help="scratch; a temporary folder by default")
    arguments = parser.parse_args()
    problems = 0
    with tempfile.TemporaryDirectory(prefix="kill-streamed-") as scratch:
        folder = arguments.folder or Path(scratch)
        tiny_model(folder / "tiny-model", "bfloat16", added=0.02)
        for name in arguments.only or COMMANDS:
            outcome = kill_and_repeat(name, folder / "tiny-model", folder, arguments.kills, arguments.each)
            print(f"{name}: {outcome.kills} kills, {outcome.finished} runs finished after them", flush=True)
            print("\n".join(outcome.problems) or "  nothing was left over or different", flush=True)
            problems += len(outcome.problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
