"""What calibration and pruning cost beside a plain forward pass over the same tokens, in time and memory.

Each measurement is a fresh process: one runs the model over all windows, the other collects statistics and prunes,
block by block. They take turns. The ratio is that of CPU times (user + system, all threads), which other
load on the machine disturbs less than wall time; wall times are printed too. Peak memory is the process's own while it
works, after the model has been loaded (loading dequantizes, which needs more for a moment).

    python benchmarks/calibration_cost.py [--model smollm2-135m] [--nsamples 32] [--seqlen 1024] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from cfsp.models.reference import load_model
from cfsp.models.source import LoadedModel
from cfsp.precision import products_in
from cfsp.pruning.block_by_block import apply_plan
from cfsp.pruning.plan import make_plan
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.statistics import collect_statistics
from cfsp.text.calibration import Calibration
from runtime_bench.counters import current_rss_bytes, peak_rss_bytes
from runtime_bench.records.summary import ratio_interval


def measure(kind: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Run one side in this process."""
    loaded = load_model(arguments.model)
    ids = torch.randint(
        0,
        loaded.model.config.vocab_size,
        (arguments.nsamples, arguments.seqlen),
        generator=torch.Generator().manual_seed(0),
    )
    model_bytes = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    before = current_rss_bytes()
    # 5 resets the peak of this process (proc(5), clear_refs).
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    wall, cpu = time.perf_counter(), time.process_time()
    result = SIDES[kind](loaded, ids)
    return {
        **result,
        "wall_s": result.get("wall_s", time.perf_counter() - wall),
        "cpu_s": result.get("cpu_s", time.process_time() - cpu),
        "model_bytes": model_bytes,
        "rss_before_bytes": before or 0,
        "peak_rss_bytes": peak_rss_bytes() or 0,
    }


def forward(loaded: LoadedModel, ids: torch.Tensor) -> dict[str, float]:
    """The plain pass."""
    with torch.inference_mode(), products_in(PruneSettings().dtype, "cpu"):
        for window in ids:
            loaded.model(input_ids=window[None], use_cache=False)
    return {}


def block_by_block(loaded: LoadedModel, ids: torch.Tensor) -> dict[str, float]:
    """Statistics, plan, and the two streams with their solves."""
    wall, cpu = time.perf_counter(), time.process_time()
    settings = PruneSettings()
    calibration = Calibration(ids, ("random tokens",), seed=0, sha256="")
    with products_in(settings.dtype, "cpu"):
        statistics = collect_statistics(loaded.model, ids, keep_states=True)
    plan = make_plan(loaded, statistics, calibration, settings)
    apply_plan(loaded.model, plan, input_ids=ids, states=statistics.states)
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


SIDES = {"forward": forward, "block-by-block": block_by_block}


def main() -> None:
    """Take turns and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments)))
        return
    samples: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(arguments.rounds):
        for side, collected in samples.items():
            run = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--side", side], stdout=subprocess.PIPE, check=True
            )
            collected.append(json.loads(run.stdout.splitlines()[-1]))
            print(side, collected[-1], file=sys.stderr, flush=True)
    report(samples)


def report(samples: dict[str, list[dict[str, float]]]) -> None:
    """Medians, the ratio with its interval, and memory beyond the model."""
    mib = 2**20
    for side, rows in samples.items():
        columns = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        extra = (columns["peak_rss_bytes"] - columns["model_bytes"]) / mib
        print(
            f"{side}: cpu {columns['cpu_s']:.1f} s, wall {columns['wall_s']:.1f} s, "
            f"peak RSS {columns['peak_rss_bytes'] / mib:.0f} MiB, "
            f"that is model + {extra:.0f} MiB (loaded process: {columns['rss_before_bytes'] / mib:.0f} MiB)"
        )
    for key in ("cpu_s", "wall_s"):
        base, new = ([row[key] for row in samples[name]] for name in SIDES)
        print(f"{key} ratio block-by-block / forward: {ratio_interval(new, base, paired=True)}")


if __name__ == "__main__":
    main()
