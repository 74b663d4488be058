"""`phoneready doctor`: what this machine has, what is missing, and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cfsp.errors import InputError
from cfsp.models.builtin import cache_directory
from cfsp.plugins import ENGINES, METRICS, TARGETS, find_plugins
from cfsp.units import format_bytes
from phoneready.checks import Check
from phoneready.commands.options import MODEL_HELP, JsonOption
from phoneready.console import write_result
from phoneready.release.dependencies import installed_version

REQUIRED = (
    *("torch", "transformers", "safetensors", "tokenizers", "numpy", "gguf"),
    *("pydantic", "typer", "rich", "psutil", "jinja2"),
)
OPTIONAL = {
    "llama-cpp-python": "gguf",
    **dict.fromkeys(("onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai"), "onnx"),
    **dict.fromkeys(("datasets", "pyarrow"), "data"),
    **dict.fromkeys(("peft", "accelerate"), "recover"),
    "lm-eval": "eval",
    "playwright": "browser",
    "plotly": "report",
    **dict.fromkeys(("optuna", "tomli-w"), "tune"),
    "mlflow-skinny": "track",
}
OLDEST_PYTHON = (3, 11)
# What llama.cpp's and torch's kernels make use of, on x86-64 and on ARM.
FEATURES = (
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimddp", "i8mm", "sve"),
)
DEMO_DISK_BYTES = 3 * 2**30
DEMO_MEMORY_BYTES = 3 * 2**30
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
        checks = examine()
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


def examine() -> list[Check]:
    """All checks, in the order shown."""
    return [
        _check_python(),
        *(_check_package(name, "failed", "pip install phoneready") for name in REQUIRED),
        *(
            _check_package(name, "missing", f"pip install 'phoneready[{extra}]'")
            for name, extra in OPTIONAL.items()
        ),
        _check_llama_library(),
        _check_processor(),
        _check_gpu(),
        _check_memory(),
        *_check_cache(),
        *_check_plugins(),
    ]


def _check_python() -> Check:
    interpreter = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        return Check("Python", "failed", interpreter, "3.11 or newer is needed")
    return Check("Python", "ok", interpreter)


def _check_package(name: str, without: str, hint: str) -> Check:
    version = installed_version(name)
    return Check(name, "ok", version) if version else Check(name, without, "not installed", hint)


def _check_llama_library() -> Check:
    """Whether llama.cpp's library loads: one compiled for another processor ends the process that tries."""
    name = "llama.cpp library"
    if installed_version("llama-cpp-python") is None:
        return Check(name, "missing", "not installed")
    command = [sys.executable, "-P", "-c", "import llama_cpp"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return Check(name, "ok", "loads")
    if result.returncode < 0:
        ending = f"ends by signal {-result.returncode} when loaded"
        return Check(name, "missing", ending, "it was compiled for another processor: build it here")
    return Check(name, "missing", (result.stderr.strip().splitlines() or ["does not load"])[-1])


def _check_processor() -> Check:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name = fields.get("model name") or platform.processor() or platform.machine()
    known = " ".join(feature for feature in FEATURES if feature in flags) or "unknown"
    return Check("processor", "ok", f"{name}, {usable} of {os.cpu_count()} cores usable; features: {known}")


def _check_gpu() -> Check:
    """The GPUs that `--device auto` and `cuda:N` name; nothing needs one."""
    try:
        import torch

        from cfsp.devices import gpu_count, has_mps
    except ImportError:
        return Check("GPU", "ok", "unknown without torch")
    every = [torch.cuda.get_device_properties(index) for index in range(gpu_count())]
    known = [f"cuda:{n} {gpu.name}, {format_bytes(gpu.total_memory)}" for n, gpu in enumerate(every)]
    known += ["mps"] if has_mps() else []
    if not known and torch.cuda.device_count():
        return Check(
            "GPU", "warning", "there, but torch cannot use it", "its driver, or torch's CUDA version"
        )
    return Check("GPU", "ok", "; ".join(known) or "none that torch knows; everything runs on the processor")


def _check_memory() -> Check:
    try:
        import psutil
    except ImportError:
        return Check("memory", "warning", "unknown")
    memory = psutil.virtual_memory()
    free = f"{format_bytes(memory.available)} of {format_bytes(memory.total)} free"
    if memory.available < DEMO_MEMORY_BYTES:
        return Check("memory", "warning", free, f"the demo needs about {format_bytes(DEMO_MEMORY_BYTES)}")
    return Check("memory", "ok", free)


def _check_cache() -> list[Check]:
    hint = "set PHONEREADY_CACHE to a folder that can be written"
    try:
        folder = cache_directory()
    except InputError as error:
        return [Check("cache folder", "failed", str(error), hint)]
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return [Check("cache folder", "failed", f"{folder} cannot be written", hint)]
    free = shutil.disk_usage(existing).free
    state = "ok" if free >= DEMO_DISK_BYTES else "warning"
    needed = "" if state == "ok" else f"the demo needs {format_bytes(DEMO_DISK_BYTES)}"
    return [
        Check("disk", state, f"{format_bytes(free)} free at {existing}", needed),
        Check("cache folder", "ok", f"{folder}: {_contents(folder)}"),
    ]


def _check_plugins() -> list[Check]:
    from phoneready.figures import metrics
    from runtime_bench import engines
    from runtime_bench.targets import table

    built_in = {ENGINES: engines.ENGINES, TARGETS: table.TARGETS, METRICS: metrics.METRICS}
    checks = []
    for group, names in built_in.items():
        for plugin in find_plugins(group, names):
            name = f"{group.removeprefix('phoneready.').removesuffix('s')} {plugin.entry.name}"
            try:
                plugin.load(object)
                checks.append(Check(name, "ok", f"plugin of {plugin.origin}"))
            except InputError as error:
                checks.append(Check(name, "warning", str(error)))
    return checks


def _contents(folder: Path) -> str:
    if not folder.is_dir():
        return "not made yet"
    parts = []
    for entry in sorted(folder.iterdir()):
        files = [entry] if entry.is_file() else [path for path in entry.rglob("*") if path.is_file()]
        parts.append(f"{entry.name} {format_bytes(sum(path.stat().st_size for path in files))}")
    return ", ".join(parts) or "empty"
