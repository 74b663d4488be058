"""Records on disk: JSON Lines, one record a line, appended durably."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from cfsp.errors import InputError
from cfsp.files import refuse_no_file
from cfsp.reading import NotJSONError, parse_json, read_bytes
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.json_form import BOUNDS, RECORD_TYPE, record_from_json, record_to_json

logger = logging.getLogger(__name__)
_HEAD = f'{{"record_type":"{RECORD_TYPE}"'.encode()


def check_appendable(path: Path) -> None:
    """Raise InputError where `append_jsonl` could not write, or would write to what is no file of records."""
    refuse_no_file(path)
    try:
        with path.open("rb") if path.exists() else contextlib.nullcontext(io.BytesIO()) as stream:
            start = stream.read(64).replace(b" ", b"")[: len(_HEAD)]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if not _HEAD.startswith(start):
        raise InputError(f"{path} is no file of records, and none is appended to it")


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
    """Read records in file order: JSON Lines, or the array that `bench --output json` prints.

    A line that is no JSON is what a kill left: it is skipped with a warning.

    Raises:
        InputError: The file cannot be read, is too large, or has no line of JSON at all; a line is JSON but no valid
            record.
    """
    content = read_bytes(path)
    if content.lstrip()[:1] == b"[":
        return _read_array(content, path)
    records, torn = [], []
    for number, line in enumerate(content.split(b"\n"), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            payload = parse_json(line, where, BOUNDS)
        except NotJSONError:
            torn.append(where)
            continue
        records.append(record_from_json(payload, where=where))
    if torn and not records:
        raise InputError(f"{path} is no file of records: no line is complete JSON")
    for where in torn:
        logger.warning("%s is not complete JSON and is left out", where)
    return records


def _read_array(content: bytes, path: Path) -> list[BenchRecord]:
    payload = parse_json(content, str(path))
    return [record_from_json(entry, where=f"{path}, entry {n}") for n, entry in enumerate(payload, 1)]
