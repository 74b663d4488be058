"""`phoneready doctor`: what is installed, what is missing, and what that means."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer

from cfsp.errors import InputError
from cfsp.models.builtin import cache_directory
from cfsp.plugins import ENGINES, FAMILIES, METRICS, TARGETS, find_plugins
from cfsp.units import format_bytes
from phoneready.commands.options import MODEL_HELP, JsonOption
from phoneready.console import Check, write_result

OLDEST_PYTHON = (3, 11)
DEMO_MEMORY, DEMO_DISK = 3 * 10**9, 4 * 10**9
"""Of memory, and of disk."""
_STATES = {"ok": "ok", "missing": "MISSING", "warning": "note", "failed": "FAILED"}


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            help=f"Of this model, what it can become: {MODEL_HELP}", metavar="MODEL", show_default=False
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Examine Python, packages, processor, memory, disk and cache; say what is missing and how to get it.

    With MODEL: what can be removed of it, which files hold it, and what stands in the way. Its weights are not read.
    The exit status is 1 when something that every command needs is missing, else 0.
    """
    if model is not None:
        from phoneready.model_checks import examine_model

        checks = examine_model(model)
    else:
        checks = [*_packages(), *_machine(), *_plugins()]
    width = max(len(check.name) for check in checks)
    lines = [
        f"{check.name.ljust(width)}  {_STATES[check.state].ljust(7)}  {check.found}"
        + (f"  ({check.hint})" if check.hint else "")
        for check in checks
    ]
    failed = [check.name for check in checks if check.state == "failed"]
    missing = [check.name for check in checks if check.state == "missing"]
    verdict = f"cannot work: {', '.join(failed)}" if failed else "ready"
    if missing and not failed:
        verdict += f", without {', '.join(missing)}"
    payload: dict[str, Any] = {"ok": not failed, "checks": [asdict(check) for check in checks]}
    write_result("\n".join(lines if model else [*lines, "", verdict]), payload, as_json=json)
    if failed:
        raise typer.Exit(1)


def _packages() -> Iterator[Check]:
    """Python, what phoneready requires, and what its extras do."""
    interpreter = f"{platform.python_version()} at {sys.executable}"
    old = sys.version_info < OLDEST_PYTHON
    yield (
        Check("Python", "failed", interpreter, "3.11 or newer") if old else Check("Python", "ok", interpreter)
    )
    seen = {"phoneready"}
    for requirement in importlib.metadata.requires("phoneready") or []:
        name = re.split(r"[^\w.-]", requirement)[0]
        extra = re.search(r"extra == .(\w+)", requirement)
        if name in seen or (extra and extra[1] in ("all", "dev")):
            continue
        seen.add(name)
        try:
            yield Check(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            hint = f"pip install 'phoneready[{extra[1]}]'" if extra else "pip install phoneready"
            yield Check(name, "missing" if extra else "failed", "not installed", hint)
    # Whether llama.cpp's library loads: one compiled for another processor ends the process that tries.
    command = [sys.executable, "-P", "-c", "import llama_cpp"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode < 0:
        ending = f"ends by signal {-result.returncode} when loaded"
        yield Check("llama.cpp library", "missing", ending, "compiled for another processor: build it here")
    elif result.returncode:
        why = (result.stderr.strip().splitlines() or ["does not load"])[-1]
        yield Check("llama.cpp library", "missing", why)
    else:
        yield Check("llama.cpp library", "ok", "loads")


def _machine() -> Iterator[Check]:
    """Processor, GPU, memory, disk and cache."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        import psutil
        import torch

        from cfsp.devices import gpu_count, has_mps
        from runtime_bench.environment import cpu_model
    except ImportError:
        yield Check("machine", "warning", f"{platform.machine()}, {usable} cores usable")
        return
    cores = f"{cpu_model() or platform.machine()}, {usable} of {os.cpu_count()} cores usable"
    yield Check("processor", "ok", cores)
    gpus = [torch.cuda.get_device_properties(index) for index in range(gpu_count())]
    known = [f"cuda:{n} {gpu.name}, {format_bytes(gpu.total_memory)}" for n, gpu in enumerate(gpus)]
    known += ["mps"] if has_mps() else []
    if not known and torch.cuda.device_count():
        hint = "its driver, or torch's CUDA version"
        yield Check("GPU", "warning", "there, but torch cannot use it", hint)
    else:
        yield Check(
            "GPU", "ok", "; ".join(known) or "none that torch knows; everything runs on the processor"
        )
    memory = psutil.virtual_memory()
    free = f"{format_bytes(memory.available)} of {format_bytes(memory.total)} free"
    yield _enough("memory", memory.available, DEMO_MEMORY, free)
    hint = "set PHONEREADY_CACHE to a folder that can be written"
    try:
        folder = cache_directory()
    except InputError as error:
        yield Check("cache folder", "failed", str(error), hint)
        return
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield Check("cache folder", "failed", f"{folder} cannot be written", hint)
        return
    free_bytes = shutil.disk_usage(existing).free
    yield _enough("disk", free_bytes, DEMO_DISK, f"{format_bytes(free_bytes)} free at {existing}")
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    yield Check("cache folder", "ok", f"{folder}: {format_bytes(held)}")


def _enough(name: str, available: int, wanted: int, found: str) -> Check:
    if available >= wanted:
        return Check(name, "ok", found)
    return Check(name, "warning", found, f"the demo needs about {wanted / 1e9:.0f} GB")


def _plugins() -> Iterator[Check]:
    from cfsp.models.families import BUILT_IN
    from phoneready.figures import figures
    from runtime_bench import engines
    from runtime_bench.targets import table

    built_in = {
        "engine": (ENGINES, engines.ENGINES),
        "target": (TARGETS, table.TARGETS),
        "metric": (METRICS, figures.METRICS),
        "family": (FAMILIES, BUILT_IN),
    }
    for kind, (group, names) in built_in.items():
        for plugin in find_plugins(group, names):
            name = f"{kind} {plugin.entry.name}"
            try:
                plugin.load(object)
                yield Check(name, "ok", f"plugin of {plugin.origin}")
            except InputError as error:
                yield Check(name, "warning", str(error))
