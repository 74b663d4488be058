"""What the runner can be built for, and building it: once for each source, target and compiler, kept in the cache.

A build is one program for one set of processor features, static unless it drives a GPU: llama.cpp chooses its kernels
when it is compiled. `runner_target_for` chooses between builds by the far machine's /proc/cpuinfo; the program refuses
to start if a feature is missing. llama.cpp's source comes out of the archive that llama-cpp-python is published as.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import ClassVar, NamedTuple

from cfsp.errors import InputError, look_up
from cfsp.files import atomic_file, made_once, sha256_file
from cfsp.models.builtin import DownloadError, cache_directory, download_distribution
from cfsp.progress import Progress, no_progress
from cfsp.records import read_record, write_record
from runtime_bench.environment import read_fact


@dataclass(frozen=True)
class RunnerTarget:
    """One way to build the runner."""

    system: str  # `linux` or `android`
    machine: str  # Instruction set, as `uname -m` says it
    needs: tuple[str, ...]  # Processor features that the kernels use, as /proc/cpuinfo names them
    cmake: tuple[str, ...]  # Options that set these features
    static: bool = True  # Whether the C library is linked in; Android's is always there and is not
    wants: str = ""  # What compiling it wants beside a compiler, for people


_NAMES = {"AMD64": "x86_64", "arm64": "aarch64"}
_MACHINE = _NAMES.get(platform.machine(), platform.machine())

_AVX2 = ("avx", "avx2", "bmi2", "f16c", "fma", "sse4_2")
_AVX2_FLAGS = tuple(
    f"-DGGML_{name}=ON" for name in ("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C")
)  # llama.cpp's own defaults hold only where it is not cross-compiled
_AVX512 = (*_AVX2, *(f"avx512{part}" for part in ("f", "cd", "bw", "dq", "vl", "vbmi", "_vnni")))
_AVX512_FLAGS = (*_AVX2_FLAGS, *(f"-DGGML_AVX512{part}=ON" for part in ("", "_VBMI", "_VNNI")))
_DOTPROD = ("asimd", "asimddp", "asimdhp", "atomics")
_ARM = (
    ("", _DOTPROD, "-DGGML_CPU_ARM_ARCH=armv8.2-a+dotprod+fp16"),
    ("-i8mm", (*_DOTPROD, "i8mm"), "-DGGML_CPU_ARM_ARCH=armv8.2-a+dotprod+fp16+i8mm"),
    ("-v8", (), "-DGGML_CPU_ARM_ARCH=armv8-a"),
)
"""Suffix of the name, processor features, option."""
_PORTABLE = "-DGGML_NATIVE=OFF"
_ABI_X86_64 = ("popcnt", "sse4_2")
# The NDK's OpenMP would be one more library to carry along; llama.cpp's own threads do the same.
_ANDROID = ("-DANDROID_PLATFORM=android-28", "-DANDROID_STL=c++_static", "-DGGML_OPENMP=OFF")


def _android(machine: str, abi: str, needs: tuple[str, ...], *flags: str) -> RunnerTarget:
    options = (_PORTABLE, *flags, f"-DANDROID_ABI={abi}", *_ANDROID)
    return RunnerTarget("android", machine, needs, options, static=False)


_KERNEL_FEATURES = frozenset(
    {*_AVX512, "avx512_bf16", "avx_vnni", "amx_int8", *_DOTPROD, "i8mm", "sve", "sve2"}
)
"""What kernels make use of, of all that a processor names."""


def cpu_features(cpuinfo: str | None = None) -> frozenset[str]:
    """What a processor names."""
    text = read_fact("/proc/cpuinfo") if cpuinfo is None else cpuinfo
    pairs = (line.partition(":") for line in text.splitlines())
    flags = next((value for key, _, value in pairs if key.strip() in ("flags", "Features")), "")
    return frozenset(flags.split())


RUNNER_TARGETS: MappingProxyType[str, RunnerTarget] = MappingProxyType(
    {
        "native": RunnerTarget(
            "linux", _MACHINE, tuple(sorted(_KERNEL_FEATURES & cpu_features())), ("-DGGML_NATIVE=ON",)
        ),
        "x86_64-linux": RunnerTarget("linux", "x86_64", _AVX2, (_PORTABLE, *_AVX2_FLAGS)),
        "x86_64-linux-avx512": RunnerTarget("linux", "x86_64", _AVX512, (_PORTABLE, *_AVX512_FLAGS)),
        **{
            f"aarch64-linux{suffix}": RunnerTarget("linux", "aarch64", needs, (_PORTABLE, arch))
            for suffix, needs, arch in _ARM
        },
        **{
            f"android-arm64{suffix}": _android("aarch64", "arm64-v8a", needs, arch)
            for suffix, needs, arch in _ARM
        },
        "android-x86_64": _android("x86_64", "x86_64", _ABI_X86_64, "-DGGML_SSE42=ON"),
    }
)
"""Names of what can be built. `native` is for this machine's processor and no other: the same features as
llama-cpp-python's own build; the other builds are portable."""


RUNNER_BACKENDS: MappingProxyType[str, tuple[tuple[str, ...], str]] = MappingProxyType(
    {
        "vulkan": (
            ("-DGGML_VULKAN=ON",),
            "Debian's packages libvulkan-dev, glslc and spirv-headers, or the Vulkan SDK",
        ),
        "opencl": (
            ("-DGGML_OPENCL=ON", "-DGGML_OPENCL_EMBED_KERNELS=ON"),
            "Debian's packages ocl-icd-opencl-dev and opencl-headers, or another OpenCL loader",
        ),
    }
)
"""What may compute beside the processor, by llama.cpp's name in small letters: options that compile it in, and what
compiling it wants, for people. Its OpenCL is for Adreno's and Intel's."""


def require_target(name: str, backend: str | None = None) -> RunnerTarget:
    """A row of RUNNER_TARGETS, with one of RUNNER_BACKENDS compiled in.

    What drives a GPU is loaded when the program runs, so that the C library cannot be linked in. Raises
    InputError: unknown name.
    """
    row = look_up(RUNNER_TARGETS, name, "unknown target", field="target")
    if backend is None:
        return row
    cmake, wants = look_up(RUNNER_BACKENDS, backend, "unknown backend", field="backend")
    return replace(row, cmake=(*row.cmake, *cmake), static=False, wants=wants)


def runner_target_for(system: str, machine: str, features: Collection[str]) -> str:
    """The build that makes most of a machine. Raises InputError: no build runs there."""
    alike = _NAMES.get(machine, machine)
    fitting = {
        name: len(row.needs)
        for name, row in RUNNER_TARGETS.items()
        if (row.system, row.machine) == (system, alike) and set(row.needs) <= set(features)
    }
    if not fitting:
        machines = sorted({f"{row.machine} {row.system}" for row in RUNNER_TARGETS.values()})
        raise InputError(
            "no build of the runner is for this machine",
            value=f"{machine} {system}",
            allowed=f"{', '.join(machines)}; on x86_64 linux with AVX2",
        )
    return max(fitting, key=lambda name: fitting[name])


_HERE = Path(__file__).parent
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
_DISTRIBUTION = "llama-cpp-python"
_DEFAULT_VERSION = "0.3.36"
ALLOWED = "PHONEREADY_LLAMA_SHA256"
"""Variable with the hash of an archive that is trusted besides those that are known."""
_KNOWN = _HERE / "llama_source.sha256"
"""Archives whose content is known, as sha256sum writes them; tools/llama_wheel.py reads it, too."""
_WANTED = ("CMakeLists.txt", "LICENSE", "cmake", "ggml", "include", "licenses", "src", "vendor")
"""What of llama.cpp's folder the libraries are compiled from."""
_NDK_TOOLCHAIN = Path("build") / "cmake" / "android.toolchain.cmake"


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
    size_bytes: int
    build_s: float  # Unpacking and compiling
    backend: str | None = None  # Key of RUNNER_BACKENDS, of what may compute beside the processor

    @property
    def name(self) -> str:
        """Of what it was built for."""
        return f"{self.target}-{self.backend}" if self.backend else self.target


class LlamaSource(NamedTuple):
    """A source archive."""

    path: Path
    version: str  # Of llama-cpp-python
    sha256: str


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
        backend: Key of RUNNER_BACKENDS; None for the processor only.
        ndk: Folder of the Android NDK, for Android's targets.
        progress: Told as steps are done.

    Raises:
        InputError: Unknown target or backend, no compiler, no source, or it does not compile.
    """
    row, name = require_target(target, backend), f"{target}-{backend}" if backend else target
    cmake, options, compiler = find_toolchain(target, ndk)
    source = fetch_source(progress)
    facts = {
        "sources": {file: sha256_file(_HERE / file) for file in _SOURCES},
        "llama": source.sha256,
        "options": [*_FLAGS, *row.cmake, str(row.static)],
        "needs": row.needs,
        "compiler": compiler,
    }
    key = hashlib.sha256(json.dumps([name, facts], sort_keys=True).encode()).hexdigest()[:16]

    def make(place: Path) -> None:
        start, step = time.monotonic(), f"building the runner for {name}"
        with tempfile.TemporaryDirectory(prefix="build-", dir=place) as work:
            build = Path(work) / "build"
            progress(step, 0, 1)
            llama = extract_llama(source, Path(work))
            configure = [cmake, "-S", str(_HERE), "-B", str(build), *options, *_FLAGS, *row.cmake]
            configure += [f"-DLLAMA_SOURCE={llama}", f"-DRUNNER_TARGET={name}", f"-DRUNNER_KEY={key}"]
            configure += [f"-DRUNNER_NEEDS={' '.join(row.needs)}"]
            configure += [f"-DRUNNER_STATIC={'ON' if row.static else 'OFF'}"]
            _run(configure, step, no_progress, row.wants)
            _run([cmake, "--build", str(build), "--target", _PROGRAM], step, progress, row.wants)
            progress(step, 1, 1)
            shutil.copy2(build / _PROGRAM, place / _PROGRAM)
        record = RunnerBuild(
            target=target,
            key=key,
            needs=row.needs,
            source=source.version,
            source_sha256=source.sha256,
            compiler=compiler,
            cmake=(*_FLAGS, *row.cmake),
            sha256=sha256_file(place / _PROGRAM),
            size_bytes=(place / _PROGRAM).stat().st_size,
            build_s=round(time.monotonic() - start, 1),
            backend=backend,
        )
        write_record(place / _RECORD, record)

    return made_once(cache_directory() / "runners" / f"{name}-{key}", is_whole, make) / _PROGRAM


def is_whole(folder: Path) -> bool:
    """Whether the program there is the one that was built."""
    program = folder / _PROGRAM
    try:
        return program.is_file() and read_build(program).sha256 == sha256_file(program)
    except InputError:
        return False


def read_build(program: Path) -> RunnerBuild:
    """What a program that `build_runner` gave was made from. Raises InputError: no record lies beside it."""
    return read_record(RunnerBuild, program.parent / _RECORD)


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
        # The compiler's own words if there are some; CMake's first line about an error only says where it is.
        telling = (line for mark in ("error: ", "Error", "") for line in lines if line and mark in line)
        reason = next(telling, "no output")
        raise InputError(f"{step} failed with status {process.returncode}: {reason}", allowed=wants)


def fetch_source(progress: Progress = no_progress) -> LlamaSource:
    """The archive of the llama-cpp-python that is installed, or else of the version that is known here.

    It is kept in the cache, where the environment's own build (tools/llama_wheel.py) leaves it too. Raises
    InputError: it cannot be fetched, or is not known by its hash.
    """
    try:
        version = importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        version = _DEFAULT_VERSION
    path = cache_directory() / "wheels" / f"llama_cpp_python-{version}.tar.gz"
    if not path.is_file():
        requirement = f"{_DISTRIBUTION}=={version}"
        progress(f"fetching the source of {_DISTRIBUTION}", 0, 1)
        with tempfile.TemporaryDirectory(prefix="phoneready-") as scratch:
            try:
                archive = download_distribution(
                    requirement, Path(scratch), "--no-binary", _DISTRIBUTION, pattern="*.tar.gz"
                )
            except DownloadError as error:
                why = f"the source of {requirement} could not be fetched from PyPI by pip: {error}"
                raise InputError(why) from error
            with atomic_file(path) as temporary:
                shutil.copyfile(archive, temporary)
        progress(f"fetching the source of {_DISTRIBUTION}", 1, 1)
    sha256 = sha256_file(path)
    pairs = (line.split() for line in _KNOWN.read_text(encoding="ascii").splitlines())
    known = {name: digest for digest, name in pairs}
    if sha256 not in (known.get(path.name), os.environ.get(ALLOWED)):
        raise InputError(
            f"{path} is not an archive that is known here",
            field="sha256",
            value=sha256,
            allowed=f"{', '.join(map(' '.join, known.items()))}, or what {ALLOWED} says",
        )
    return LlamaSource(path, version, sha256)


def extract_llama(source: LlamaSource, folder: Path) -> Path:
    """Unpack what the libraries are compiled from into `folder`; returns llama.cpp's own folder there. Raises
    InputError: the archive is damaged, or carries no llama.cpp."""
    place = PurePosixPath(source.path.name.removesuffix(".tar.gz")) / "vendor" / "llama.cpp"
    wanted = [place / name for name in _WANTED]
    try:
        with tarfile.open(source.path) as archive:
            members = [m for m in archive if any(map(PurePosixPath(m.name).is_relative_to, wanted))]
            archive.extractall(folder, members, filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"{source.path} cannot be unpacked: {error}") from error
    llama_folder = folder / place
    if not (llama_folder / "CMakeLists.txt").is_file():
        raise InputError(f"{source.path} carries no llama.cpp")
    return llama_folder


def find_toolchain(target: str, ndk: Path | None = None) -> tuple[str, tuple[str, ...], str]:
    """CMake, its options that choose the compiler for a target, and the compiler's own line about itself.
    Raises InputError: unknown target, or something is missing or is not what it should be."""
    row = require_target(target)
    if ndk is not None and row.system != "android":
        android = ", ".join(name for name, one in RUNNER_TARGETS.items() if one.system == "android")
        raise InputError("an NDK is for Android's targets", field="ndk", value=str(ndk), allowed=android)
    options: tuple[str, ...] = ()
    if row.system == "android":
        if ndk is None:
            raise InputError(
                "Android's targets want the Android NDK", field="ndk", allowed="the folder of an NDK"
            )
        toolchain, properties = ndk.resolve() / _NDK_TOOLCHAIN, ndk / "source.properties"
        if not toolchain.is_file() or not properties.is_file():
            allowed = f"a folder with source.properties and {_NDK_TOOLCHAIN.as_posix()}"
            raise InputError("not an Android NDK", field="ndk", value=str(ndk), allowed=allowed)
        text = properties.read_text(encoding="utf-8", errors="replace")
        revision = re.search(r"^\s*Pkg\.Revision\s*=(.*)$", text, re.MULTILINE)
        version = f"NDK {revision[1].strip() if revision else 'unknown'}"
        options = (f"-DCMAKE_TOOLCHAIN_FILE={toolchain}",)
    elif sys.platform != "linux":
        raise InputError("Linux programs are built on Linux", field="target", value=target)
    else:
        # As CMake chooses it: CXX may name options as well.
        command, package = shlex.split(os.environ.get("CXX", "")) or ["c++"], "g++"
        if row.machine != RUNNER_TARGETS["native"].machine:
            prefix = f"{row.machine}-linux-gnu-"
            command, package = [f"{prefix}g++"], f"g++-{row.machine.replace('_', '-')}-linux-gnu"
            options = (
                "-DCMAKE_SYSTEM_NAME=Linux",
                f"-DCMAKE_SYSTEM_PROCESSOR={row.machine}",
                f"-DCMAKE_C_COMPILER={prefix}gcc",
                f"-DCMAKE_CXX_COMPILER={prefix}g++",
            )
        if shutil.which(command[0]) is None:
            raise InputError(
                f"no compiler {command[0]} on this {platform.machine()} machine",
                allowed=f"Debian's package {package}",
            )
        result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
        version = next(iter(result.stdout.splitlines()), "unknown").strip()
    cmake = shutil.which("cmake")
    if cmake is None:
        raise InputError("cmake is not installed; the runner is built with it", allowed="pip install cmake")
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    return cmake, (*generator, *options), version
