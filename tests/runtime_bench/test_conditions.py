"""Looks at a machine beside a run: from the text that the script writes, and from real processes."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_bench.conditions.looks import conditions_of, look_here
from runtime_bench.conditions.script import SAMPLE_BEGINS, WATCH, Watcher
from runtime_bench.records.reported import SERIES, Conditions

CPU = "/sys/devices/system/cpu/cpu"
SHELLS = [name for name in ("sh", "dash", "bash", "busybox", "mksh") if shutil.which(name)]
BUSY = "t = __import__('time').monotonic() + {}\nwhile __import__('time').monotonic() < t: pass"
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks are at /proc and /sys")
ONCE = (
    f"{CPU}0/cpufreq/cpuinfo_max_freq:2000000\n{CPU}1/cpufreq/cpuinfo_max_freq:1000000\n"
    f"{CPU}2/cpufreq/cpuinfo_max_freq:1000000\n/proc/77/status:Cpus_allowed_list: 0-1\n"
    "/sys/class/power_supply/bat/type:Battery\n/sys/class/power_supply/usb/type:USB\n"
)


def look(uptime: float, *lines: str) -> str:
    return "\n".join([SAMPLE_BEGINS, f"/proc/uptime:{uptime} 5.00", *lines]) + "\n"


def caps(first: int, second: int, third: int) -> list[str]:
    return [f"{CPU}{i}/cpufreq/scaling_max_freq:{khz}" for i, khz in enumerate((first, second, third))]


def times(busy: int, stolen: int, own: int) -> list[str]:
    own_line = "/proc/77/stat:77 (a ) b) R " + " ".join(["0"] * 10) + f" {own} 0 0 0 20 0"
    return [f"/proc/stat:cpu  {busy} 0 0 900 0 0 0 {stolen} 0 0", own_line]


def test_only_the_cores_that_the_run_may_use_count() -> None:
    text = (
        ONCE + look(100.0, *caps(2_000_000, 1_000_000, 100_000)) + look(100.5, *caps(1_200_000, 1_000_000, 0))
    )
    found = conditions_of(text)
    assert (found.at_s, found.caps) == ((0.0, 0.5), (1.0, 0.6))
    assert found.clocks == ()
    assert found.hidden["clocks"] == "no file shows the clocks"


def test_what_a_look_lacks_is_null_and_what_no_look_has_says_why() -> None:
    zone = "/sys/class/thermal/thermal_zone{}/temp:{}"
    text = (
        ONCE
        + look(10.0, zone.format(0, 41_500), zone.format(1, -273_000))
        + look(10.5)
        + look(11.0, "junk", "/a:")
    )
    found = conditions_of(text)
    assert found.hottest_c == (41.5, None, None)
    assert set(found.hidden) == set(SERIES) - {"hottest_c"}
    assert all(found.hidden.values())
    assert conditions_of("", why="nobody was there").hidden == dict.fromkeys(SERIES, "nobody was there")


def test_what_has_changed_between_looks() -> None:
    group = "/sys/fs/cgroup/app/cpu.stat:throttled_usec {}"
    text = (
        look(10.0, *times(1000, 0, 100), group.format(5_000_000))
        + look(11.0, *times(1150, 20, 200), group.format(5_400_000))
        + look(12.0, "/proc/stat:cpu  1200 0 0 900 0 0 0 20 0 0", group.format(5_400_000))
    )
    found = conditions_of(text)
    assert found.others_cores == (None, 0.5, None)
    assert found.stolen_cores == (None, 0.2, 0.0)
    assert found.held_share == (None, 0.4, 0.0)


@pytest.mark.parametrize(
    ("status", "online", "charging"),
    [
        ("Charging", "1", True),
        ("Full", "1", True),
        ("Not charging", "0", False),
        ("Discharging", "0", False),
        ("Discharging", "1", None),
        ("Unknown", "", None),
    ],
)
def test_power_supplies(status: str, online: str, charging: bool | None) -> None:
    folder = "/sys/class/power_supply"
    lines = [f"{folder}/bat/status:{status}", f"{folder}/usb/online:{online}"]
    found = conditions_of(ONCE + look(1.0, *lines))
    assert found.charging == (() if charging is None else (charging,))


def test_supplies_with_a_colon_in_their_name_and_the_battery_of_a_mouse() -> None:
    folder = "/sys/class/power_supply"
    port, own = f"{folder}/ucsi-source-psy-USBC000:001", f"{folder}/bat/status:Discharging"
    # Power from outside that does not charge: not known.
    for online, charging in (("0", (False,)), ("1", ())):
        found = conditions_of(f"{ONCE}{port}/type:USB\n" + look(1.0, own, f"{port}/online:{online}"))
        assert found.charging == charging
    mouse = f"{folder}/mouse/type:Battery\n{folder}/mouse/scope:Device\n"
    lines = [f"{folder}/mouse/status:Discharging", f"{folder}/usb/online:0"]
    assert conditions_of(ONCE + mouse + look(1.0, *lines, f"{folder}/bat/status:Full")).charging == (False,)
    assert conditions_of(mouse + look(1.0, *lines)).charging == ()


def test_numbers_that_no_machine_has_are_no_crash() -> None:
    digits = "9" * 5000
    lines = [f"/sys/class/thermal/thermal_zone0/temp:{digits}", *caps(2_000_000, 1_000_000, 1)]
    for cores in (digits, f"0-{digits}", f"{digits}-{digits}"):
        once = ONCE.replace("Cpus_allowed_list: 0-1", f"Cpus_allowed_list: 0,{cores}")
        found = conditions_of(once + look(1.0, *lines))
        assert (found.caps, found.hottest_c) == ((1.0,), ())


def test_services_are_asked_where_no_file_tells() -> None:
    answers = [
        "@battery:  AC powered: true",
        "@low_power:1",
        "@thermal:Thermal Status: 2",
    ]
    found = conditions_of(look(1.0, *answers, "@power:Display Power: state=ON") + look(1.5))
    assert (found.charging, found.low_power) == ((True, None), (True, None))
    assert (found.thermal_status, found.screen_on) == ((2, None), (True, None))


def test_a_record_holds_no_more_looks_than_it_can() -> None:
    found = conditions_of(
        "".join(look(float(i), "/sys/firmware/acpi/platform_profile:balanced") for i in range(20_000))
    )
    assert 5000 < len(found.at_s) == len(found.low_power) <= 9000
    assert found.at_s[1] == 3.0


@linux
@pytest.mark.parametrize("shell", SHELLS)
def test_a_look_at_many_cores_is_no_longer_than_one_at_few(shell: str, tmp_path: Path) -> None:
    (own,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if "Cpus_allowed_list" in line
    )
    first = int(re.split("[-,]", own.split()[1])[0])
    for core in range(512):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{core}/cpufreq"
        folder.mkdir(parents=True)
        cap, clock = (2_100_000, 1_500_000) if core == first else (900_000, 3_000_000)
        for name, khz in (("cpuinfo_max", 3_000_000), ("scaling_max", cap), ("scaling_cur", clock)):
            (folder / f"{name}_freq").write_text(f"{khz}\n")
    (tmp_path / "sys/devices/system/cpu/cpu7/cpufreq/scaling_max_freq").write_text("<unknown>\n")
    script = WATCH.replace("\nbase=  #", f"\nbase={tmp_path}  #", 1)
    words = ["busybox", "sh"] if shell == "busybox" else [shell]

    def looked(process: str = "", seconds: float = 0.0) -> str:
        command = [*words, "-c", script, "phoneready", process]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
            time.sleep(seconds)
            if process:
                watcher.terminate()
            return watcher.communicate(timeout=60)[0]

    everywhere = looked()
    assert (conditions_of(everywhere).caps, conditions_of(everywhere).clocks) == ((0.3,), (1.0,))
    assert len(everywhere) < 3000
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {first})
    try:
        text = looked(str(os.getpid()), 1.5)
    finally:
        os.sched_setaffinity(0, usable)
    found = conditions_of(text)
    assert len(found.caps) > 1
    assert (set(found.caps), set(found.clocks)) == ({0.7}, {0.5})


@linux
def test_the_hottest_zone_that_is_connected_is_looked_at(tmp_path: Path) -> None:
    for number, milli in enumerate(["41000", "-273000", "", "hot", "52500", "2147483647", "-5000", "9" * 30]):
        (tmp_path / f"thermal_zone{number}").mkdir()
        (tmp_path / f"thermal_zone{number}" / "temp").write_text(f"{milli}\n")
    for shell in SHELLS:
        words = ["busybox", "sh"] if shell == "busybox" else [shell]
        script = WATCH.replace("/sys/class/thermal", str(tmp_path))
        done = subprocess.run(
            [*words, "-c", script, "phoneready", ""], capture_output=True, text=True, check=True
        )
        assert [line for line in done.stdout.splitlines() if "thermal_zone" in line] == [
            f"{tmp_path}/thermal_zone4/temp:52500"
        ], shell


def test_samples_are_placed_by_the_machines_own_clock() -> None:
    text = look(100.0) + look(101.0) + look(102.0) + look(103.0)
    found = conditions_of(text, [(100_900_000_000, 101_100_000_000)])
    assert found.samples_s == ((0.9, 1.1),)
    placed = Conditions(found.at_s, found.samples_s, caps=(0.1, 0.2, 0.3, 0.4))
    assert [cap for _, cap in placed.during_samples("caps")] == [0.1, 0.2, 0.3]
    # A container whose clock is its own: the samples cannot be placed, and all looks count.
    assert conditions_of(text, [(7_000_000_000, 7_100_000_000)]).samples_s == ()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from([*(ONCE + look(1.0, *times(1, 1, 1), *caps(1, 2, 3))).split("\n")]), st.text()
        )
    )
)
def test_torn_and_strange_text_is_never_a_crash(lines: list[str]) -> None:
    text = "\n".join(lines)
    assert len(conditions_of(text).at_s) <= text.count(SAMPLE_BEGINS)


@linux
@pytest.mark.parametrize("shell", SHELLS)
def test_any_shell_looks_until_it_is_told_to_stop(shell: str, tmp_path: Path) -> None:
    words = ["busybox", "sh"] if shell == "busybox" else [shell]
    with (
        subprocess.Popen([sys.executable, "-c", BUSY.format(1.3)]) as process,
        subprocess.Popen([sys.executable, "-c", BUSY.format(1.3)]),
        (tmp_path / "out").open("wb") as out,
    ):
        command = [*words, "-c", WATCH, "phoneready", str(process.pid)]
        watcher = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE)
        process.wait()
        watcher.send_signal(signal.SIGTERM)
        _, errors = watcher.communicate(timeout=30)
    found = conditions_of((tmp_path / "out").read_text())
    assert errors == b""
    assert len(found.at_s) >= 3
    assert found.at_s == tuple(sorted(found.at_s))
    assert any(found.others_cores) or "others_cores" in found.hidden


@linux
def test_a_watcher_ends_with_what_it_watches_and_looks_once_at_no_process(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        process.wait()
    with (tmp_path / "out").open("wb") as out:
        subprocess.run(
            ["sh", "-c", WATCH, "phoneready", str(process.pid)], stdout=out, check=True, timeout=60
        )
    for found in (conditions_of((tmp_path / "out").read_text()), look_here()):
        assert len(found.at_s) == 1
    assert found.hidden["others_cores"] == "there was one look alone"


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group with a quota of nothing yet, version 1 or 2."""
    roots = [Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")]
    made = None
    for root in roots:
        folder = root / f"phoneready-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            folder.mkdir()
            if any((folder / name).exists() for name in ("cpu.cfs_quota_us", "cpu.max")):
                made = folder
                break
            folder.rmdir()
    if made is None:
        pytest.skip("no control group with a quota of processor time can be made here")
    yield made
    made.rmdir()


def set_quota(folder: Path, share: float) -> None:
    """Let a group have a share of one core."""
    if (folder / "cpu.max").exists():
        (folder / "cpu.max").write_text(f"{int(share * 100_000)} 100000")
    else:
        (folder / "cpu.cfs_quota_us").write_text(str(int(share * 100_000)))


@linux
def test_a_quota_in_the_middle_of_a_run_is_seen(group: Path) -> None:
    with Watcher() as watcher, subprocess.Popen([sys.executable, "-c", BUSY.format(3.5)]) as process:
        (group / "cgroup.procs").write_text(str(process.pid))
        watcher.watch(process.pid)
        time.sleep(1.2)
        set_at = time.clock_gettime(time.CLOCK_BOOTTIME)
        set_quota(group, 0.3)
        process.wait()
    found = conditions_of(watcher.text)
    first = re.search(r"^/proc/uptime:(\S+)", watcher.text, re.MULTILINE)
    assert first is not None
    set_at -= float(first[1])
    early = [share for at, share in found.during_samples("held_share") if at < set_at]
    late = [share for at, share in found.during_samples("held_share") if at >= set_at]
    assert max(early, default=0.0) < 0.05
    assert max(late) > 0
