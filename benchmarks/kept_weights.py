"""What it costs to keep weights in fewer bytes than float32: the same pruning three ways, in turns.

Each is a process of its own, whose processor time and peak memory (RSS) the system tells. What they write must be the
same bytes.

    python benchmarks/kept_weights.py MODEL -o DIR [--calibration builtin:python-docs] [--nsamples 4] [--seqlen 256]
        [--rounds 2] [--dtype bfloat16] [--json FILE]

MODEL is a folder of weights in the dtype.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from taken import run_phoneready

from cfsp.files import write_json
from cfsp.models.weights import safetensors_files, sha256_files
from cfsp.units import format_bytes
from runtime_bench.presentation.table import Column, Table


@dataclass(frozen=True)
class Way:
    """One run.

    Attributes:
        name: How weights were kept.
        cpu_seconds: Processor time.
        peak_rss_bytes: Peak memory.
        sha256: Of the weights that were written.
    """

    name: str
    cpu_seconds: float
    peak_rss_bytes: int
    sha256: str


def main() -> None:
    """Print a table, one line a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--calibration", default="builtin:python-docs")
    parser.add_argument("--nsamples", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ways = [
        ("float32", "never", "auto"),
        (arguments.dtype, "never", arguments.dtype),
        ("files", "always", "auto"),
    ]
    made = [run(*way, arguments) for _ in range(arguments.rounds) for way in ways]
    columns: list[Column[Way]] = [
        Column("weights", lambda way: way.name),
        Column("processor time", lambda way: f"{way.cpu_seconds:.1f} s", right=True),
        Column("peak memory", lambda way: format_bytes(way.peak_rss_bytes), right=True),
        Column("written", lambda way: way.sha256[:12]),
    ]
    print(Table(columns, made).markdown())
    if arguments.json:
        write_json(arguments.json, [asdict(way) for way in made])
    if len({way.sha256 for way in made}) > 1:
        sys.exit("not the same bytes were written")


def run(name: str, stream: str, dtype: str, arguments: argparse.Namespace) -> Way:
    """Prune once."""
    pruned = arguments.output / name
    sizes = [
        "--set",
        f"nsamples={arguments.nsamples}",
        "--set",
        f"seqlen={arguments.seqlen}",
        "--set",
        f"dtype={dtype}",
    ]
    words = [
        "prune",
        arguments.model,
        "-o",
        pruned,
        "--force",
        "--calibration",
        arguments.calibration,
        *sizes,
    ]
    took = run_phoneready(name, [*map(str, words)], PHONEREADY_STREAM=stream)
    sha256 = sha256_files(safetensors_files(pruned))
    return Way(name, took.cpu_seconds, took.peak_rss_bytes, sha256)


if __name__ == "__main__":
    main()
