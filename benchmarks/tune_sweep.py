"""Does `phoneready tune` find what a fine sweep finds, and in which share of its time?

    python benchmarks/tune_sweep.py -o scratch --limit 80MB

SmolLM2-135M, the least KL divergence of a Q4_0 file within a size. The sweep makes and measures a file at every ratio
of a grid and every allocation, from one calibration, as the search does; both are timed in processor seconds of this
process (all threads), which other load on the machine changes little. Rows of the sweep are kept in the scratch folder:
an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from cfsp.records import read_record
from cfsp.units import parse_bytes
from phoneready.console import note, prepare_torch
from phoneready.settings.release import parse_config
from phoneready.settings.schema import ReleaseConfig
from phoneready.tune.forecast import Forecast, MeasuredPoint
from phoneready.tune.limits import Judged, Limits
from phoneready.tune.result import TuneResult
from phoneready.tune.run import RESULT_FILE, tune
from phoneready.tune.space import Point, Recipe
from phoneready.tune.trial import Bench
from phoneready.tune.trial_runner import TrialRunner

CONFIG = """
[model]
reference = "{model}"
[prune]
calibration = ["{text}"]
nsamples = {nsamples}
seqlen = 512
[evaluate]
text = ["builtin:python-docs"]
chats = []
seqlen = 512
max_windows = {windows}
[export]
quants = ["Q4_0"]
[tune]
allocations = {allocations}
[[budgets]]
metric = "file_bytes"
at_most = {limit}
"""


def main() -> None:
    """Search, sweep, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--limit", default="80MB")
    parser.add_argument("--allocations", nargs="+", default=["cfsp", "uniform"])
    parser.add_argument(
        "--ratios", nargs=3, type=float, default=[0.10, 0.40, 0.02], metavar=("FROM", "TO", "STEP")
    )
    parser.add_argument(
        "--swept", nargs="+", help="allocations of the sweep; those of the search unless given"
    )
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--nsamples", type=int, default=8)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    prepare_torch(chosen.threads)
    limit = round(parse_bytes(chosen.limit, "limit"))
    config = parse_config(
        CONFIG.format(
            model=chosen.model, text=chosen.calibration, nsamples=chosen.nsamples, windows=chosen.windows,
            allocations=json.dumps(chosen.allocations), limit=limit,
        ),
        where="the benchmark",
    )  # fmt: skip
    found = search(config, chosen.output, chosen.threads)
    swept = chosen.swept or chosen.allocations
    rows = sweep(config, chosen.output, swept, ratios(*chosen.ratios), chosen.threads)
    report(found, rows, limit)
    print(covered(chosen.output, rows))


def ratios(low: float, high: float, step: float) -> list[float]:
    """The grid, both ends in it."""
    return [round(low + i * step, 4) for i in range(round((high - low) / step) + 1)]


def search(config: ReleaseConfig, output: Path, threads: int) -> dict[str, Any]:
    """The search, from nothing, once."""
    kept = output / "search.json"
    if not kept.is_file():
        shutil.rmtree(output / "tuned", ignore_errors=True)
        began, wall = time.process_time(), time.monotonic()
        result = tune(config, output / "tuned", show=note, threads=threads)
        seconds, wall = time.process_time() - began, time.monotonic() - wall
        best = result.best
        assert best is not None
        row = {"seconds": seconds, "wall": wall, "divergence": best.divergence, "file_bytes": best.file_bytes}
        row |= {"prune_ratio": best.prune_ratio, "trials": len(result.trials)}
        kept.write_text(json.dumps(row), encoding="utf-8")
    row = json.loads(kept.read_text(encoding="utf-8"))
    note(json.dumps(row))
    return row


def sweep(
    config: ReleaseConfig, output: Path, allocations: list[str], grid: list[float], threads: int
) -> list[dict[str, Any]]:
    """Every ratio and allocation; the first row's time has the calibration in it."""
    kept, rows = output / "sweep.jsonl", []
    if kept.is_file():
        rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    bench = Bench(TrialRunner(config, output / "swept", threads), Limits(config))
    for allocation in allocations:
        for ratio in grid:
            if any((row["allocation"], row["prune_ratio"]) == (allocation, ratio) for row in rows):
                continue
            began = time.process_time()
            measured = bench.measure(_point(allocation, ratio))
            seconds = time.process_time() - began
            kl = next(f.value for f in measured.figures.figures if f.key.metric == "kl_mean")
            row = {"allocation": allocation, "prune_ratio": ratio, "divergence": kl, "seconds": seconds}
            rows.append(row | {"file_bytes": measured.file_bytes})
            note(json.dumps(rows[-1]))
            with kept.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(rows[-1]) + "\n")
    return rows


def report(found: dict[str, Any], rows: list[dict[str, Any]], limit: int) -> None:
    """What both found, and the share of the time."""
    best = min((row for row in rows if row["file_bytes"] <= limit), key=lambda row: row["divergence"])
    seconds = sum(row["seconds"] for row in rows)
    line = "{:>6} {:3} points, {:6.0f} s, KL {:.4f}, {} bytes"
    print(line.format("tune:", found["trials"], found["seconds"], found["divergence"], found["file_bytes"]))
    print(line.format("sweep:", len(rows), seconds, best["divergence"], best["file_bytes"]))
    print(f"KL {found['divergence'] / best['divergence']:.4f} times the sweep's")
    print(f"time {found['seconds'] / seconds:.3f} of the sweep's")


def covered(output: Path, rows: list[dict[str, Any]]) -> str:
    """How the search's predictions from its few trials stand against the sweep, beyond the point that it began with."""
    trials = read_record(TuneResult, output / "tuned" / RESULT_FILE).trials
    tried = [MeasuredPoint(trial, Judged(())) for trial in trials]
    forecast, inside, errors = Forecast(tried), 0, []
    for row in rows:
        expected = forecast.divergence(_point(row["allocation"], row["prune_ratio"]))
        assert expected is not None
        inside += expected.low <= row["divergence"] <= expected.high
        errors.append(abs(expected.value / row["divergence"] - 1))
    return f"predicted: {inside} of {len(rows)} in the interval, median error {sorted(errors)[len(errors) // 2]:.1%}"


def _point(allocation: str, prune_ratio: float) -> Point:
    return Point(Recipe("Q4_0", allocation, 32, False), prune_ratio)


if __name__ == "__main__":
    main()
