"""Compiles the runner and llama.cpp against Android's C library as far as its headers go, where no NDK can be had.

    git clone --depth 1 https://android.googlesource.com/platform/bionic
    python tools/android_headers.py bionic

It wants Clang and libc++'s headers (Debian's clang-19 and libc++-19-dev). Nothing is linked: what the headers declare
at the API level of the builds is there, and what came later is an error. Exits with 1 where a file does not compile.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from runtime_bench.native.build import extract_llama, fetch_source

API_LEVEL = 28
"""As ANDROID_PLATFORM of runtime_bench.native.build."""
_HERE = Path(__file__).resolve().parents[1] / "runtime_bench" / "native"
_STANDARD = {".c": ("c", "c11"), ".cpp": ("c++", "c++17")}
_BIONIC = ("libc/include", "libc/kernel/uapi", "libc/kernel/uapi/asm-arm64", "libc/kernel/android/uapi")
_LLAMA = ("include", "ggml/include", "ggml/src", "ggml/src/ggml-cpu", "src", "vendor")
_COMPILED = (
    "ggml/src",
    *(f"ggml/src/ggml-cpu{part}" for part in ("", "/amx", "/tiled")),
    "src",
    "src/models",
)
_KERNELS = "ggml/src/ggml-cpu/arch/arm"
_ARCHITECTURES = ("armv8.2-a+dotprod+fp16", "armv8-a", "armv8.2-a+dotprod+fp16+i8mm")
"""Of the builds for arm64; the kernels are compiled for all of them."""
_DEFINED = (
    "NDEBUG",
    "_GNU_SOURCE",
    "GGML_USE_CPU",
    "GGML_USE_CPU_REPACK",
    'RUNNER_TARGET="t"',
    'RUNNER_KEY="k"',
)


def sources(llama: Path) -> Iterator[tuple[Path, str]]:
    """What CMake compiles for the builds of arm64, and for which architecture.

    The runner, ggml with its kernels for Arm, and llama.cpp.
    """
    yield _HERE / "runner.cpp", _ARCHITECTURES[0]
    for folder in (*_COMPILED, _KERNELS):
        for path in sorted(path for path in (llama / folder).iterdir() if path.suffix in _STANDARD):
            for architecture in _ARCHITECTURES if folder == _KERNELS else _ARCHITECTURES[:1]:
                yield path, architecture


def flags(bionic: Path, llama: Path, generated: Path, cxx: Path) -> list[str]:
    """Clang's arguments for every file."""
    system = [cxx, *(bionic / name for name in _BIONIC)]
    own = [generated, *(llama / name for name in _LLAMA)]
    return [
        *("-target", f"aarch64-linux-android{API_LEVEL}", "-fsyntax-only"),
        *("-nostdlibinc", *(word for folder in system for word in ("-isystem", str(folder)))),
        *(f"-I{folder}" for folder in own),
        *(f"-D{name}" for name in (*_DEFINED, 'RUNNER_NEEDS="asimd"')),
    ]


def write_versions(folder: Path) -> None:
    """The two headers that CMake would write."""
    for name in ("llama", "ggml"):
        text = "".join(f'#define {name.upper()}_{what} "unknown"\n' for what in ("VERSION", "COMMIT"))
        (folder / f"{name}-version.h").write_text(text, encoding="utf-8")


def main() -> int:
    """Compile each file; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bionic", type=Path, help="a checkout of Android's C library")
    parser.add_argument("--clang", default="clang-19")
    parser.add_argument("--libcxx", type=Path, default=Path("/usr/lib/llvm-19/include/c++/v1"))
    asked = parser.parse_args()
    for path in (asked.bionic / _BIONIC[0], asked.libcxx):
        if not path.is_dir():
            parser.error(f"{path} is no folder")
    if shutil.which(asked.clang) is None:
        parser.error(f"{asked.clang} is not installed")
    failed = []
    with tempfile.TemporaryDirectory() as work:
        llama = extract_llama(fetch_source(), Path(work))
        write_versions(Path(work))
        options = flags(asked.bionic, llama, Path(work), asked.libcxx)
        files = list(sources(llama))
        for path, architecture in files:
            language, standard = _STANDARD[path.suffix]
            chosen = ("-x", language, f"-std={standard}", f"-march={architecture}")
            command = [asked.clang, *chosen, *options, str(path)]
            if subprocess.run(command, check=False).returncode:
                failed.append(path)
    print(f"{len(files) - len(failed)} of {len(files)} compile at API level {API_LEVEL}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
