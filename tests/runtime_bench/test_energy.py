"""Joules a token: from files that a real process keeps up to date, through the real watcher, to records and tables."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_meters import Curve, SimulatedFile, now, simulated

from phoneready.main import main
from phoneready.report.tables import record_table as report_table
from runtime_bench.conditions import watcher
from runtime_bench.conditions.looks import conditions_of
from runtime_bench.conditions.meters.energy import energy_of
from runtime_bench.conditions.meters.joules import changes, joules_in
from runtime_bench.conditions.meters.meter import Counter, Meter, Reading, counting, showing
from runtime_bench.conditions.meters.readings import readings_of
from runtime_bench.conditions.meters.windows import Windows
from runtime_bench.conditions.script import IDLE, LOOK_BEGINS, WATCH
from runtime_bench.measuring.measure import run_bench
from runtime_bench.presentation.comparison_table import format_comparison
from runtime_bench.presentation.record_table import format_table, record_table
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.compare import compare_records
from runtime_bench.records.conditions import nothing_known
from runtime_bench.records.energy import NOTHING, Joules, Metered, ProcessEnergy
from runtime_bench.records.energy_account import accounts, energy
from runtime_bench.records.groups import bench_groups
from runtime_bench.records.jsonl import record_from_json, record_to_json
from runtime_bench.records.notes import note_of
from runtime_bench.targets import Local
from runtime_bench.worker import WorkerRequest, WorkerResult
from runtime_bench.workload import BenchSettings

T = TypeVar("T")
SHELLS = [name for name in ("sh", "dash", "bash", "busybox", "mksh") if shutil.which(name)]
linux = pytest.mark.skipif(sys.platform != "linux", reason="meters are files of Linux")
CURVE = Curve(mean_w=8.0)
RAPL = "/sys/class/powercap/intel-rapl:0"
SUPPLY = "/sys/class/power_supply"
RANGE = 262_143_328_850
"""Microjoules after which most Intel processors begin anew."""


def rapl(base: Path, zone: str = RAPL, name: str = "package-0", **changes: Any) -> list[SimulatedFile]:
    """A zone whose counter goes round a second after it began."""
    folder = f"{base}{zone}"
    counter = {"wraps_at": RANGE, "begins_at": RANGE - 8_000_000, "shows": "joules"} | changes
    return [
        SimulatedFile(f"{folder}/energy_uj", **counter),
        SimulatedFile(f"{folder}/name", text=name),
        SimulatedFile(f"{folder}/max_energy_range_uj", text=str(counter["wraps_at"])),
    ]


def battery(
    base: Path, *files: SimulatedFile, status: str = "Discharging", **changes: Any
) -> list[SimulatedFile]:
    """A battery of 4 V that is not charged."""
    folder = f"{base}{SUPPLY}/battery"
    told = {"type": "Battery", "voltage_now": "4000000"}
    return [
        *(SimulatedFile(f"{folder}/{name}", text=text) for name, text in told.items()),
        SimulatedFile(f"{folder}/status", text=status, **changes),
        *(replace(file, path=f"{folder}/{file.path}") for file in files),
    ]


CURRENT = SimulatedFile("current_now", shows="watts", unit=-4e-6)
"""Microamperes out of it, at 4 V."""
CHARGE = SimulatedFile("charge_counter", shows="left", unit=4 * 3.6e-3, begins_at=2_985_000)
"""Microampere hours that are left in it."""


def moved(script: str, base: Path) -> str:
    """The script with meters and power supplies in another place."""
    assert "\nbase=  #" in script
    return script.replace("\nbase=  #", f"\nbase={base}  #", 1)


# ---- Real files that a process writes, through the real watcher ---------------------------------------------------


def desktop(base: Path) -> list[SimulatedFile]:
    """Zones of which each has something special."""
    return [
        *rapl(base),
        *rapl(base, f"{RAPL[:-1]}1", "package-1"),
        *rapl(base, f"{RAPL}:0", "core", unit=2e-6, every_s=0.5),
        *rapl(base, f"{RAPL}:1", "dram", after_s=6.0, by=10**10),
        *rapl(base, f"{RAPL}:2", "uncore", unit=1e9),
        *rapl(base, f"{RAPL[:-1]}2", "psys", step=4_000_000, begins_at=0),
        *rapl(base, f"{RAPL[:-1]}3", "going round", wraps_at=2_000_000),
    ]


def board(base: Path) -> list[SimulatedFile]:
    """Two chips on rails, a graphics card, and a supply that tells what comes in."""
    chips = {"hwmon0": "ina3221", "hwmon1": "amdgpu", "hwmon2": "ina219"}
    shown = {
        "hwmon0/power1_input": 2e-6,
        "hwmon0/power2_input": 1e-6,
        "hwmon1/power1_average": 1e-8,
        "hwmon2/curr1_input": 5e-3,
    }
    texts = {"hwmon0/power1_label": "VDD_CPU", "hwmon0/power2_label": "VDD_IN", "hwmon2/in1_input": "5000"}
    texts |= {f"{chip}/name": name for chip, name in chips.items()}
    place, usb = f"{base}/sys/class/hwmon", f"{base}{SUPPLY}/usb"
    return [
        *(SimulatedFile(f"{place}/{name}", text=text) for name, text in texts.items()),
        *(SimulatedFile(f"{place}/{name}", shows="watts", unit=unit) for name, unit in shown.items()),
        SimulatedFile(f"{usb}/type", text="USB"),
        SimulatedFile(f"{usb}/voltage_now", text="5000000"),
        SimulatedFile(f"{usb}/current_now", shows="watts", unit=5e-6),
    ]


def laptop(base: Path) -> list[SimulatedFile]:
    """Two batteries, and a mouse's."""
    others = {
        "BAT1/type": "Battery",
        "BAT1/status": "Discharging",
        "mouse/type": "Battery",
        "mouse/scope": "Device",
    }
    own = [replace(file, path=file.path.replace("/battery/", "/BAT0/")) for file in battery(base, CURRENT)]
    return [*own, *(SimulatedFile(f"{base}{SUPPLY}/{name}", text=text) for name, text in others.items())]


MACHINES: dict[str, Callable[[Path], list[SimulatedFile]]] = {
    "desktop": desktop,
    "board": board,
    "phone": lambda base: [
        *battery(base, CURRENT, CHARGE),
        SimulatedFile(f"{base}{SUPPLY}/maxfg/type", text="Battery"),
        SimulatedFile(f"{base}{SUPPLY}/maxfg/status", text="Discharging"),
    ],
    "plugged": lambda base: battery(base, CURRENT, status="Charging"),
    "plugged-in": lambda base: battery(base, CURRENT, after_s=6.0, becomes="Charging"),
    "lying": lambda base: battery(base, replace(CURRENT, unit=-4e-3), replace(CHARGE, after_s=6.0, by=2_000)),
    "laptop": laptop,
    "closed": lambda base: [SimulatedFile(f"{base}{RAPL}/energy_uj/a-folder", text="no file")],
    "server": lambda base: [SimulatedFile(f"{base}/sys/class/hwmon/hwmon0/name", text="coretemp")],
}
"""What is special about a machine -> its files; `lying` has milliamperes, and a charge that comes back."""


@dataclass(frozen=True)
class Watched:
    """What was told of each machine, and when the samples were.

    Attributes:
        told: By machine.
        idle: From when to when nothing ran, by machine.
        samples: From when to when.
    """

    told: dict[str, ProcessEnergy]
    idle: dict[str, tuple[float, float] | None]
    samples: tuple[float, float]

    def find(self, machine: str, domain: str) -> Metered:
        """The first meter of a domain."""
        return next(one for one in self.told[machine].meters if one.domain == domain)

    def check(self, machine: str, found: Metered, times: float) -> None:
        """The truth, a multiple of the curve, is where it should be, and the guess near it."""
        idle = self.idle[machine]
        assert idle is not None
        truth = times * CURVE.joules(*self.samples)
        assert found.problem is None
        assert found.joules is not None
        assert found.joules.low <= truth <= found.joules.high
        assert found.joules.value == pytest.approx(truth, rel=0.05)
        assert found.idle_joules is not None
        assert found.idle_joules.low <= times * CURVE.joules(*idle) <= found.idle_joules.high
        assert found.seconds == pytest.approx(self.samples[1] - self.samples[0], abs=1e-3)
        assert found.idle_seconds == pytest.approx(idle[1] - idle[0], abs=1e-3)


def shell(script: str, base: Path, machine: str, *words: str) -> subprocess.Popen[bytes]:
    """Begin a script on a machine; what it writes is appended to what others wrote."""
    with (base / f"{machine}.txt").open("ab") as output:
        return subprocess.Popen(["sh", "-c", moved(script, base / machine), "-", *words], stdout=output)


def in_time(measured: Callable[[], T], enough: Callable[[T], bool]) -> T:
    """What is measured, up to three times: meters are looked at too seldom while a machine has no time for it."""
    for _ in range(2):
        if enough(found := measured()):
            return found
    return measured()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """All machines at once, each with a watcher of its own beside one process."""

    def seen_often(found: Watched) -> bool:
        return (found.find("desktop", "package").update_s or math.inf) < 0.4

    return in_time(lambda: watch(tmp_path_factory.mktemp("machines")), seen_often)


def watch(base: Path) -> Watched:
    """What watchers tell of files in a folder, in six seconds."""
    files = [file for machine, made in MACHINES.items() for file in made(base / machine)]
    with simulated(files, CURVE, base / "spec.json"):
        for one in [shell(IDLE, base, machine, "20") for machine in MACHINES]:
            one.wait()
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
            watchers = [shell(WATCH, base, machine, str(process.pid), "metered") for machine in MACHINES]
            time.sleep(1.0)
            begin = now()
            time.sleep(6.0)
            samples = begin, now()
            time.sleep(1.0)
            process.communicate(b"\n")
        for one in watchers:
            one.terminate()
            one.wait()
    texts = {machine: (base / f"{machine}.txt").read_text() for machine in MACHINES}
    spans = [(int(samples[0] * 1e9), int(samples[1] * 1e9))]
    told = {machine: energy_of(text, spans, conditions_of(text, spans)) for machine, text in texts.items()}
    return Watched(told, {machine: readings_of(text).idle for machine, text in texts.items()}, samples)


@linux
@pytest.mark.parametrize(
    ("machine", "method", "domain", "times"),
    [
        ("desktop", "RAPL counter", "package", 2.0),
        ("desktop", "RAPL counter", "core", 0.5),
        ("board", "hwmon power", "ina3221 VDD_IN", 1.0),
        ("board", "hwmon power", "ina3221 VDD_CPU", 0.5),
        ("board", "hwmon voltage x current", "ina219 curr1", 1.0),
        ("board", "supply voltage x current", "input at usb", 1.0),
        ("phone", "battery voltage x current", "whole device, at battery", 1.0),
    ],
)
def test_what_was_used_is_told(
    watched: Watched, machine: str, method: str, domain: str, times: float
) -> None:
    found = watched.find(machine, domain)
    assert found.method == method
    watched.check(machine, found, times)


@linux
def test_meters_stand_in_order(watched: Watched) -> None:
    domains = {machine: [one.domain for one in told.meters] for machine, told in watched.told.items()}
    assert domains["desktop"] == ["package", "psys", "dram", "core", "uncore", "going round"]
    # What goes in first, and no graphics card, which tells of itself alone.
    assert {"ina3221 VDD_IN", "ina219 curr1"} == set(domains["board"][:2])
    assert domains["board"][2:] == ["ina3221 VDD_CPU", "input at usb"]
    current, charge = watched.told["phone"].meters
    watched.check("phone", current, 1.0)
    assert charge.method == "battery charge counter x voltage"
    assert charge.joules is not None
    assert charge.joules.low <= CURVE.joules(*watched.samples) <= charge.joules.high


@linux
def test_a_counters_resolution_is_seen(watched: Watched) -> None:
    slow, coarse, fine = (watched.find("desktop", domain) for domain in ("core", "psys", "package"))
    assert slow.update_s is not None
    assert fine.update_s is not None
    assert slow.update_s > fine.update_s
    assert coarse.step == pytest.approx(4.0)
    assert fine.step is not None
    assert fine.step < 1e-3
    assert coarse.joules is not None
    assert fine.joules is not None
    assert coarse.joules.low <= CURVE.joules(*watched.samples) <= coarse.joules.high
    assert coarse.joules.error / coarse.joules.value > fine.joules.error / fine.joules.value


@linux
@pytest.mark.parametrize(
    ("machine", "place", "why"),
    [
        ("desktop", 2, "it jumped by 1e+04 J in "),
        ("desktop", 4, "its reading never changed in "),
        ("desktop", 5, "it may have gone round more than once in the "),
        ("plugged", 0, "power came from outside, and what leaves the battery is not what is used"),
        ("plugged-in", 0, "power from outside came or went"),
        ("lying", 0, "of a device that computed: its unit is another one"),
        ("lying", 1, "it went back by "),
        ("laptop", 0, "the device has several batteries"),
    ],
)
def test_meters_that_say_nothing_say_why(watched: Watched, machine: str, place: int, why: str) -> None:
    found = watched.told[machine].meters[place]
    assert found.joules is None
    assert why in str(found.problem)


@linux
def test_what_is_not_there_or_may_not_be_read_says_so(watched: Watched) -> None:
    assert watched.told["server"] == ProcessEnergy(
        hidden="nothing here meters energy: neither RAPL nor hwmon nor a power supply shows any"
    )
    found = watched.told["closed"]
    assert found.meters == ()
    assert str(found.hidden).startswith(f"{RAPL}/energy_uj may not be read: on most systems root alone may")


@linux
@pytest.mark.parametrize("name", SHELLS)
def test_any_shell_glances(name: str, tmp_path: Path) -> None:
    words = ["busybox", "sh"] if name == "busybox" else [name]
    for file in battery(tmp_path, CHARGE):
        Path(file.path).parent.mkdir(parents=True, exist_ok=True)
        Path(file.path).write_text(f"{file.text or 7}\n")
    command = [*words, "-c", moved(IDLE, tmp_path), "-", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    found = readings_of(done.stdout)
    assert {path: [one.value for one in track] for path, track in found.tracks.items()} == {
        f"{SUPPLY}/battery/voltage_now": [4e6] * 4,
        f"{SUPPLY}/battery/charge_counter": [7.0] * 4,
    }
    assert found.idle is not None
    assert found.idle[1] > found.idle[0]


def answers(minutes: int, powered: str = "false") -> str:
    """Looks a minute apart at a phone of 8 W of which no file tells: 33 mAh a minute at 4 V, told a tenth late."""
    return "".join(
        f"{LOOK_BEGINS}\n/proc/uptime:{60.0 * i} 1.0\n@battery:  AC powered: {powered}\n@battery:  voltage: 4000\n"
        f"@battery:  Charge counter: {3_000_000 - 33_333 * i}\n@battery_at:{60.0 * i + 0.1} 1.0\n"
        for i in range(minutes)
    )


def test_androids_service_tells_of_minutes() -> None:
    spans = [(int(300e9), int(1500e9))]

    def told(text: str) -> Metered:
        (meter,) = energy_of(text, spans, conditions_of(text, spans)).meters
        return meter

    found = told(answers(30))
    assert found.method == "battery service's charge counter x voltage"
    assert found.joules is not None
    assert found.joules.low <= 8.0 * 1200 <= found.joules.high
    assert found.joules.value == pytest.approx(8.0 * 1200, rel=0.01)
    assert found.update_s == pytest.approx(60.0)
    assert found.idle_joules is None
    assert "power came from outside" in str(told(answers(30, "true")).problem)
    assert "is not known" in str(told(answers(30, "perhaps")).problem)


# ---- What a benchmark makes of it ---------------------------------------------------------------------------------

SETTINGS = BenchSettings(
    check_text=False, n_prompt=(), n_gen=(2400,), ttft=(), load=False, n_threads=(1,), repetitions=1,
    regimes=("sustained",), sustained_s=10.0, energy=True, idle_s=3.0, spread_limit=1e9,
)  # fmt: skip
SHORT = replace(SETTINGS, n_gen=(1,), load=True, regimes=("fresh",), sustained_s=0.0, idle_s=0.3)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the meters of this machine are looked for."""
    for name, script in (("_COMMAND", WATCH), ("_IDLE_COMMAND", IDLE)):
        monkeypatch.setattr(watcher, name, ("sh", "-c", moved(script, tmp_path), "phoneready"))
    return tmp_path


class Noting(Local):
    """This machine; it keeps the results."""

    def __init__(self) -> None:
        self.results: list[WorkerResult] = []

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        self.results.append(super().run(request, timeout_s))
        return self.results[-1]


def is_known(record: BenchRecord) -> bool:
    """Joules a token are known as well as they must be."""
    found = energy(record)
    return found is not None and found.reason is None


@linux
def test_joules_a_token_are_the_counters_own_difference(here: Path, tiny_gguf: Callable[..., Path]) -> None:
    pytest.importorskip("llama_cpp")
    path, target = tiny_gguf(hidden_size=256, head_dim=64), Noting()
    with simulated(rapl(here), CURVE, here / "spec.json"):
        load, short = run_bench([path], SHORT)
        record = in_time(lambda: run_bench([path], SETTINGS, target=target)[0], is_known)
    assert record.failure is None
    spans = [(begin / 1e9, end / 1e9) for begin, end in target.results[-1].spans_ns]
    truth = sum(CURVE.joules(*span) for span in spans) / (2400 * len(spans))
    found = energy(record)
    assert found is not None
    assert (found.method, found.domain, found.reason) == ("RAPL counter", "package", None)
    assert (found.n_tokens, found.seconds) == (2400 * len(spans), pytest.approx(sum(e - b for b, e in spans)))
    assert found.joules is not None
    assert found.joules.low <= truth <= found.joules.high
    assert found.joules.value == pytest.approx(truth, rel=0.05)
    ((process,),) = [one.meters for one in record.energy if one]
    assert process.idle_joules is not None
    assert process.idle_seconds >= 2.0
    assert process.idle_joules.value / process.idle_seconds == pytest.approx(8.0, rel=0.5)
    # One short sample says nothing but how long it would have to be.
    too_short = energy(short)
    assert too_short is not None
    assert too_short.joules is None
    assert "the samples are too short for the meter" in str(too_short.reason)
    assert "tokens each" in str(note_of(short))
    assert (load.energy, energy(load)) == ((), None)
    text = json.dumps(record_to_json(record))
    assert record_from_json(json.loads(text), where="here") == record
    assert json.loads(text)["joules_per_token"] == found.joules.value


@linux
def test_nobody_meters_unless_asked_to(here: Path, tiny_gguf: Callable[..., Path]) -> None:
    pytest.importorskip("llama_cpp")
    settings = replace(SHORT, energy=False, idle_s=BenchSettings.idle_s, load=False)
    with simulated(rapl(here), CURVE, here / "spec.json"):
        (record,) = run_bench([tiny_gguf()], settings)
    assert (record.energy, energy(record), accounts(record)) == ((), None, ())
    assert "J/token" not in format_table([record])


@linux
def test_the_command_shows_why_there_is_no_energy(
    here: Path, tiny_gguf: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp")
    words = ["-p", "0", "--ttft", "0", "-n", "2", "-r", "1", "-t", "1", "--no-text-check", "--idle", "0.2"]
    assert main(["bench", str(tiny_gguf()), *words, "--energy"]) == 0
    shown = capsys.readouterr().out
    assert "J/token" in shown
    assert "nothing here meters energy" in shown
    assert main(["bench", str(tiny_gguf()), *words]) == 0
    assert "warning: --idle has no effect without --energy\n" in capsys.readouterr().err


# ---- Rows -----------------------------------------------------------------------------------------------------------

PACKAGE = Metered(
    "RAPL counter", "package", True, 10.0, Joules(98, 100, 102), 5.0, Joules(9, 10, 11), 1e-6, 0.1
)


def metered(make_record: Any, *meters: Metered, **fields: Any) -> BenchRecord:
    """A row of 128 tokens a sample, two samples of a process each."""
    given = {"samples_ns": (10**10, 10**10), "sequence": (0, 1), "energy": (ProcessEnergy(meters),) * 2}
    record: BenchRecord = make_record(**(given | fields))
    return record


def test_all_repetitions_make_one_account(make_record: Any) -> None:
    found = energy(metered(make_record, PACKAGE))
    assert found is not None
    assert found.joules == Joules(196 / 256, 200 / 256, 204 / 256)
    assert found.idle_w == 2.0
    # Ten seconds and ten seconds, at 1.8 to 2.2 W idle.
    assert found.net_joules == Joules(*(pytest.approx(j / 256) for j in (196 - 44, 160, 204 - 36)))


def test_the_first_meter_that_says_something_counts(make_record: Any) -> None:
    rail = replace(PACKAGE, method="hwmon power", domain="ina3221 VDD_IN", counts=False)
    void = replace(PACKAGE, joules=None, problem="it jumped")
    found = accounts(metered(make_record, void, rail))
    assert [one.domain for one in found] == ["ina3221 VDD_IN", "package"]
    assert found[1].reason == "it jumped"
    closed = accounts(metered(make_record, energy=(ProcessEnergy((void,), "root alone may"),) * 2))
    assert closed[0].reason == "it jumped; root alone may"
    alone = metered(make_record, energy=(ProcessEnergy((PACKAGE,)), ProcessEnergy((rail,))))
    assert {one.reason for one in accounts(alone)} == {
        "process 1 of 2 was not metered so",
        "process 2 of 2 was not metered so",
    }


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"status": "failed", "failure": "gone"}, "it failed"),
        ({"kind": "emulated"}, "an emulator's energy says nothing"),
        ({"degenerate": "empty"}, "what it writes is degenerate (empty)"),
        ({"energy": (None, None)}, "nobody looked at any meter"),
        ({"energy": (ProcessEnergy((replace(PACKAGE, seconds=0.0),)),)}, "it says nothing"),
        (
            {"energy": (ProcessEnergy((replace(PACKAGE, joules=NOTHING),)),)},
            "nothing was metered in the samples",
        ),
        ({"samples_ns": (), "sequence": ()}, "tg is no rate of tokens"),
        ({"energy": (ProcessEnergy(hidden="root alone may"),) * 2}, "root alone may"),
    ],
)
def test_rows_without_joules_say_why(make_record: Any, fields: dict[str, Any], why: str) -> None:
    assert accounts(metered(make_record, PACKAGE, **fields))[0].reason == why


def test_what_would_have_done_is_said(make_record: Any) -> None:
    wide = replace(PACKAGE, joules=Joules(70, 100, 130))
    found = energy(metered(make_record, wide))
    assert found is not None
    assert found.reason == (
        "known to ± 30% only, and ± 10% is wanted: the samples are too short for the meter; about 384 tokens each, "
        "30 s, would do, or as much in samples of one process"
    )
    coarse = energy(metered(make_record, replace(wide, counts=False, step=5.0)))
    assert coarse is not None
    assert coarse.reason == "its steps of 5 W are too coarse for 10 W"
    short_idle = energy(metered(make_record, replace(PACKAGE, idle_joules=Joules(0, 10, 20))))
    assert short_idle is not None
    assert short_idle.joules is not None
    assert (short_idle.net_joules, short_idle.net_reason) == (
        None,
        "idle power is known to 0 to 4 W only; --idle 10 would do",
    )
    never = energy(metered(make_record, replace(PACKAGE, idle_joules=None, idle_seconds=0.0)))
    assert never is not None
    assert never.net_reason == "nobody metered the machine before it began"


def test_the_table_and_the_remarks(make_record: Any) -> None:
    record = metered(make_record, PACKAGE)
    row = record_table([record]).objects()[0]
    assert row["J/token"] == "0.781 (0.766 to 0.797)"
    assert (row["idle W"], row["energy of"]) == ("2", "RAPL counter, package")
    failed = metered(make_record, replace(PACKAGE, joules=None, problem="it jumped by 5 J"))
    assert "no joules a token (RAPL counter, package): it jumped by 5 J" in format_table([failed])


def test_the_report_has_joules_and_what_takes_their_place(make_record: Any) -> None:
    alone = metered(make_record, replace(PACKAGE, joules=None, problem="it jumped by 5 J"), n_threads=1)
    (group,) = bench_groups([metered(make_record, PACKAGE), alone])
    first, second = report_table(group).objects()
    assert (first["J/token"], first["energy of"]) == ("0.781 (0.766 to 0.797)", "RAPL counter, package")
    assert first["J/token, idle taken off"] == "0.625 (0.594 to 0.656)"
    assert (second["J/token"], second["energy of"]) == ("-", "it jumped by 5 J")
    (plain,) = bench_groups([make_record()])
    assert "J/token" not in report_table(plain).objects()[0]


def test_only_the_same_meter_of_the_same_machine_is_compared(make_record: Any) -> None:
    base = metered(make_record, PACKAGE)
    less = replace(PACKAGE, joules=Joules(48, 50, 52))
    new = metered(make_record, less, model_filename="models/pruned.gguf")
    found = compare_records(base, new).energy
    assert found is not None
    assert (found.meter, found.ratio) == ("RAPL counter, package", 0.5)
    assert (found.low, found.high) == (pytest.approx(48 / 102), pytest.approx(52 / 98))
    text = format_comparison([compare_records(base, new)])
    assert "0.471 to 0.531" in text
    assert "all that each meter told: RAPL counter, package" in text

    def why(**fields: Any) -> str:
        other = compare_records(base, replace(new, **fields)).energy
        assert other is not None
        assert other.ratio is None
        return str(other.reason)

    dram = ProcessEnergy((replace(less, domain="dram"),))
    assert why(energy=(dram, dram)) == "different meters: RAPL counter, package and RAPL counter, dram"
    assert why(energy=()) == "new: energy was not asked for"
    assert why(energy=(ProcessEnergy(hidden="root alone may"),) * 2) == "new: root alone may"
    assert why(clock_caps=(1.0, 0.5)).startswith("new: throttled")
    base = replace(base, clock_caps=(1.0, 1.0))
    assert why(clock_caps=(0.5, 0.5)) == "one ran with clocks capped at 50% of the highest, another at 100%"
    plain = replace(base, energy=())
    assert compare_records(plain, plain).energy is None
    assert "J/token" not in format_comparison([compare_records(plain, plain)])


# ---- Arithmetic -----------------------------------------------------------------------------------------------------


def track_of(
    curve: Curve, times: list[float], modulus: int | None, step: int, late_s: float
) -> list[Reading]:
    """A counter of microjoules that is brought up to date every `late_s`, read at some times."""
    readings = []
    for at in times:
        updated = at - at % late_s if late_s else at
        value = int(curve.joules(0.0, updated) * 1e6) // step * step
        readings.append(Reading(at, at, float(value if modulus is None else value % modulus)))
    return readings


GAPS = st.lists(st.integers(5, 60).map(lambda hundredths: hundredths / 100), min_size=20, max_size=60)


def at_times(gaps: list[float], begin: float = 1000.0) -> list[float]:
    times = [begin]
    for gap in gaps:
        times.append(times[-1] + gap)
    return times


@given(
    gaps=GAPS,
    mean_w=st.floats(0.5, 60.0),
    modulus=st.integers(200_000_000, 400_000_000),
    step=st.sampled_from((1, 61, 1000)),
)
def test_wraps_are_undone_whatever_the_counter(
    gaps: list[float], mean_w: float, modulus: int, step: int
) -> None:
    curve, times = Curve(mean_w), at_times(gaps)
    modulus -= modulus % step
    readings = tuple(track_of(curve, times, modulus, step, 0.0))
    meter = counting("m", "d", readings, Counter(1e-6, 120.0, modulus))
    assert meter.problem == ""
    truth = curve.joules(times[0], times[-1])
    assert meter.track[-1].value == pytest.approx(truth, abs=2e-6 * step + 1e-6)
    values = [one.value for one in meter.track]
    assert values == sorted(values)


@given(
    gaps=GAPS,
    late_s=st.sampled_from((0.0, 0.25, 0.9)),
    step=st.sampled_from((1, 10_000, 3_000_000)),
    data=st.data(),
)
def test_the_truth_lies_within_what_is_told(
    gaps: list[float], late_s: float, step: int, data: st.DataObject
) -> None:
    curve, times = Curve(6.0, swing=0.5), at_times(gaps)
    meter = counting("m", "d", tuple(track_of(curve, times, None, step, late_s)), Counter(1e-6, 1e4))
    moments = changes(meter)
    if len(moments) < 2:
        return
    inner = st.floats(times[0], times[-1])
    ends = sorted(data.draw(st.lists(inner, min_size=2, max_size=8, unique=True)))
    spans = list(zip(ends[::2], ends[1::2], strict=False))
    truth = sum(curve.joules(*span) for span in spans)
    found = joules_in(replace(meter, step=step * 1e-6), moments, Windows(spans))
    assert found.low <= truth + 1e-6
    assert truth <= found.high + 1e-6
    assert found.low <= found.value + 1e-9 <= found.high + 2e-9


@pytest.mark.parametrize("begin_s", [1000 + 0.29 * phase for phase in range(10)])
@pytest.mark.parametrize("gap_s", [0.0, 0.5, 1.2])
def test_a_sensor_that_nobody_reads_for_a_while_is_held_to_less(gap_s: float, begin_s: float) -> None:
    """Whatever the curve does meanwhile: past a peak it may be at the end where it was at the beginning."""
    curve = Curve(3.0)
    times = at_times([0.11] * 50 + [0.11 + gap_s] + [0.11] * 50, begin_s)
    track = tuple(Reading(at, at + 0.01, curve.watts(at)) for at in times)
    meter = Meter("m", "d", track, counts=False)
    span = (begin_s + 1.0, begin_s + 9.0)
    found = joules_in(meter, changes(meter), Windows([span]))
    assert found.low <= curve.joules(*span) <= found.high
    assert found.error < (0.02 + 0.05 * gap_s) * found.value


def test_samples_close_together_share_their_ends() -> None:
    """Half a second at a time is as good as all of it at once."""
    curve = Curve(10.0, swing=0.0)
    times = [1000 + i / 10 for i in range(200)]
    meter = counting("m", "d", tuple(track_of(curve, times, None, 1, 0.0)), Counter(1e-6, 1e4))
    whole = joules_in(meter, changes(meter), Windows([(1002.0, 1012.0)]))
    parts = [(1002 + i / 2, 1002.4999 + i / 2) for i in range(20)]
    assert joules_in(meter, changes(meter), Windows(parts)).error < 1.5 * whole.error
    apart = [(1002 + i / 2, 1002.25 + i / 2) for i in range(20)]
    assert joules_in(meter, changes(meter), Windows(apart)).error > 5 * whole.error


def test_a_slow_gauge_does_not_jump() -> None:
    """One that is brought up to date every half minute counts 450 J at once."""
    gauge = Counter(3.6e-3, 250.0, falls=True)
    times = [1000 + i / 10 for i in range(1800)]
    readings = [Reading(at, at, 50_000_000.0 - 125_000 * (at // 30)) for at in times]
    meter = counting("m", "d", tuple(readings), gauge)
    assert (meter.problem, meter.step) == ("", pytest.approx(450.0))
    assert meter.track[-1].value == pytest.approx(450 * (times[-1] // 30 - times[0] // 30))
    fallen = [one if one.asked_s < 1100 else one._replace(value=one.value - 5_000_000) for one in readings]
    assert counting("m", "d", tuple(fallen), gauge).problem.startswith("it jumped by 1.8")


def test_a_sensor_that_changes_its_sign_says_nothing() -> None:
    readings = tuple(Reading(i, i, value) for i, value in enumerate((5e6, 6e6, -5e6)))
    assert "changed its sign" in showing("m", "d", readings, 1e-6, 100.0).problem
    assert showing("m", "d", readings[:2], 1e-6, 5.5).problem == "it showed 6 W, which no such thing takes"


TORN = ("meters /a /b", "glance 1.0 2.0 5 x", "glance 9 1 5 5", "glance 1", "idle-over", "/a:1")


@given(st.lists(st.one_of(st.sampled_from(TORN), st.text())))
def test_torn_and_strange_text_is_never_a_crash(lines: list[str]) -> None:
    assert energy_of("\n".join(lines), [(0, 1)], nothing_known("")).meters == ()
