"""The script that samples a machine's conditions while a process measures on it, for any POSIX shell.

It is the same here, where `Watcher` runs it, and on other machines. The shell itself reads the files and starts no
program but `sleep`. Services (Android's dumpsys) are asked in the first, the last and every 20th sample: an answer
costs a hundred times as much as a file. Energy meters are read between the samples.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from types import TracebackType

from runtime_bench.records.reported import INTERVAL_S, METER_S

SAMPLE_BEGINS = "phoneready-sample"
"""Line that a sample of conditions begins with."""
ASKED = "@"
"""Begins the lines of a service's answer: `@NAME:line`."""
_SELDOM = 20
_FREQUENT = 3600
"""Samples that are taken at INTERVAL_S; after half an hour they are taken more seldom, or nobody could carry them."""
_LATE_S = 20
_READINGS = round(INTERVAL_S / METER_S)
METERS, UNREADABLE, FACT, READING = "meters", "unreadable", "fact", "reading"
"""Begin lines on meters: the files in the order of their readings; a file that may not be read; a file that does not
change, and its text; uptime before and after a round of readings, and these."""

_RAPL, _SUPPLY = '"$base"/sys/class/powercap/intel-rapl:*', '"$base"/sys/class/power_supply/*'
_ONCE = f"{_SUPPLY}/type {_SUPPLY}/scope"
_EVERY_TIME = f"/proc/uptime /proc/stat {_SUPPLY}/status {_SUPPLY}/online /sys/firmware/acpi/platform_profile"
_FACTS = f"{_RAPL}/name {_RAPL}/max_energy_range_uj {_SUPPLY}/type {_SUPPLY}/scope"

FUNCTIONS = rf"""
base=  # of power supplies and meters; a test has its own
first_lines() {{
    for file do
        IFS= read -r line <"$file" && printf '%s:%s\n' "${{file#"$base"}}" "$line"
    done
}}
hottest() {{  # of the zones, those that are connected, which say something between -40 and 150 degrees
    most= where=
    for zone in /sys/class/thermal/thermal_zone[0-9]*/temp; do
        IFS= read -r milli <"$zone" || continue
        case ${{milli#-}} in '' | *[!0-9]* | ????????*) continue ;; esac
        test "$milli" -gt -40000 && test "$milli" -lt 150000 || continue
        test "$where" && test "$milli" -le "$most" && continue
        most=$milli where=$zone
    done
    test "$where" && printf '%s:%s\n' "$where" "$most"
}}
find_cores() {{  # those that the process may use, as number:highest clock
    allowed= cores=
    test "$1" && while read -r key rest; do
        test "$key" = Cpus_allowed_list: && allowed=$rest, && break
    done <"/proc/$1/status"
    for file in "$base"/sys/devices/system/cpu/cpu[0-9]*/cpufreq/cpuinfo_max_freq; do
        IFS= read -r most <"$file" || continue
        case $most in *[!0-9]* | ??????????*) continue ;; ????*) ;; *) continue ;; esac
        core=${{file%/cpufreq/*}} left=$allowed
        core=${{core##*/cpu}}
        while test "$left"; do
            part=${{left%%,*}} left=${{left#*,}}
            test "$core" -ge "${{part%-*}}" && test "$core" -le "${{part#*-}}" && break
            part=
        done
        test "$allowed" && test -z "$part" || cores="$cores $core:$most"
    done
}}
extreme_clock() {{  # of a file of each core, the line with the least (-lt) or most (-gt) of the core's highest clock
    found= where= folder=/sys/devices/system/cpu/cpu
    for core in $cores; do
        IFS= read -r khz <"$base$folder${{core%:*}}/cpufreq/$2" || continue
        case $khz in '' | *[!0-9]* | ??????????*) continue ;; esac
        share=$((khz / (${{core#*:}} / 1000)))  # Android's shell has 32 bits
        test "$where" && ! test $share $1 "$found" && continue
        found=$share where=$core clock=$khz
    done
    test "$where" || return
    printf '%s/cpufreq/%s:%s\n' "$folder${{where%:*}}" "$2" "$clock"
    test "$where" = "$shown" || printf '%s/cpufreq/cpuinfo_max_freq:%s\n' "$folder${{where%:*}}" "${{where#*:}}"
    shown=$where
}}
chosen_lines() {{  # of a file, those that begin with one of the words, none after the last word's
    file=$1
    shift
    while read -r key rest; do
        for word do
            test "$key" = "$word" && printf '%s:%s %s\n' "$file" "$key" "$rest"
        done
        test "$key" = "$word" && break
    done <"$file"
}}
find_groups() {{  # where the quotas of the process's groups are counted, those above its own among them
    groups=
    while IFS=: read -r _ names place; do
        case ,$names, in
            *,cpu,*) roots='/sys/fs/cgroup/cpu /sys/fs/cgroup/cpu,cpuacct /dev/cpuctl' ;;
            ,,) roots='/sys/fs/cgroup /sys/fs/cgroup/unified' ;;
            *) continue ;;
        esac
        case $place in *[!A-Za-z0-9/._@:\\-]*) continue ;; esac
        place=${{place%/}}
        while :; do
            for root in $roots; do
                test -r "$root$place/cpu.stat" && groups="$groups $root$place/cpu.stat"
            done
            test "$place" || break
            place=${{place%/*}}
        done
    done <"/proc/$1/cgroup"
}}
ask() {{
    name=$1
    shift
    command -v "$1" >/dev/null && "$@" </dev/null 2>&1 | while IFS= read -r line; do
        printf '{ASKED}%s:%s\n' "$name" "$line"
    done
}}
ask_services() {{
    ask battery dumpsys battery
    ask thermal dumpsys thermalservice
    ask low_power settings get global low_power
    if command -v dumpsys >/dev/null; then
        dumpsys power </dev/null | grep -iE 'wakefulness=|display power|screenon=|low_?powermode|saver' |
            while IFS= read -r line; do printf '{ASKED}power:%s\n' "$line"; done
    fi
}}
meter() {{  # files that are there, those that may be read to be read from now on
    for file do
        test -e "$file" || continue
        case $file in *[!A-Za-z0-9/._:-]*) continue ;; esac
        if IFS= read -r line <"$file"; then
            meters="$meters $file"
        else
            printf '{UNREADABLE} %s\n' "${{file#"$base"}}"
        fi
    done
}}
find_meters() {{
    meters=
    meter {_RAPL}/energy_uj
    meter {_SUPPLY}/power_now {_SUPPLY}/voltage_now {_SUPPLY}/current_now
    names=
    for file in $meters; do names="$names ${{file#"$base"}}"; done
    printf '{METERS}%s\n' "$names"
}}
tell_facts() {{
    for file do
        IFS= read -r line <"$file" && printf '{FACT} %s %s\n' "${{file#"$base"}}" "$line"
    done
}}
read_meters() {{
    test "$meters" || return
    read -r asked _ </proc/uptime
    values=
    for file in $meters; do
        value=
        IFS= read -r value <"$file"
        case $value in '' | *[!0-9-]* | ???????????????????*) value=x ;; esac
        values="$values $value"
    done
    read -r answered _ </proc/uptime
    printf '{READING} %s %s%s\n' "$asked" "$answered" "$values"
}}
pause_between() {{  # until the next sample, with readings of meters
    pieces=1 pause=$1
    test "$meters" && pieces={_READINGS} pause=$2
    while :; do
        sleep $pause >/dev/null &
        wait $! || test "$over" || sleep 1
        pieces=$((pieces - 1))
        if test "$over" || test $pieces = 0; then return; fi
        read_meters
    done
}}
sample() {{
    echo {SAMPLE_BEGINS}
    first_lines {_EVERY_TIME}
    shown=
    extreme_clock -lt scaling_max_freq
    extreme_clock -gt scaling_cur_freq
    hottest
    if test "$1"; then
        first_lines "/proc/$1/stat"
        test -r "/proc/$1/cgroup" && find_groups "$1"
        for group in $groups; do
            chosen_lines "$group" nr_throttled throttled_time throttled_usec
        done
    fi
}}
watch() {{
    over=
    trap 'over=1' TERM
    count=0 meters=
    first_lines {_ONCE}
    find_cores "$1"
    if test "$2"; then
        find_meters
        tell_facts {_FACTS}
    fi
    test "$1" && chosen_lines "/proc/$1/status" Cpus_allowed_list:
    while :; do
        read_meters
        sample "$1"
        if test $((count % {_SELDOM})) = 0 || test "$over"; then ask_services; fi
        if test "$over" || ! test "$1" || ! kill -0 "$1"; then return; fi
        count=$((count + 1))
        if test $count -gt {_FREQUENT}; then
            pause_between {_LATE_S} {_LATE_S / _READINGS:g}
        else
            pause_between {INTERVAL_S} {METER_S:g}
        fi
    done
}} 2>/dev/null
"""
"""Functions of the shell. `watch PID METERED` samples until it gets TERM or the process is gone; `watch ''` takes one
sample. Constant files come first. Lines are `path:line` and `@name:line`, and, if METERED is not empty, those of
meters."""

WATCH = FUNCTIONS + '\nwatch "$1" "$2"\n'
"""Arguments: the process, or nothing; anything to read energy meters."""
SHELL = ("sh", "-c", WATCH, "phoneready")
NOT_LINUX = "this system has no /proc"
_ENDS_S = 5.0
"""How long the last look may take."""


class Watcher:
    """Looks at this machine from `watch` on until the end of the `with` block; `metered`: at energy meters, too.

    Attributes:
        text: What the looks saw, after the end.
        problem: Why there are none, if so.
    """

    def __init__(self, *, metered: bool = False) -> None:
        self.text, self.problem = "", ""
        self._metered = metered
        self._shell: subprocess.Popen[bytes] | None = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (closed at the end of the block)

    def __enter__(self) -> Watcher:
        return self

    def watch(self, pid: int) -> None:
        """Begin to look at a process."""
        command = [*SHELL, str(pid), *(["metered"] if self._metered else [])]
        try:
            self._shell = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._output, stderr=subprocess.DEVNULL
            )
        except OSError:
            self.problem = NOT_LINUX

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shell is not None:
            self._shell.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._shell.wait(_ENDS_S)
            self._shell.kill()
            self._shell.wait()
        self._output.seek(0)
        self.text = self._output.read().decode("utf-8", "replace")
        self._output.close()
