"""Building the runner: once for each source, target and compiler; kept in the cache, never half."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cfsp.errors import InputError
from cfsp.files import made_once, sha256_file
from cfsp.models.builtin import cache_directory
from cfsp.progress import Progress, no_progress
from cfsp.records import read_record, write_record
from runtime_bench.native.source import LlamaSource, extract_llama, fetch_source
from runtime_bench.native.targets import RunnerTarget, require_target
from runtime_bench.native.toolchain import Toolchain, find_toolchain

_SOURCES = (
    "CMakeLists.txt",
    "llama_log.hpp",
    "machine.hpp",
    "python_random.hpp",
    "questions.hpp",
    "runner.cpp",
    "session.hpp",
)
_PROGRAM = "phoneready-runner"
_RECORD = "build.json"
_STEP = re.compile(r"^\[\s*(\d+)(?:/(\d+)|%)\]")
"""How Ninja ([3/76]) and make ([ 4%]) count."""
_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    *(f"-DCMAKE_{lang}_FLAGS_RELEASE=-O2 -DNDEBUG" for lang in ("C", "CXX")),
)


@dataclass(frozen=True)
class RunnerBuild:
    """What a built runner was made from."""

    KIND: ClassVar[str] = "runner_build"
    SCHEMA_VERSION: ClassVar[int] = 1

    target: str  # Key of RUNNER_TARGETS
    key: str  # Hash of everything it was made from
    needs: tuple[str, ...]  # Processor features without which it refuses to run
    source: str  # Version of llama-cpp-python whose llama.cpp it is
    source_sha256: str  # Of that archive
    compiler: str  # The compiler's own line about itself
    cmake: tuple[str, ...]  # Options that were given to CMake
    sha256: str  # Of the program
    size_bytes: int  # Of the program
    build_s: float  # Seconds that unpacking and compiling took
    # Key of RUNNER_BACKENDS, of what may compute beside the processor; None where nothing does
    backend: str | None = None

    @property
    def name(self) -> str:
        """Of what it was built for."""
        return _name(self.target, self.backend)


def build_runner(
    target: str,
    *,
    backend: str | None = None,
    ndk: Path | None = None,
    progress: Progress = no_progress,
) -> Path:
    """The runner for a target, from the cache or built now, which takes minutes.

    A build is known by the hash of the runner's and llama.cpp's sources, the target's options, the compiler, and for
    `native` the processor. It comes into the cache by one rename, together with the hash of the program, which is
    checked whenever it is served.

    Args:
        target: Key of RUNNER_TARGETS.
        backend: Key of RUNNER_BACKENDS; None for the processor alone.
        ndk: Folder of the Android NDK, for Android's targets.
        progress: Told as steps are done.

    Raises:
        InputError: Unknown target or backend, no compiler, no source, or it does not compile.
    """
    row, name = require_target(target, backend), _name(target, backend)
    toolchain = find_toolchain(target, ndk)
    source = fetch_source(progress)
    key = _key(name, row, source, toolchain)

    def make(place: Path) -> None:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="build-", dir=place) as work:
            program = _compile(name, row, key, source, toolchain, Path(work), progress)
            shutil.copy2(program, place / _PROGRAM)
        record = RunnerBuild(
            target=target,
            key=key,
            needs=row.needs,
            source=source.version,
            source_sha256=source.sha256,
            compiler=toolchain.version,
            cmake=(*_FLAGS, *row.cmake),
            sha256=sha256_file(place / _PROGRAM),
            size_bytes=(place / _PROGRAM).stat().st_size,
            build_s=round(time.monotonic() - start, 1),
            backend=backend,
        )
        write_record(place / _RECORD, record)

    return made_once(cache_directory() / "runners" / f"{name}-{key}", _is_whole, make) / _PROGRAM


def read_build(program: Path) -> RunnerBuild:
    """What a program that `build_runner` gave was made from.

    Raises:
        InputError: No record lies beside it.
    """
    return read_record(RunnerBuild, program.parent / _RECORD)


def _name(target: str, backend: str | None) -> str:
    return f"{target}-{backend}" if backend else target


def _key(name: str, row: RunnerTarget, source: LlamaSource, toolchain: Toolchain) -> str:
    here = Path(__file__).parent
    facts = {
        "sources": {file: sha256_file(here / file) for file in _SOURCES},
        "llama": source.sha256,
        "options": [*_FLAGS, *row.cmake, str(row.static)],
        "needs": row.needs,
        "compiler": toolchain.version,
    }
    return hashlib.sha256(json.dumps([name, facts], sort_keys=True).encode()).hexdigest()[:16]


def _is_whole(folder: Path) -> bool:
    program = folder / _PROGRAM
    try:
        return program.is_file() and read_build(program).sha256 == sha256_file(program)
    except InputError:
        return False


def _compile(
    name: str,
    row: RunnerTarget,
    key: str,
    source: LlamaSource,
    toolchain: Toolchain,
    work: Path,
    progress: Progress,
) -> Path:
    build, step = work / "build", f"building the runner for {name}"
    progress(step, 0, 1)
    llama = extract_llama(source, work)
    configure = [toolchain.cmake, "-S", str(Path(__file__).parent), "-B", str(build)]
    configure += [*toolchain.options, *_FLAGS, *row.cmake]
    configure += [f"-DLLAMA_SOURCE={llama}", f"-DRUNNER_TARGET={name}", f"-DRUNNER_KEY={key}"]
    configure += [f"-DRUNNER_NEEDS={' '.join(row.needs)}", f"-DRUNNER_STATIC={'ON' if row.static else 'OFF'}"]
    _run(configure, step, no_progress, row.wants)
    _run([toolchain.cmake, "--build", str(build), "--target", _PROGRAM], step, progress, row.wants)
    progress(step, 1, 1)
    return build / _PROGRAM


def _run(command: Sequence[str], step: str, progress: Progress, wants: str) -> None:
    """Run a tool to its end; its lines become progress, or the reason why it failed, beside what it may want."""
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    lines: deque[str] = deque(maxlen=400)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"CMAKE_BUILD_PARALLEL_LEVEL": jobs},
        start_new_session=True,  # so that the compilers can be ended together with what started them
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.strip())
                count = _STEP.match(line)
                if count:
                    done, total = int(count[1]), int(count[2] or 100)
                    progress(step, min(done, total - 1), total)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise InputError(f"{step} failed with status {process.returncode}: {_reason(lines)}", allowed=wants)


def _reason(lines: Iterable[str]) -> str:
    """The compiler's own words where there are some; CMake's first line about an error only says where it is."""
    for telling in ("error: ", "Error", ""):
        for line in lines:
            if line and telling in line:
                return line
    return "no output"
