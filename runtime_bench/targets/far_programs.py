"""What runs on another machine: the native runner, given or built here, or the packed worker in a Python there."""

from __future__ import annotations

import threading
from pathlib import Path

from cfsp.models.builtin import cache_directory
from cfsp.progress import Progress
from runtime_bench.engines import engine_spec
from runtime_bench.native.build import build_runner
from runtime_bench.targets.bundle import pack_worker, program_bundle, program_machine
from runtime_bench.targets.far_machine import ANSWER_S, Machine
from runtime_bench.targets.far_scripts import HAVE_PACKAGES
from runtime_bench.targets.remote_cache import RemoteCache
from runtime_bench.targets.transport import FarError, FarShell

_PYTHON = "python3"
_BUILDING = threading.Lock()


def native_program(
    machine: Machine, cache: RemoteCache, *, runner: Path | None, ndk: Path | None, progress: Progress
) -> list[str]:
    """The runner for a machine, with its arguments; it is pushed where it is not there.

    Raises:
        FarError: A program for another processor, or it cannot be pushed.
        InputError: None can be built for the machine.
    """
    if runner is None:
        target = machine.runner
        with _BUILDING:
            runner = build_runner(
                target, ndk=ndk if target.startswith("android") else None, progress=progress
            )
    made_for = program_machine(runner)
    if made_for and made_for != machine.machine:
        raise FarError(f"wrong ABI: {runner.name} is for {made_for}, the device is {machine.machine}")
    return [cache.have(runner, program_bundle)]


def python_program(engine: str, shell: FarShell, machine: Machine, cache: RemoteCache) -> list[str]:
    """The worker that measures here, in a Python there, with its arguments; it is pushed where it is not there.

    Raises:
        FarError: No Python, or one that lacks what the engine wants, or it cannot be pushed.
    """
    if machine.abi:
        raise FarError(f"{engine} needs Python there, which Android does not have; measure a GGUF file")
    reply = shell.run(HAVE_PACKAGES, _PYTHON, *engine_spec(engine).far_packages, timeout_s=ANSWER_S)
    if reply.status:
        raise FarError(f"{engine} needs Python there, and there is no {_PYTHON}")
    lacking = reply.text.strip().rpartition("\n")[2].split()
    if lacking:
        what = "3.11 or newer" if "python" in lacking else f"with {', '.join(lacking)}"
        raise FarError(f"{engine} needs a {_PYTHON} {what} there")
    packed = cache_directory() / "worker.zip"
    with _BUILDING:
        pack_worker(packed)
    path = cache.have(packed, program_bundle)
    return ["env", f"PYTHONPATH={path}", _PYTHON, "-P", "-m", "runtime_bench.worker"]
