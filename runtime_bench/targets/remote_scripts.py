"""What runs on the other machine: scripts for any POSIX shell, dash, bash, busybox and Android's mksh among them.

They use what toybox and busybox have, too: cat, chmod, grep, kill, mkdir, mv, nproc, rm, rmdir, sha256sum, sleep and
uname.
Names come in as arguments and are only ever used inside double quotes.
"""

from __future__ import annotations

from runtime_bench.conditions.script import FUNCTIONS
from runtime_bench.environment import FACT_FILES

FACTS_FOLLOW = "phoneready-facts"
"""Line after which the facts come; a login script may have written before it."""
LOOKS_FOLLOW = "phoneready-looks"
"""Line after which the looks come that were taken beside a run."""
NO_PROGRAM = 69
"""Status of a script that lacks a program there."""
MISMATCH = 65
"""Status of a push whose bytes there are not those that were sent."""

DESCRIBE = f"""
echo {FACTS_FOLLOW}
folder=$1
test "$folder" || folder=${{XDG_CACHE_HOME:-$HOME/.cache}}/phoneready/pushed
echo "folder=$folder"
echo "system=$(uname -s)"
echo "machine=$(uname -m)"
echo "release=$(uname -r)"
unset OMP_NUM_THREADS OMP_THREAD_LIMIT  # nproc heeds them
echo "cores=$(nproc 2>/dev/null)"
if command -v getprop >/dev/null; then
    echo "abi=$(getprop ro.product.cpu.abi)"
    echo "android=$(getprop ro.build.version.release)"
    echo "device=$(getprop ro.product.manufacturer) $(getprop ro.product.model)"
    echo "emulator=$(getprop ro.boot.qemu)$(getprop ro.kernel.qemu)"
    echo "soc=$(getprop ro.soc.manufacturer) $(getprop ro.soc.model)"
fi
grep '' /dev/null {" ".join(FACT_FILES)} 2>/dev/null
true
"""
"""Arguments: folder, or nothing. Lines `name=value`, then `path:line` of each file with facts."""

CHECK = f"""
command -v sha256sum >/dev/null || exit {NO_PROGRAM}
while test $# -gt 1; do
    sum=$(sha256sum <"$1" 2>/dev/null)
    case $sum in "$2 "*) echo same ;; *) echo other ;; esac
    shift 2
done
"""
"""Arguments: path, SHA-256, path, SHA-256, ... One line each: `same`, or `other` where the file is not there or not
that."""

PUSH = f"""
trap '' HUP
umask 077
mkdir -p "${{1%/*}}" || exit
for part in "${{1%/*}}"/.part-*; do
    kill -0 "${{part##*-}}" 2>/dev/null || rm -f "$part"  # of one that was killed
done
part=${{1%/*}}/.part-$$
cat >"$part"
status=$?
if test $status = 0; then
    status={MISMATCH}
    sum=$(sha256sum <"$part")
    case $sum in "$2 "*) chmod 700 "$part" && mv -f "$part" "$1" && exit ;; esac
fi
rm -f "$part"
exit $status
"""
"""Arguments: path, SHA-256; stdin: the file. It gets its name only when all of it is there and is what was sent. A
connection that breaks looks like the end of the file: then the sum is another one."""

RUN = f"""
{FUNCTIONS}
trap '' HUP PIPE  # what was begun is ended, whoever listens
exec 3<&0
IFS= read -r request || exit
seen=$1/.looks-$$
metered=$2
shift 2
rm -f "$seen"
printf '%s\\n' "$request" 2>/dev/null | "$@" 3<&- &  # a program may end before it reads
program=$!
{{ watch $program "$metered" 3<&- </dev/null >>"$seen"; }} 2>/dev/null &
looker=$!
(
    while read -r _ <&3; do :; done
    kill -9 $program
) >/dev/null 2>&1 &
watcher=$!
exec 3<&-
wait $program
status=$?
# Some shells say of what is killed that it was, and looks at what ended at once may not have begun; the last word is
# the program's. Android's mksh may lose a TERM that comes just before it reads.
{{ kill -9 $watcher; kill $looker; wait $watcher $looker; }} 2>/dev/null
echo
echo {LOOKS_FOLLOW}
cat "$seen" 2>/dev/null
rm -f "$seen"
exit $status
"""
"""Arguments: a writable folder; anything to read energy meters, or nothing; a program and its arguments. Stdin: one
line, and nothing more for as long as somebody waits. When stdin ends, because the client or the connection is gone, the
program is killed. Samples of conditions go to a file in the folder, which follows the program's output."""

HAVE_PACKAGES = f"""
command -v "$1" >/dev/null || exit {NO_PROGRAM}
program=$1
shift
"$program" -c 'import importlib.util, sys
old = ["python"] if sys.version_info < (3, 11) else []
print(*old, *(name for name in sys.argv[1:] if not importlib.util.find_spec(name)))' "$@"
"""
"""Arguments: a Python, packages. The last line names those that it lacks, `python` where it is too old itself."""

FORGET = """
rm -rf "$@"
"""
"""Arguments: folders that files were pushed to."""

CLEAN = """
test -d "$1" || exit 0
for entry in "$1"/* "$1"/.[!.]*; do
    name=${entry##*/}
    test -e "$entry" || continue
    case $name in
    .looks-*) rm -f "$entry" && continue ;;  # of a run that was killed
    *[!0-9a-f]*) ;;
    *) test ${#name} = 64 && rm -rf "$entry" && echo "removed $name" && continue ;;
    esac
    echo "left $name"
done
rmdir "$1" 2>/dev/null
true
"""
"""Arguments: folder. Removes what was pushed, which is known by its name, and the folder if nothing else is in it. A
line for each thing: `removed NAME`, or `left NAME`."""
