"""The compiler of a runner target: found, named, and said what is missing where it is not there."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cfsp.errors import InputError
from runtime_bench.native.targets import RUNNER_TARGETS, require_target

_NDK_TOOLCHAIN = Path("build") / "cmake" / "android.toolchain.cmake"


@dataclass(frozen=True)
class Toolchain:
    """How to compile."""

    cmake: str  # The cmake program
    options: tuple[str, ...]  # CMake options that choose the compiler
    version: str  # The compiler's own line about itself; part of what a build is known by


def find_toolchain(target: str, ndk: Path | None = None) -> Toolchain:
    """The compiler for a target.

    Raises:
        InputError: Unknown target, or something is missing or is not what it should be.
    """
    system = require_target(target).system
    if ndk is not None and system != "android":
        android = ", ".join(name for name, row in RUNNER_TARGETS.items() if row.system == "android")
        raise InputError("an NDK is for Android's targets", field="ndk", value=str(ndk), allowed=android)
    options, version = _android(ndk) if system == "android" else _linux(target)
    cmake = shutil.which("cmake")
    if cmake is None:
        raise InputError("cmake is not installed; the runner is built with it", allowed="pip install cmake")
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    return Toolchain(cmake, (*generator, *options), version)


def _android(ndk: Path | None) -> tuple[tuple[str, ...], str]:
    if ndk is None:
        raise InputError(
            "Android's targets want the Android NDK", field="ndk", allowed="the folder of an NDK"
        )
    toolchain, properties = ndk.resolve() / _NDK_TOOLCHAIN, ndk / "source.properties"
    if not toolchain.is_file() or not properties.is_file():
        raise InputError(
            "not an Android NDK",
            field="ndk",
            value=str(ndk),
            allowed=f"a folder with source.properties and {_NDK_TOOLCHAIN.as_posix()}",
        )
    text = properties.read_text(encoding="utf-8", errors="replace")
    lines = (line.partition("=") for line in text.splitlines())
    revision = next((value.strip() for key, _, value in lines if key.strip() == "Pkg.Revision"), "unknown")
    return (f"-DCMAKE_TOOLCHAIN_FILE={toolchain}",), f"NDK {revision}"


def _linux(target: str) -> tuple[tuple[str, ...], str]:
    if sys.platform != "linux":
        raise InputError("Linux programs are built on Linux", field="target", value=target)
    machine = require_target(target).machine
    if machine == RUNNER_TARGETS["native"].machine:
        # As CMake chooses it: CXX may name options as well.
        command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
        return (), _version(command, "g++")
    prefix = f"{machine}-linux-gnu-"
    options = (
        "-DCMAKE_SYSTEM_NAME=Linux",
        f"-DCMAKE_SYSTEM_PROCESSOR={machine}",
        f"-DCMAKE_C_COMPILER={prefix}gcc",
        f"-DCMAKE_CXX_COMPILER={prefix}g++",
    )
    package = f"g++-{machine.replace('_', '-')}-linux-gnu"
    return options, _version([f"{prefix}g++"], package)


def _version(command: list[str], package: str) -> str:
    if shutil.which(command[0]) is None:
        raise InputError(
            f"no compiler {command[0]} on this {platform.machine()} machine",
            allowed=f"Debian's package {package}",
        )
    result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return next(iter(result.stdout.splitlines()), "unknown").strip()
