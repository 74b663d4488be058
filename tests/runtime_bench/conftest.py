"""Records made by hand, for what needs no measurement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from runtime_bench.record import BenchRecord, Environment
from runtime_bench.workload import Workload

MakeRecord = Callable[..., BenchRecord]


@pytest.fixture(scope="session")
def make_record() -> MakeRecord:
    """Factory `make_record(workload=Workload("tg", n_gen=128), **fields)` of a valid record."""

    def make(workload: Workload | None = None, **fields: Any) -> BenchRecord:
        workload = workload or Workload("tg", n_gen=128)
        environment = Environment("A Processor", 4, None, 0.5, 2**34, "Linux", {"python": "3.11"})
        values: dict[str, Any] = {
            "kind": "measured",
            "target": "local",
            "engine": "llama.cpp",
            "status": "ok",
            "failure": None,
            "session": "s",
            "workload": workload.kind,
            "test": workload.test,
            "model_filename": "models/dense.gguf",
            "model_type": "llama 135M Q8_0",
            "model_size": 150 * 2**20,
            "model_n_params": 134_515_008,
            "file_size_bytes": 151 * 2**20,
            "file_sha256": "0" * 64,
            "n_prompt": workload.n_prompt,
            "n_gen": workload.n_gen,
            "n_depth": workload.n_depth,
            "n_batch": 2048,
            "n_ubatch": 512,
            "n_threads": 2,
            "backends": "CPU",
            "build_commit": None,
            "cpu_info": "A Processor",
            "test_time": "2030-01-01T00:00:00Z",
            "warmup": True,
            "samples_per_process": 1,
            "environment": environment,
            "samples_ns": (10**9, 11 * 10**8, 10**9, 9 * 10**8, 10**9),
            "sequence": (0, 2, 4, 6, 8),
            "load_samples_ns": (5 * 10**7,) * 5,
            "page_cache_shares": (1.0,) * 5,
            "peak_rss_samples_bytes": (2**28, 2**28 + 4096),
        }
        return BenchRecord(**(values | fields))

    return make
