"""The script that looks at a machine while a process measures on it, for any POSIX shell.

It is the same here and on other machines. The shell itself reads the files: of programs, a look starts `sleep` alone.
What must be asked of a service (Android's dumpsys) is asked in the first, the last and every 20th look, since an answer
costs a hundred times as much as a file. Where energy is metered, glances at the meters come between the looks, and
before the process is started.
"""

from __future__ import annotations

from runtime_bench.conditions.meters.table import SOURCES
from runtime_bench.records.conditions import INTERVAL_S
from runtime_bench.records.energy import GLANCE_S

LOOK_BEGINS = "phoneready-look"
"""Line that a look begins with."""
ASKED = "@"
"""What begins the lines of an answer: `@NAME:line`."""
_SELDOM = 20
_FREQUENT = 3600
"""Looks that are taken at INTERVAL_S; after half an hour they are taken more seldom, or nobody could carry them."""
_LATE_S = 20
_GLANCES = round(INTERVAL_S / GLANCE_S)
"""At the meters, for each look."""
METERS, UNREADABLE, FACT, GLANCE, IDLE_OVER = "meters", "unreadable", "fact", "glance", "idle-over"
"""What begins lines on meters: the files in the order of their readings; a file that is there and may not be read; a
file that does not change, and its text; the uptime before and after a round of readings, and these; and the line that
says that the process begins."""

_ONCE = '"$base"/sys/class/power_supply/*/type "$base"/sys/class/power_supply/*/scope'
_EVERY_TIME = (
    "/proc/uptime /proc/stat "
    '"$base"/sys/class/power_supply/*/capacity "$base"/sys/class/power_supply/*/status '
    '"$base"/sys/class/power_supply/*/online '
    "/sys/firmware/acpi/platform_profile"
)

_FACTS = " ".join(f'"$base"{pattern}' for source in SOURCES.values() for pattern in source.facts)
_FIND = "\n".join(f"    {source.find.strip()}" for source in SOURCES.values() if source.find)

LOOKS = rf"""
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
    IFS= read -r line </proc/uptime && printf '{ASKED}battery_at:%s\n' "$line"
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
{_FIND}
    names=
    for file in $meters; do names="$names ${{file#"$base"}}"; done
    printf '{METERS}%s\n' "$names"
}}
tell_facts() {{
    for file do
        IFS= read -r line <"$file" && printf '{FACT} %s %s\n' "${{file#"$base"}}" "$line"
    done
}}
glance() {{
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
    printf '{GLANCE} %s %s%s\n' "$asked" "$answered" "$values"
}}
idle() {{  # glances before anything runs; as many as the argument says
    find_meters
    left=$1
    while test "$meters" && test $left -gt 0; do
        glance
        sleep {GLANCE_S:g} || {{ sleep 1 && left=$((left - 9)); }}
        left=$((left - 1))
    done
    glance
    echo {IDLE_OVER}
}} 2>/dev/null
pause_between() {{  # until the next look, with glances
    pieces=1 pause=$1
    test "$meters" && pieces={_GLANCES} pause=$2
    while :; do
        sleep $pause >/dev/null &
        wait $! || test "$over" || sleep 1
        pieces=$((pieces - 1))
        if test "$over" || test $pieces = 0; then return; fi
        glance
    done
}}
look() {{
    echo {LOOK_BEGINS}
    first_lines {_EVERY_TIME}
    shown=
    extreme_clock -lt scaling_max_freq
    extreme_clock -gt scaling_cur_freq
    hottest
    chosen_lines /proc/meminfo MemAvailable:
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
        glance
        look "$1"
        if test $((count % {_SELDOM})) = 0 || test "$over"; then ask_services; fi
        if test "$over" || ! test "$1" || ! kill -0 "$1"; then return; fi
        count=$((count + 1))
        if test $count -gt {_FREQUENT}; then
            pause_between {_LATE_S} {_LATE_S / _GLANCES:g}
        else
            pause_between {INTERVAL_S} {GLANCE_S:g}
        fi
    done
}} 2>/dev/null
"""
"""Functions of the shell. `watch PID METERED` looks until it gets TERM or the process is gone; `watch ''` takes one
look at none. What is there once comes before the first look. Lines are `path:line` and `@name:line`, and where METERED
is anything those of meters."""

WATCH = LOOKS + '\nwatch "$1" "$2"\n'
"""Arguments: the process, or nothing; anything for glances at meters."""
IDLE = LOOKS + '\nidle "$1"\n'
"""Argument: how many glances."""


def idle_glances(seconds: float) -> str:
    """The argument of `idle` for so long."""
    return str(max(1, round(seconds / GLANCE_S)))
