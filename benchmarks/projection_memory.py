"""Projected against measured memory: GGUF files on this machine, with a short and a long context.

    python benchmarks/projection_memory.py FILE.gguf... [--contexts 512 3584]

Every file is run in a fresh process that fills its context, by `phoneready bench`. The projection is the one of
`phoneready devices fit`, for this machine's processor and for a Python process with llama.cpp in it.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

from runtime_bench.devices.model_facts import gguf_facts
from runtime_bench.devices.projection import BATCH_TOKENS, MIB, REPACKED, project_memory
from runtime_bench.measuring.measure import run_bench
from runtime_bench.presentation.table import short_names, table_of
from runtime_bench.workload import BenchSettings

PYTHON_BYTES = 70 * MIB
"""Peak RSS of the worker with a model that has no weights: Python, numpy and llama.cpp's libraries."""


def main() -> None:
    """Print a Markdown table and the largest difference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 3584])
    arguments = parser.parse_args()
    depths = tuple(context - BATCH_TOKENS for context in arguments.contexts)
    settings = BenchSettings(
        n_prompt=(BATCH_TOKENS,), n_gen=(), ttft=(), load=False, n_depth=depths, repetitions=1, n_threads=(1,)
    )
    names = short_names(map(str, arguments.files))
    features, rows, ratios = cpu_features(), [], []
    for record in run_bench(arguments.files, settings):
        file, n_ctx = Path(record.model_filename), record.n_depth + record.n_prompt
        memory = project_memory(gguf_facts(file), n_ctx, features, process_bytes=PYTHON_BYTES)
        if record.peak_rss_bytes is None:
            raise SystemExit(f"{file} could not be measured: {record.failure}")
        ratios.append(memory.total / record.peak_rss_bytes)
        rows.append(
            {
                "file": names[record.model_filename],
                "context": str(n_ctx),
                "projected": f"{memory.total / MIB:.0f} MiB",
                "measured": f"{record.peak_rss_bytes / MIB:.0f} MiB",
                "ratio": f"{ratios[-1]:.3f}",
            }
        )
    print(table_of(rows).markdown())
    print(f"largest difference {max(abs(ratio - 1) for ratio in ratios):.1%}")


def cpu_features() -> set[str]:
    """This machine's instructions, in the names of REPACKED."""
    names = {"asimddp": "dotprod"}
    if platform.system() != "Linux":
        raise SystemExit("the processor's instructions are read from /proc/cpuinfo")
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    flags = {word for line in text.splitlines() if line[:5] in ("flags", "Featu") for word in line.split()}
    return {names.get(flag, flag) for flag in flags} & set(REPACKED)


if __name__ == "__main__":
    main()
