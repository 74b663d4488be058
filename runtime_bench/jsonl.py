"""Records on disk: JSON Lines, one record a line, appended durably."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cfsp.errors import InputError
from runtime_bench.record import BenchRecord, record_from_json, record_to_json

__all__ = ["append_jsonl", "read_jsonl"]

logger = logging.getLogger(__name__)


def append_jsonl(path: Path, records: Iterable[BenchRecord]) -> None:
    """Append records, one a line, and have them on the disk before returning.

    A last line that a killed process left unfinished is closed first, so that it cannot swallow the next
    record.

    Raises:
        InputError: The file cannot be written.
    """
    lines = [json.dumps(record_to_json(r), ensure_ascii=False, allow_nan=False) + "\n" for r in records]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    stream.write(b"\n")
            stream.write("".join(lines).encode())
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def read_jsonl(path: Path) -> list[BenchRecord]:
    """Read records in file order. A line that is no JSON is what a kill left: it is skipped with a warning.

    Raises:
        InputError: The file cannot be read, or a line is JSON but no valid record.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    records = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            payload = json.loads(line, parse_constant=_refuse_constant) if line.strip() else None
        except ValueError:
            logger.warning("%s is not complete JSON and is left out", where)
            continue
        if payload is not None:
            records.append(record_from_json(payload, where=where))
    return records


def _refuse_constant(name: str) -> Any:
    raise InputError(f"benchmark records hold finite numbers or null, never {name}")
