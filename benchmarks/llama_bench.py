"""Hold our pp and tg against llama.cpp's own llama-bench, on the same file, alternately.

    python benchmarks/llama_bench.py MODEL.gguf [-p 512] [-n 128] [-t 1,2] [-r 10] [--native]

llama-bench is built once, from the source inside llama-cpp-python's sdist in the installed version, with the
wheel's build type and llama.cpp's default options (CMAKE_ARGS is honoured as it is there). It is kept in the
cache folder. Needs cmake and a C++ compiler; the build takes some minutes. It loads the library files of the wheel,
those that our worker loads: two copies of the same library differ by as much as 10 %, since a copy's pages lie
elsewhere in memory. --native measures in the native runner, which is linked statically, so that this cannot be had.

Each round runs llama-bench with one repetition, then our worker with one, each in a process of its own with
its own warm-up, so that slow drift of the machine meets both alike. The table goes to stdout, progress to
stderr. Exit status 1: an interval lies wholly outside the tolerance.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cfsp.errors import InputError, LimitError, MissingExtraError
from cfsp.files import atomic_directory, sha256_file
from cfsp.models.builtin import cache_directory
from phoneready.console import errors_as_exit_status
from runtime_bench.environment import describe_environment
from runtime_bench.measuring.measure import run_bench
from runtime_bench.native.build import build_runner, fetch_source
from runtime_bench.records import summary
from runtime_bench.targets import LOCAL, Target
from runtime_bench.targets.local import Native
from runtime_bench.workload import BenchSettings, Workload, default_threads

DISTRIBUTION = "llama-cpp-python"
BINARY = "llama-bench"
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    f"-DCMAKE_INSTALL_RPATH={'@loader_path' if sys.platform == 'darwin' else '$ORIGIN'}",
)
"""The wheel's build type and llama.cpp's defaults otherwise; libraries are found beside the program, so that
it may be moved out of the build tree."""


LlamaBench = Callable[[Path, Workload, int], dict[str, object]]
"""(model, workload, threads) -> one repetition of llama-bench."""


@dataclass
class Row:
    """Samples of one workload and thread count, in rounds."""

    test: str
    threads: int
    theirs_ns: list[int] = field(default_factory=list)
    ours_ns: list[int] = field(default_factory=list)


def installed_version() -> str:
    """Version of llama-cpp-python in this environment."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtraError(DISTRIBUTION, "gguf") from None


def built_llama_bench(jobs: int) -> Path:
    """The built program, from the cache or built now.

    Raises:
        InputError: No compiler, no sdist, or a build that fails.
    """
    version = installed_version()
    home = cache_directory() / BINARY / f"{version}-{sys.platform}-{platform.machine()}"
    binary = home / BINARY
    if binary.is_file():
        return binary
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            raise InputError(f"{tool} is needed to build {BINARY} and is not installed")
    sdist = fetch_source().path
    home.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=home.parent) as scratch,
        atomic_directory(home, force=True) as output,
    ):
        build(sdist, Path(scratch), output, jobs)
    return binary


def build(sdist: Path, scratch: Path, output: Path, jobs: int) -> None:
    """Build the program in `scratch` and put it and its libraries into `output`."""
    say(f"building {BINARY} from {sdist.name} (once, some minutes)")
    with tarfile.open(sdist) as archive:
        archive.extractall(scratch, filter="data")
    source = next(scratch.glob("*/vendor/llama.cpp"))
    tree = scratch / "build"
    extra = shlex.split(os.environ.get("CMAKE_ARGS", ""))
    run(["cmake", "-S", str(source), "-B", str(tree), *OPTIONS, *extra])
    run(["cmake", "--build", str(tree), "--config", "Release", "--target", BINARY, "-j", str(jobs)])
    for file in sorted((tree / "bin").rglob("*")):
        if file.is_file():
            shutil.copy2(file, output / file.name, follow_symlinks=True)


def run(command: list[str]) -> None:
    """Run a build step; its output is shown only when it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stdout[-8000:])
        raise InputError(f"{shlex.join(command)} failed with status {done.returncode}")


def our_libraries() -> dict[str, str]:
    """The environment in which a program loads the very library files that our worker loads."""
    package = importlib.util.find_spec("llama_cpp")
    assert package is not None
    assert package.origin is not None
    path = "DYLD_LIBRARY_PATH" if sys.platform == "darwin" else "LD_LIBRARY_PATH"
    return os.environ | {path: str(Path(package.origin).parent / "lib")}


def theirs(
    binary: Path, environment: Mapping[str, str], model: Path, workload: Workload, threads: int
) -> dict[str, object]:
    """One repetition of llama-bench, as its JSON says."""
    sizes = ["-p", str(workload.n_prompt), "-n", str(workload.n_gen)]
    command = [str(binary), "-m", str(model), *sizes, "-t", str(threads), "-r", "1", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise InputError(f"{BINARY} failed on {model}: {done.stderr.strip().splitlines()[-1:]}")
    (entry,) = json.loads(done.stdout)
    return dict(entry)


def ours(model: Path, workload: Workload, threads: int, target: Target) -> tuple[int, ...]:
    """One repetition of our worker: its samples in nanoseconds."""
    settings = BenchSettings(
        n_prompt=(workload.n_prompt,),
        n_gen=(workload.n_gen,),
        ttft=(),
        load=False,
        repetitions=1,
        n_threads=(threads,),
    )
    (record,) = run_bench([model], settings, target=target)
    if not record.ok:
        raise InputError(f"{workload.test} on {model} failed: {record.failure}")
    return record.samples_ns


def alternate(
    llama_bench: LlamaBench,
    model: Path,
    workloads: list[Workload],
    threads: tuple[int, ...],
    rounds: int,
    target: Target,
) -> tuple[list[Row], set[str]]:
    """Rounds of llama-bench and ours; also the revisions of llama.cpp that took part."""
    rows = {(w, t): Row(w.test, t) for t in threads for w in workloads}
    revisions: set[str] = set()
    for number in range(rounds):
        for (workload, count), row in rows.items():
            entry = llama_bench(model, workload, count)
            row.theirs_ns += [int(ns) for ns in entry["samples_ns"]]  # type: ignore[attr-defined]
            row.ours_ns += ours(model, workload, count, target)
            revisions.add(str(entry["build_commit"]))
        say(f"round {number + 1} of {rounds}")
    return list(rows.values()), revisions


def report(model: Path, rows: list[Row], revisions: set[str], tolerance: float) -> tuple[str, bool]:
    """The Markdown text, and whether every interval touches the tolerance."""
    machine = describe_environment()
    lines = [
        f"{model.name}, {model.stat().st_size / 2**20:.1f} MiB, sha256 {sha256_file(model)[:16]}",
        f"{machine.cpu_model}, {machine.cpus_usable} cores, load average {machine.load_average}; "
        f"llama.cpp {', '.join(sorted(revisions))} ({DISTRIBUTION} {installed_version()}); "
        f"{len(rows[0].ours_ns)} rounds, alternating",
        "",
        "| test | threads | llama-bench t/s | phoneready t/s | ours / llama-bench | 95% interval |",
        "|------|--------:|----------------:|---------------:|-------------------:|-------------:|",
    ]
    agree = True
    for row in rows:
        # Speeds are inverse to times, so ours / theirs in speed is theirs / ours in time.
        found = summary.ratio_interval(row.theirs_ns, row.ours_ns, paired=True)
        agree &= found.low <= 1 + tolerance and found.high >= 1 / (1 + tolerance)
        tokens = int("".join(c for c in row.test if c.isdigit()))
        speeds = " | ".join(rate(samples, tokens) for samples in (row.theirs_ns, row.ours_ns))
        interval = f"{found.low:.3f} to {found.high:.3f}"
        lines.append(f"| {row.test} | {row.threads} | {speeds} | {found.ratio:.3f} | {interval} |")
    return "\n".join(lines) + "\n", agree


def rate(samples_ns: list[int], tokens: int) -> str:
    """Mean and deviation of tokens per second, as llama-bench prints them."""
    speeds = [1e9 * tokens / ns for ns in samples_ns]
    deviation = summary.stdev(speeds)
    return f"{summary.mean(speeds):.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")


def say(message: str) -> None:
    """Progress."""
    print(message, file=sys.stderr, flush=True)


def sizes(text: str) -> tuple[int, ...]:
    """Comma-separated whole numbers."""
    return tuple(int(part) for part in text.split(","))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments, named as llama-bench names them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("-p", "--n-prompt", type=sizes, default=(512,), help="prompt sizes (512)")
    parser.add_argument("-n", "--n-gen", type=sizes, default=(128,), help="generation sizes (128)")
    parser.add_argument("-t", "--threads", type=sizes, default=(), help="thread counts (all cores)")
    parser.add_argument("-r", "--rounds", type=int, default=10, help="rounds (10)")
    parser.add_argument("--tolerance", type=float, default=0.05, help="see exit status (default 0.05)")
    parser.add_argument("-j", "--jobs", type=int, default=default_threads(), help="parallel compilers")
    parser.add_argument("--native", action="store_true", help="measure in the native runner, not in Python")
    parser.add_argument("--llama-bench", type=Path, help="use this program instead of building one")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Build, measure, print."""
    arguments = parse(argv)
    with errors_as_exit_status():
        if not arguments.model.is_file():
            raise InputError(f"no such file: {arguments.model}")
        if arguments.rounds < 1:
            raise InputError("out of range", field="rounds", value=arguments.rounds, allowed="1 or more")
        binary = arguments.llama_bench or built_llama_bench(arguments.jobs)
        environment = os.environ if arguments.llama_bench or arguments.native else our_libraries()
        workloads = [Workload("pp", n_prompt=n) for n in arguments.n_prompt if n]
        workloads += [Workload("tg", n_gen=n) for n in arguments.n_gen if n]
        threads = arguments.threads or (default_threads(),)
        target = Native(build_runner("native")) if arguments.native else LOCAL
        bench = partial(theirs, binary, environment)
        rows, revisions = alternate(bench, arguments.model, workloads, threads, arguments.rounds, target)
        text, agree = report(arguments.model, rows, revisions, arguments.tolerance)
        sys.stdout.write(text)
        if not agree:
            raise LimitError(f"the two differ by more than {arguments.tolerance:.0%}")


if __name__ == "__main__":
    main()
