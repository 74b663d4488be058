"""What fits into 2 GB, 1 GB and 400 MB: the projection against control groups that really have that limit.

    python benchmarks/memory_limits.py FILE.gguf... [--limits 2048 1024 400] [--context 256]

Each file reads a prompt that fills its context, and generates a few tokens, under each limit, as `phoneready bench
--on constrained` does it; the projection is the one of `phoneready devices fit`, for this machine's processor and for
a Python process with llama.cpp in it. Linux; setting a limit wants root. Exit status 1: a projected verdict is not the
measured one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from projection_memory import PYTHON_BYTES, cpu_features

from cfsp.errors import LimitError
from phoneready.console import errors_as_exit_status
from runtime_bench.devices.model_facts import gguf_facts
from runtime_bench.devices.projection import MIB, project_memory
from runtime_bench.measuring.measure import run_bench
from runtime_bench.presentation.table import short_names, table_of
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.targets.constrained import Constrained
from runtime_bench.workload import BenchSettings

NEW_TOKENS = 8


def measure(files: list[Path], limit_mib: int, context: int) -> list[tuple[BenchRecord, BenchRecord]]:
    """For each file: a prompt that fills the context, and tokens without one."""
    settings = BenchSettings(
        n_prompt=(context,),
        n_gen=(NEW_TOKENS,),
        ttft=(),
        load=False,
        repetitions=1,
        n_threads=(1,),
        warmup=False,
    )
    records = run_bench(files, settings, target=Constrained(limit_mib * MIB))
    return list(zip(records[: len(files)], records[len(files) :], strict=True))


def verdict_of(record: BenchRecord) -> str:
    """How a run stood to its limit; a failure of another kind as it was."""
    return record.memory_verdict or f"failed: {record.failure}"


def main() -> None:
    """Print a Markdown table and judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--limits", type=int, nargs="+", default=[2048, 1024, 400], help="MiB")
    parser.add_argument("--context", type=int, default=256, help="tokens")
    arguments = parser.parse_args()
    names = short_names(map(str, arguments.files))
    features, rows, wrong = cpu_features(), [], []
    for limit in arguments.limits:
        for file, pair in zip(
            arguments.files, measure(arguments.files, limit, arguments.context), strict=True
        ):
            memory = project_memory(gguf_facts(file), arguments.context, features, process_bytes=PYTHON_BYTES)
            projected, measured = memory.verdict(limit * MIB), [verdict_of(record) for record in pair]
            wrong += [f"{names[str(file)]} in {limit} MiB" for found in measured if found != projected][:1]
            again = max(record.reread_bytes or 0 for record in pair)
            peak = max(record.peak_rss_bytes or 0 for record in pair)
            rows.append(
                {
                    "limit": f"{limit} MiB",
                    "file": names[str(file)],
                    "needs, of which cannot be dropped": f"{memory.needed / MIB:.0f}, {memory.kept / MIB:.0f} MiB",
                    "projected": projected,
                    "prompt": measured[0],
                    "tokens": measured[1],
                    "read again": f"{again / MIB:.0f} MiB",
                    "peak RSS measured": f"{peak / MIB:.0f} MiB" if peak else "-",
                }
            )
    print(table_of(rows).markdown())
    if wrong:
        raise LimitError(f"{len(wrong)} of {len(rows)} projected otherwise: {', '.join(wrong)}")


if __name__ == "__main__":
    with errors_as_exit_status():
        main()
