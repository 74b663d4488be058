"""How far are metered joules from the truth, how far do they say they may be, and what does metering cost?

    python benchmarks/metered_energy.py [--seconds 90] [--windows 40]

A process writes files as meters show them, of a power that is known at every moment: a counter as RAPL's, one that is
brought up to date each second, one in steps of 10 J, a sensor of power, a battery's voltage and current, its charge in
steps of 1 mAh. The watcher that looks beside a benchmark reads them. Then windows of 1, 3, 10 and 30 s are laid
anywhere into the time that it watched, each as if a sample had been timed then.

The table goes to stdout, progress to stderr. Exit status 1: of the windows that are not refused, in fewer than 99 of
100 the truth lies where it should.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from simulated_meters import Curve, SimulatedFile, now, simulated

from cfsp.errors import LimitError
from phoneready.console import errors_as_exit_status
from runtime_bench.conditions.looks import conditions_of
from runtime_bench.conditions.meters.energy import energy_of
from runtime_bench.conditions.script import WATCH
from runtime_bench.presentation.table import table_of
from runtime_bench.records.energy import Joules
from runtime_bench.records.energy_account import ERROR_LIMIT

CURVE = Curve(mean_w=6.0, swing=0.5, period_s=7.3)
LENGTHS_S = (1.0, 3.0, 10.0, 30.0)
RIGHT_LIMIT = 0.99
PLAIN = "plain"
EDGE_S = 2.0
"""What is watched before the first window and after the last one."""
_RAPL, _BATTERY = "sys/class/powercap/intel-rapl:0", "sys/class/power_supply/battery"
_COUNTER = {"energy_uj": {"shows": "joules"}, "name": {"text": "package-0"}}
_PHONE = {"type": {"text": "Battery"}, "status": {"text": "Discharging"}, "voltage_now": {"text": "4000000"}}
METERS: Mapping[str, tuple[str, Mapping[str, Mapping[str, object]]]] = {
    "counter, as RAPL's": (_RAPL, _COUNTER),
    "counter, brought up to date each second": (
        _RAPL,
        _COUNTER | {"energy_uj": {"shows": "joules", "every_s": 1.0}},
    ),
    "counter in steps of 10 J": (_RAPL, _COUNTER | {"energy_uj": {"shows": "joules", "step": 10_000_000}}),
    "sensor of power": (
        "sys/class/hwmon/hwmon0",
        {"name": {"text": "ina226"}, "power1_input": {"shows": "watts", "step": 25_000}},
    ),
    "battery, voltage x current each second": (
        _BATTERY,
        _PHONE | {"current_now": {"shows": "watts", "unit": -4e-6, "every_s": 1.0}},
    ),
    "battery, charge in steps of 1 mAh": (
        _BATTERY,
        _PHONE
        | {"charge_counter": {"shows": "left", "unit": 4 * 3.6e-3, "begins_at": 3_000_000, "step": 1000}},
    ),
}
"""What is metered how -> its folder, and the files in it."""


@dataclass(frozen=True)
class Window:
    """One window: what was used in it, and what the meter says."""

    seconds: float
    truth: float
    told: Joules

    @property
    def stated(self) -> float:
        """The error that is stated, a share of the guess."""
        return self.told.error / self.told.value if self.told.value else 1.0

    @property
    def accepted(self) -> bool:
        """Whether a row would have it."""
        return self.stated <= ERROR_LIMIT

    @property
    def right(self) -> bool:
        """Whether the truth lies where it should."""
        return self.told.low <= self.truth <= self.told.high


def files_of(base: Path) -> list[SimulatedFile]:
    """The files of all meters, of each below a folder of its number."""
    return [
        SimulatedFile(f"{base}/{number}/{folder}/{name}", **described)  # type: ignore[arg-type]
        for number, (folder, files) in enumerate(METERS.values())
        for name, described in files.items()
    ]


def watched(base: Path, seconds: float) -> tuple[list[str], list[float], float]:
    """What the watchers of all meters wrote, the processor time of each, and that of one that meters nothing."""
    names = [*map(str, range(len(METERS))), PLAIN]
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        shells = [watcher(base, name, process.pid) for name in names]
        time.sleep(seconds)
        process.communicate(b"\n")
    spent = []
    for shell in shells:
        shell.terminate()
        used = os.wait4(shell.pid, 0)[2]
        spent.append(used.ru_utime + used.ru_stime)
    return [(base / f"{name}.txt").read_text() for name in names[:-1]], spent[:-1], spent[-1]


def watcher(base: Path, name: str, pid: int) -> subprocess.Popen[bytes]:
    """One that looks at the meters below a folder, or at none."""
    script = WATCH.replace("\nbase=  #", f"\nbase={base / name}  #", 1)
    metered = [] if name == PLAIN else ["metered"]
    with (base / f"{name}.txt").open("wb") as stream:
        return subprocess.Popen(["sh", "-c", script, "-", str(pid), *metered], stdout=stream)


def windows_in(text: str, begin: float, end: float, count: int) -> list[Window]:
    """As many windows of each length, anywhere; those that say nothing at all are left out."""
    draw, found = random.Random(0), []
    for seconds in LENGTHS_S:
        for _ in range(count):
            first = draw.uniform(begin + EDGE_S, max(begin + EDGE_S, end - EDGE_S - seconds))
            span = (first, first + seconds)
            spans = [(int(span[0] * 1e9), int(span[1] * 1e9))]
            (meter,) = energy_of(text, spans, conditions_of(text, spans)).meters
            if meter.joules is not None:
                found.append(Window(seconds, CURVE.joules(*span), meter.joules))
    return found


def row_of(name: str, windows: Sequence[Window], seconds: float) -> dict[str, str]:
    """The row of one meter and one length."""
    some = [one for one in windows if one.seconds == seconds]
    if not some:
        return {"meter": name, "window": f"{seconds:g} s"}
    off = [abs(one.told.value / one.truth - 1) for one in some]
    return {
        "meter": name,
        "window": f"{seconds:g} s",
        "off, median": f"{statistics.median(off):.1%}",
        "off, most": f"{max(off):.1%}",
        "stated, median": f"{statistics.median(one.stated for one in some):.0%}",
        "not refused": f"{sum(one.accepted for one in some)} of {len(some)}",
        "truth inside": f"{sum(one.right for one in some)} of {len(some)}",
    }


def main() -> None:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--windows", type=int, default=40)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="phoneready-meters-") as folder:
        base = Path(folder)
        with simulated(files_of(base), CURVE, base / "spec.json"):
            print(f"watching for {arguments.seconds:g} s", file=sys.stderr)
            begin = now()
            texts, spent, plain = watched(base, arguments.seconds)
            end = now()
    found = {
        name: windows_in(text, begin, end, arguments.windows)
        for name, text in zip(METERS, texts, strict=True)
    }
    rows = [row_of(name, windows, seconds) for name, windows in found.items() for seconds in LENGTHS_S]
    print(table_of(rows).markdown())
    cost = statistics.fmean(spent) / arguments.seconds
    print(f"One watcher took {cost:.1%} of a core, and {plain / arguments.seconds:.1%} without meters.")
    accepted = [one for windows in found.values() for one in windows if one.accepted]
    right = sum(one.right for one in accepted)
    if right < RIGHT_LIMIT * len(accepted):
        raise LimitError(f"{right} of {len(accepted)} truths lie where they should")


if __name__ == "__main__":
    with errors_as_exit_status():
        main()
