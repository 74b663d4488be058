"""Install llama-cpp-python from a wheel that is compiled once a machine and kept outside the checkout.

llama-cpp-python comes as source only and takes minutes to compile, for the processor it is compiled on. The
wheel is therefore kept under `<cache>/wheels/<python tag>-<hash of processor and CMAKE_ARGS>/`, and the
source archive it was made from under `<cache>/wheels/`; a second environment then installs in seconds.
Run by the Makefile with the environment's own Python: `python tools/llama_wheel.py`.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import parse_sdist_filename, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
KNOWN = ROOT / "runtime_bench" / "native" / "llama_source.sha256"
PACKAGE = "llama-cpp-python"
# The image-input library is half of the compile time and nothing here uses it.
DEFAULT_CMAKE_ARGS = "-DLLAVA_BUILD=OFF"
CPU_KEYS = ("flags", "Features", "CPU implementer", "CPU part", "isa")


def requirement() -> Requirement:
    """The version range that pyproject.toml's `gguf` extra asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = map(Requirement, project["optional-dependencies"]["gguf"])
    return next(item for item in wanted if item.name == PACKAGE)


def cache_directory() -> Path:
    """The same folder as `cfsp.models.builtin.cache_directory`, whose dependencies may not be installed yet."""
    own = os.environ.get("PHONEREADY_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "phoneready"


def processor_features() -> str:
    """What the compiler's -march=native depends on, as text."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        pairs = (line.partition(":") for line in lines)
        found = {f"{key.strip()}={value.strip()}" for key, _, value in pairs if key.strip() in CPU_KEYS}
    elif sys.platform == "darwin":
        query = ["sysctl", "-n", "machdep.cpu.brand_string"]
        found = {subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()}
    else:
        found = {platform.processor()}
    return "\n".join([sys.platform, platform.machine(), *sorted(found)])


def wheel_directory(wheels: Path, cmake_args: str) -> Path:
    """Folder of the wheels that fit this Python, this processor and these build options."""
    digest = hashlib.sha256(f"{processor_features()}\n{cmake_args}".encode()).hexdigest()[:12]
    return wheels / f"cp{sys.version_info.major}{sys.version_info.minor}-{digest}"


def newest_wheel(directory: Path, wanted: Requirement) -> Path | None:
    """The newest wheel in `directory` inside the wanted range."""
    fitting = {parse_wheel_filename(path.name)[1]: path for path in directory.glob("llama_cpp_python-*.whl")}
    versions = [version for version in fitting if version in wanted.specifier]
    return fitting[max(versions)] if versions else None


def newest_sdist(wheels: Path, wanted: Requirement) -> Path | None:
    """The newest kept source archive inside the wanted range."""
    fitting = {parse_sdist_filename(path.name)[1]: path for path in wheels.glob("llama_cpp_python-*.tar.gz")}
    versions = [version for version in fitting if version in wanted.specifier]
    return fitting[max(versions)] if versions else None


@contextmanager
def workspace(wheels: Path) -> Iterator[Path]:
    """A temporary folder inside `wheels`, for one process at a time; a killed predecessor's is removed."""
    wheels.mkdir(parents=True, exist_ok=True)
    with (wheels / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in wheels.glob(".build-*"):
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=wheels) as folder:
            yield Path(folder)


def pip(*arguments: str, **environment: str) -> None:
    """Run this Python's pip; its output goes to stderr, as progress does."""
    command = [sys.executable, "-m", "pip", *arguments]
    subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | environment)


def fetch_sdist(wheels: Path, work: Path, wanted: Requirement) -> Path:
    """The source archive, from the cache or downloaded into it, and known by its hash."""
    kept = newest_sdist(wheels, wanted)
    if kept:
        return check_sdist(kept)
    pip("download", "--quiet", "--no-deps", "--no-binary", PACKAGE, "--dest", str(work), str(wanted))
    fetched = next(work.glob("llama_cpp_python-*.tar.gz"))
    return check_sdist(fetched).rename(wheels / fetched.name)


def check_sdist(path: Path) -> Path:
    """The archive itself; the program ends where its hash is not in KNOWN, nor in PHONEREADY_LLAMA_SHA256."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    known = [line.split() for line in KNOWN.read_text(encoding="ascii").splitlines()]
    if [digest, path.name] in known or digest == os.environ.get("PHONEREADY_LLAMA_SHA256"):
        return path
    names = ", ".join(name for _, name in known)
    sys.exit(
        f"error: {path.name} with the SHA-256 {digest} is not known here; allowed: {names} as in {KNOWN}, or a file "
        "that you have checked yourself, by PHONEREADY_LLAMA_SHA256"
    )


def build_wheel(sdist: Path, directory: Path, work: Path, cmake_args: str) -> Path:
    """Compile `sdist` and put the finished wheel into `directory`."""
    print(f"compiling {sdist.name} once for this machine; this takes some minutes", file=sys.stderr)
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    out = work / "wheel"
    arguments = ("wheel", "--no-deps", "--no-cache-dir", "--wheel-dir", str(out), str(sdist))
    pip(*arguments, CMAKE_ARGS=cmake_args, CMAKE_BUILD_PARALLEL_LEVEL=jobs)
    built = next(out.glob("llama_cpp_python-*.whl"))
    directory.mkdir(parents=True, exist_ok=True)
    return built.rename(directory / built.name)


def ensure_wheel(cmake_args: str) -> Path:
    """A wheel for this machine, from the cache where there is one."""
    wheels = cache_directory() / "wheels"
    directory, wanted = wheel_directory(wheels, cmake_args), requirement()
    with workspace(wheels) as work:
        wheel = newest_wheel(directory, wanted)
        if wheel is None:
            return build_wheel(fetch_sdist(wheels, work, wanted), directory, work, cmake_args)
        if newest_sdist(wheels, wanted) is None:
            fetch_source_for_tests(wheels, work, wanted)
        return wheel


def fetch_source_for_tests(wheels: Path, work: Path, wanted: Requirement) -> None:
    """Fetch the archive whose vocabulary files some tests read; without a network those tests are skipped."""
    try:
        fetch_sdist(wheels, work, wanted)
    except (subprocess.CalledProcessError, StopIteration):
        print("the source archive cannot be fetched; tests that read it will be skipped", file=sys.stderr)


def main() -> None:
    """Install the wheel into the environment of the running Python, or say what would be done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--where", action="store_true", help="print the wheel's folder and do nothing")
    arguments = parser.parse_args()
    cmake_args = os.environ.get("CMAKE_ARGS", DEFAULT_CMAKE_ARGS)
    if arguments.where:
        print(wheel_directory(cache_directory() / "wheels", cmake_args))
        return
    try:
        pip("install", "--quiet", str(ensure_wheel(cmake_args)))
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {' '.join(map(str, error.cmd[1:5]))} failed with status {error.returncode}")


if __name__ == "__main__":
    main()
