"""What it saves that freed tensors are kept for the next ones (glibc): the same arithmetic with and without, in turns.

Each is a process of its own, which computes a few times before it is timed. `cfsp.memory.keep_freed_memory` is what
differs; pages that the system hands out anew are its minor faults.

    python benchmarks/freed_memory.py [--rounds 7] [--repeats 20]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F

from cfsp.memory import SET_BY_USERS, keep_freed_memory
from cfsp.recovery.losses import CHUNK_TOKENS, distillation_loss
from runtime_bench.presentation.table import Column, Table
from runtime_bench.records.summary import ratio_interval

VOCABULARY = 49_152
PRODUCT_BYTES = 50_000_000
WARM_UPS = 3


@dataclass(frozen=True)
class Sample:
    """What one run of the arithmetic took, of a process's repeats the mean.

    Attributes:
        wall_ms: Wall time.
        cpu_ms: Processor time.
        faults: Pages handed out.
    """

    wall_ms: float
    cpu_ms: float
    faults: float


def loss() -> Callable[[], object]:
    """Of a chunk of positions that a model is distilled with."""
    z, teacher = torch.randn(2, CHUNK_TOKENS, VOCABULARY)
    return lambda: distillation_loss(z, teacher)


def gated() -> Callable[[], object]:
    """silu(x) x."""
    x = torch.randn(PRODUCT_BYTES // 4)
    return lambda: F.silu(x) * x


ARITHMETIC = MappingProxyType(
    {
        f"distillation loss, {CHUNK_TOKENS} positions of {VOCABULARY:,} tokens": loss,
        f"silu(x) * x, {PRODUCT_BYTES // 10**6} MB": gated,
    }
)


def main() -> None:
    """Take turns and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        name, side = arguments.side
        print(json.dumps(vars(measure(name, side, arguments.repeats))))
        return
    if any(name in os.environ for name in SET_BY_USERS):
        sys.exit(f"the environment says what is kept: unset {', '.join(SET_BY_USERS)}")
    samples: dict[tuple[str, str], list[Sample]] = {
        (name, side): [] for name in ARITHMETIC for side in ("given back", "kept")
    }
    for _ in range(arguments.rounds):
        for (name, side), collected in samples.items():
            words = [sys.executable, __file__, "--repeats", str(arguments.repeats), "--side", name, side]
            done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
            collected.append(Sample(**json.loads(done.stdout)))
    columns: list[Column[tuple[str, str]]] = [
        Column("", lambda row: row[0]),
        Column("freed tensors", lambda row: row[1]),
        *(
            Column(head, partial(shown, samples, key), right=True)
            for head, key in (("ms", "wall_ms"), ("processor ms", "cpu_ms"), ("pages handed out", "faults"))
        ),
    ]
    print(Table(columns, list(samples)).markdown())
    for name in ARITHMETIC:
        for key in ("wall_ms", "cpu_ms"):
            new, base = (
                [getattr(row, key) for row in samples[name, side]] for side in ("kept", "given back")
            )
            ratio = ratio_interval(new, base, paired=True)
            print(f"{name}: {key} kept / given back {ratio.ratio:.2f} ({ratio.low:.2f} to {ratio.high:.2f})")


def measure(name: str, side: str, repeats: int) -> Sample:
    """One process's."""
    if side == "kept":
        keep_freed_memory()
    compute = ARITHMETIC[name]()
    for _ in range(WARM_UPS):
        compute()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        compute()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return Sample(1000 * wall / repeats, 1000 * cpu / repeats, faults / repeats)


def shown(samples: dict[tuple[str, str], list[Sample]], key: str, row: tuple[str, str]) -> str:
    """Median of the processes'."""
    return f"{statistics.median(getattr(sample, key) for sample in samples[row]):.0f}"


if __name__ == "__main__":
    main()
