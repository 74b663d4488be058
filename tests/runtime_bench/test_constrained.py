"""Real limits of a real control group: a model fits, thrashes, or is killed, and each is told from the others."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cfsp.errors import InputError
from runtime_bench.engines import SessionSettings
from runtime_bench.measuring.measure import run_bench
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.fairness import note_of
from runtime_bench.targets import LOCAL
from runtime_bench.targets.local import MIB, Constrained, find_parent, limited_group
from runtime_bench.worker import WorkerRequest
from runtime_bench.workload import BenchSettings, Workload

SETTINGS = BenchSettings(
    check_text=False, n_prompt=(), n_gen=(8,), ttft=(), load=False, repetitions=1, n_threads=(1,)
)


@pytest.fixture(scope="module")
def limits_work() -> None:
    try:
        find_parent()
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def large_file(tiny_gguf: Callable[..., Path]) -> Path:
    """110 MiB of float32, which no processor gets repacked."""
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "head_dim": 128}
    return tiny_gguf("llama", **sizes)


def bench(path: Path, limit_mib: float) -> BenchRecord:
    target = Constrained(memory_limit_bytes=int(limit_mib * MIB))
    (record,) = run_bench([path], SETTINGS, target=target)
    assert record.kind == "constrained-host"
    assert record.memory_limit_bytes == target.memory_limit_bytes
    return record


@pytest.mark.usefixtures("limits_work")
def test_what_fits_thrashes_or_is_killed_is_told_apart(large_file: Path) -> None:
    file_mib = large_file.stat().st_size / MIB
    enough = bench(large_file, 2048)
    assert (enough.status, enough.memory_verdict) == ("ok", "fits")
    assert (enough.reread_bytes or 0) < 0.2 * file_mib * MIB
    peak_mib = (enough.peak_rss_bytes or 0) / MIB
    assert peak_mib > file_mib
    # Room for what is allocated, but for less than half of the mapped file.
    short = bench(large_file, peak_mib - 0.7 * file_mib)
    assert (short.status, short.memory_verdict) == ("ok", "thrashes")
    # Every one of nine tokens reads all weights.
    assert (short.reread_bytes or 0) > 2 * file_mib * MIB
    assert "thrashes" in (note_of(short) or "")
    little = bench(large_file, 24)
    assert (little.status, little.memory_verdict) == ("failed", "does not fit")
    assert little.failure == "does not fit: killed at the limit of 24 MiB"


@pytest.mark.usefixtures("limits_work")
def test_a_group_is_gone_afterwards() -> None:
    parent, _ = find_parent()
    before = set(parent.iterdir())
    with limited_group(64 * MIB) as group:
        assert group.folder.is_dir()
        assert group.oom_kills == 0
    assert set(parent.iterdir()) == before


def test_a_run_stays_on_its_cores(tiny_gguf: Callable[..., Path]) -> None:
    core = min(os.sched_getaffinity(0))
    target = Constrained(cores=(core,))
    assert target.name == f"constrained(cores={core})"
    # llama.cpp names what it finds; the kernel says where the process was allowed to run.
    workload = Workload("tg", 0, 4, 0)
    request = WorkerRequest(str(tiny_gguf()), "llama.cpp", workload, SessionSettings(16, 1, 16, 16))
    result = target.run(request, 60)
    assert result.error is None
    assert result.memory_verdict is None
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            target._enter()
            os.write(write, ",".join(map(str, sorted(os.sched_getaffinity(0)))).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    assert os.read(read, 64) == str(core).encode()
    os.close(read)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, "wants a memory limit or cores"),
        ({"cores": (9999,)}, "cores"),
        ({"memory_limit_bytes": 1}, "too little"),
    ],
)
def test_limits_that_cannot_be(limits: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Constrained(**limits)  # type: ignore[arg-type]


def test_local_has_no_limit() -> None:
    assert (LOCAL.kind, LOCAL.memory_limit_bytes) == ("measured", None)
