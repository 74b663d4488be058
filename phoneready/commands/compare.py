"""`phoneready compare`: two sets of benchmark records against each other."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cfsp.errors import InputError
from phoneready.commands.options import DebugOption, JsonOption, SeedOption
from phoneready.console import quiet_libraries, write_result

__all__ = ["compare"]


def compare(
    base: Annotated[Path, typer.Argument(help="Records of the base, as `bench --record` writes them.")],
    new: Annotated[Path, typer.Argument(help="Records that are held against it.")],
    threshold: Annotated[float, typer.Option(help="Relative change that counts as a difference.")] = 0.03,
    confidence: Annotated[float, typer.Option(help="Confidence of the interval.")] = 0.95,
    seed: SeedOption = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare benchmark records: ratio of speeds with an interval, memory, size, and a verdict a row."""
    quiet_libraries()
    from runtime_bench import compare as comparison
    from runtime_bench.jsonl import read_jsonl
    from runtime_bench.table import format_comparison

    sides = [read_jsonl(path) for path in (base, new)]
    for path, records in zip((base, new), sides, strict=True):
        if not records:
            raise InputError(f"{path} holds no records")
    rows = comparison.compare(*sides, threshold=threshold, confidence=confidence, seed=seed)
    write_result(format_comparison(rows), [asdict(row) for row in rows], as_json=json)
