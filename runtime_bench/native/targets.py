"""What the runner can be built for.

A build is one program for one set of processor features, static unless it drives a GPU: llama.cpp chooses its kernels
when it is compiled. So the choice at run time is one between builds, made by `runner_target_for` from the far machine's
/proc/cpuinfo; the program refuses to start if a feature is missing, instead of crashing.
"""

from __future__ import annotations

import platform
from collections.abc import Collection
from dataclasses import dataclass, replace
from types import MappingProxyType

from cfsp.errors import InputError, look_up
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
_HERE = _NAMES.get(platform.machine(), platform.machine())

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
            "linux", _HERE, tuple(sorted(_KERNEL_FEATURES & cpu_features())), ("-DGGML_NATIVE=ON",)
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

    What drives a GPU is loaded when the program runs, so that the C library cannot be linked in.

    Raises:
        InputError: Unknown name.
    """
    row = look_up(RUNNER_TARGETS, name, "unknown target", field="target")
    if backend is None:
        return row
    cmake, wants = look_up(RUNNER_BACKENDS, backend, "unknown backend", field="backend")
    return replace(row, cmake=(*row.cmake, *cmake), static=False, wants=wants)


def runner_target_for(system: str, machine: str, features: Collection[str]) -> str:
    """The build that makes most of a machine.

    Raises:
        InputError: No build runs there.
    """
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
