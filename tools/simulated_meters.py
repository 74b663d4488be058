"""Meters of energy that are not there, for tests and benchmarks: a program writes what a machine's files would show.

    python tools/simulated_meters.py SPEC.json

The power is a curve of the time since the machine was started, so that whoever knows the curve knows what was used in
any span of it. Each file is replaced whole, as those of sysfs are read whole. It prints `ready` when all files are
there, and goes on until it is ended.
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Curve", "SimulatedFile", "simulated"]

_TICK_S = 0.01


@dataclass(frozen=True)
class Curve:
    """Power over time, watts: mean * (1 + swing * sin(2 pi t / period)).

    Attributes:
        mean_w: Over a period.
        swing: Share of the mean that it rises and falls by.
        period_s: Of the sine.
    """

    mean_w: float
    swing: float = 0.3
    period_s: float = 2.9

    def watts(self, at_s: float) -> float:
        """At a time since the machine was started."""
        return self.mean_w * (1 + self.swing * math.sin(2 * math.pi * at_s / self.period_s))

    def joules(self, begin_s: float, end_s: float) -> float:
        """From one time to another."""
        turn = self.period_s / (2 * math.pi)
        waves = turn * (math.cos(begin_s / turn) - math.cos(end_s / turn))
        return self.mean_w * (end_s - begin_s + self.swing * waves)


@dataclass(frozen=True)
class SimulatedFile:
    """One file.

    Attributes:
        path: The file.
        shows: `joules` so far, joules that are `left`, `watts`, or a `text`.
        text: That text, for as long as nothing changes it.
        unit: Joules or watts of one.
        begins_at: What it showed when it began to count.
        wraps_at: Where it begins at 0 again; None goes on.
        step: It shows multiples of that alone.
        every_s: A number is written anew so often, and a text when it changes.
        after_s: Something changes so long after the beginning; None for never.
        by: What is added from then on.
        becomes: The text from then on.
    """

    path: str
    shows: str = "text"
    text: str = ""
    unit: float = 1e-6
    begins_at: int = 0
    wraps_at: int | None = None
    step: int = 1
    every_s: float = 0.04
    after_s: float | None = None
    by: int = 0
    becomes: str = ""

    def content(self, curve: Curve, began_s: float, now_s: float) -> str:
        """What it shows at a time."""
        changed = self.after_s is not None and now_s - began_s >= self.after_s
        if self.shows == "text":
            return self.becomes if changed else self.text
        amount = curve.watts(now_s) if self.shows == "watts" else curve.joules(began_s, now_s)
        value = self.begins_at + (-1 if self.shows == "left" else 1) * amount / self.unit
        whole = math.floor((value + (self.by if changed else 0)) / self.step) * self.step
        return str(whole if self.wraps_at is None else whole % self.wraps_at)


def now() -> float:
    """Seconds since the machine was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@contextmanager
def simulated(files: Sequence[SimulatedFile], curve: Curve, spec: Path) -> Iterator[None]:
    """Files that a process keeps up to date meanwhile; `spec` is where they are described to it."""
    spec.parent.mkdir(parents=True, exist_ok=True)
    spec.write_text(json.dumps({"curve": asdict(curve), "files": [asdict(file) for file in files]}))
    command = [sys.executable, __file__, str(spec)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError("the simulated meters did not begin")
            yield
        finally:
            process.kill()


def _write(file: SimulatedFile, content: str) -> None:
    path = Path(file.path)
    part = path.with_name(f".{path.name}")
    part.write_text(f"{content}\n")
    part.replace(path)


def _next(file: SimulatedFile, began_s: float) -> float:
    """When a file is to be written again."""
    if file.shows != "text":
        return now() + file.every_s
    change_s = began_s + (file.after_s or 0.0)
    return change_s if now() < change_s else math.inf


def main(spec: Path) -> None:
    """Keep the files of a description up to date until somebody ends this process."""
    described = json.loads(spec.read_text())
    curve, files = Curve(**described["curve"]), [SimulatedFile(**one) for one in described["files"]]
    began, due = now(), dict.fromkeys(files, 0.0)
    for file in files:
        Path(file.path).parent.mkdir(parents=True, exist_ok=True)
    told = False
    while True:
        for file in (file for file in files if now() >= due[file]):
            _write(file, file.content(curve, began, now()))
            due[file] = _next(file, began)
        if not told:
            print("ready", flush=True)
            told = True
        time.sleep(_TICK_S)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(Path(sys.argv[1]))
