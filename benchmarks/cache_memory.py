"""Projected against measured memory of the key-value cache: a GGUF file with each type and two lengths of the context.

    python benchmarks/cache_memory.py FILE.gguf... [--contexts 1024 32768]

llama.cpp allocates the cache of the whole context when it opens a file and sets it to zero, so that it is resident
however few tokens are read: what the peaks of two processes with unlike contexts differ by is the cache.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from exporters.gguf.cache_types import MEASURED_CACHES
from runtime_bench.devices.model_facts import gguf_facts
from runtime_bench.devices.projection import MIB, cache_bytes
from runtime_bench.engines import SessionSettings
from runtime_bench.presentation.table import table_of
from runtime_bench.process import run_worker
from runtime_bench.worker import WorkerRequest
from runtime_bench.workload import Workload


def main() -> None:
    """Print a Markdown table and the largest difference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--contexts", type=int, nargs=2, default=[1024, 32768])
    arguments = parser.parse_args()
    rows, ratios = [], []
    for file in arguments.files:
        facts = gguf_facts(file)
        for cache_type in MEASURED_CACHES:
            short, long = (cache_bytes(facts, n_ctx, cache_type) for n_ctx in arguments.contexts)
            low, high = (peak(file, n_ctx, cache_type) for n_ctx in arguments.contexts)
            ratios.append((long - short) / (high - low))
            projected, measured = ((b - a) / MIB for a, b in ((short, long), (low, high)))
            sizes = {"projected": f"{projected:.1f} MiB", "measured": f"{measured:.1f} MiB"}
            rows.append({"file": file.name, "cache": cache_type} | sizes | {"ratio": f"{ratios[-1]:.3f}"})
    print(table_of(rows).markdown())
    print(f"largest difference {max(abs(ratio - 1) for ratio in ratios):.1%}")


def peak(file: Path, n_ctx: int, cache_type: str) -> int:
    """Peak RSS of a process that generates four tokens in a context of `n_ctx`."""
    session = SessionSettings(n_ctx, 1, 512, 512, cache_type)
    result = run_worker(WorkerRequest(str(file), "llama.cpp", Workload("tg", n_gen=4), session), 600)
    if result.peak_rss_bytes is None or result.error:
        raise SystemExit(f"{file} could not be measured: {result.error}")
    return result.peak_rss_bytes


if __name__ == "__main__":
    main()
