"""`phoneready devices`: what is known of phones and boards."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cfsp.errors import InputError
from cfsp.settings import setting
from cfsp.units import format_bytes
from exporters.gguf.quants import DEFAULT_CACHE, MEASURED_CACHES
from phoneready.commands.options import JsonOption
from phoneready.console import show_progress, write_result
from runtime_bench.devices import CONTEXT, DEFAULT_CONTEXT, find_profile, gguf_facts, load_profiles, project
from runtime_bench.native.build import RUNNER_BACKENDS, read_build
from runtime_bench.native.build import build_runner as build
from runtime_bench.presentation.device_table import (
    format_profile,
    format_projections,
    profile_table,
    profile_to_json,
)
from runtime_bench.targets.table import open_remote


def list_devices(
    device: Annotated[
        str | None,
        typer.Argument(help="Show every figure of this one.", metavar="NAME", show_default=False),
    ] = None,
    json: JsonOption = False,
) -> None:
    """List the devices that have a profile, built in or your own; or every figure of one, and who says so."""

    profiles = load_profiles()
    if device is None:
        shown, payload = (
            profile_table([*profiles.values()]).markdown(),
            [*map(profile_to_json, profiles.values())],
        )
        write_result(shown, payload, as_json=json)
    else:
        entry = find_profile(device, profiles)
        write_result(format_profile(entry), profile_to_json(entry), as_json=json)


def fit(
    file: Annotated[Path, typer.Argument(help="GGUF file.", metavar="FILE")],
    context: int = setting(DEFAULT_CONTEXT, CONTEXT),
    cache_type: str = setting(
        DEFAULT_CACHE,
        f"Type of the key-value cache: {', '.join(MEASURED_CACHES)}.",
        choices=MEASURED_CACHES,
        metavar="TYPE",
    ),
    device: tuple[str, ...] = setting((), "Devices, as A,B.", metavar="NAME,...", shown="all"),
    json: JsonOption = False,
) -> None:
    """Project whether a file fits on devices, and how fast it may be there; nothing is measured."""

    profiles = load_profiles()
    chosen = [find_profile(name, profiles) for name in device or profiles]
    facts = gguf_facts(file)
    if context > facts.context_length:
        allowed = f"up to {facts.context_length}"
        raise InputError("longer than the model's context", field="context", value=context, allowed=allowed)
    rows = [project(entry.profile, facts, context, cache_type) for entry in chosen]
    text = format_projections(rows, context, cache_type)
    payload = {"kind": "projected", "file": str(file), "context": context, "cache_type": cache_type}
    devices = [asdict(row) | {"fits": row.fits, "total_bytes": row.memory.total} for row in rows]
    write_result(text, payload | {"devices": devices}, as_json=json)


def build_runner(
    target: str = setting(
        "native",
        "x86_64-linux, aarch64-linux, android-arm64, or native for this machine; docs/targets.md has all.",
        metavar="TARGET",
    ),
    backend: str | None = setting(
        None,
        f"{', '.join(RUNNER_BACKENDS)}: what may compute beside the processor; it wants libraries to compile it with.",
        choices="runtime_bench.native.build:RUNNER_BACKENDS",
        shown="nothing",
    ),
    ndk: Path | None = setting(
        None, "Folder of the Android NDK, to build the runner for Android with.", metavar="DIR"
    ),
    json: JsonOption = False,
) -> None:
    """Build the program that measures GGUF files on machines without Python; prints where it is.

    It is compiled once from the llama.cpp source of llama-cpp-python, which takes minutes, and kept in the cache.
    """

    with show_progress() as progress:
        program = build(target, backend=backend, ndk=ndk, progress=progress)
    made = read_build(program)
    needs = ", ".join(made.needs) or "nothing"
    text = f"{program}\n{made.name}, {format_bytes(made.size_bytes)}, llama.cpp of llama-cpp-python {made.source};"
    write_result(f"{text} needs {needs}", {"path": str(program)} | asdict(made), as_json=json)


def clean(
    target: Annotated[
        str,
        typer.Argument(help="ssh:HOST or adb:SERIAL, with the options of `bench --on`.", metavar="TARGET"),
    ],
    json: JsonOption = False,
) -> None:
    """Remove what `bench` pushed to another machine."""

    remote = open_remote(target)
    removed, left = remote.clean()
    text = f"{remote.name}: {removed} file{'' if removed == 1 else 's'} removed"
    text += f"; left there, as `bench` did not push it: {', '.join(left)}" if left else ""
    write_result(text, {"target": remote.name, "removed": removed, "left": left}, as_json=json)
