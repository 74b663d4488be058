"""How often does measuring on until a budget is decided decide it wrongly? A simulation of its fixed looks.

    python benchmarks/measuring_on.py [--trials 1000] [--rounds 8] [--looks 5] [--noise 0.05] [--resamples 1000]

Two files of the same speed are measured in turns, with rounds that scatter and drift, and held against the budget "at
least as fast as the other". The truth lies on the limit, so every decision is an error; 95 % allow 5 % of them. After
each look the samples are doubled until the budget is decided or the looks are used up. Beside the looks as a release
takes them stand looks of 95 % each. A file that is faster by some share says how many rounds a decision takes.

The table goes to stdout. Exit status 1: a release's looks err in more than 5 % of the trials, by more than chance.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence

import numpy as np

from cfsp.errors import LimitError
from phoneready.console import errors_as_exit_status
from phoneready.release.results import LOOKS
from runtime_bench.presentation.table import table_of
from runtime_bench.records.compare import fewest
from runtime_bench.records.summary import CONFIDENCE, ratio_interval


def decided_after(
    base: Sequence[float], new: Sequence[float], rounds: int, looks: int, confidence: float, resamples: int
) -> int | None:
    """Rounds after which the interval of new's speed over base's lies on one side of 1; None where it never does."""
    for look in range(looks):
        n = rounds * 2**look
        if n < fewest(confidence):
            continue
        found = ratio_interval(
            base[:n], new[:n], paired=True, confidence=confidence, resamples=resamples, seed=look
        )
        if found.low > 1 or found.high < 1:
            return int(n)
    return None


def trial(
    generator: np.random.Generator, rounds: int, noise: float, faster: float
) -> tuple[list[float], list[float]]:
    """Times of a file and of one that is faster, round by round, on a machine that drifts."""
    drift = np.exp(np.cumsum(generator.normal(0, noise / 3, rounds)))
    base, new = (drift * np.exp(generator.normal(0, noise, rounds)) for _ in range(2))
    return list(base), list(new / (1 + faster))


def simulate(arguments: argparse.Namespace, faster: float, confidence: float) -> tuple[float, float | None]:
    """Share of trials that are decided, and the median of the rounds that it took."""
    generator, found = np.random.default_rng(1), []
    for _ in range(arguments.trials):
        sides = trial(generator, arguments.rounds * 2 ** (arguments.looks - 1), arguments.noise, faster)
        found.append(
            decided_after(*sides, arguments.rounds, arguments.looks, confidence, arguments.resamples)
        )
    decided = [n for n in found if n is not None]
    return len(decided) / len(found), statistics.median(decided) if decided else None


def run(arguments: argparse.Namespace) -> None:
    """Simulate, print, hold against the limit."""
    rows = []
    errs = 0.0
    for faster in (0.0, 0.02, 0.05, 0.1):
        for confidence in (1 - (1 - CONFIDENCE) / arguments.looks, CONFIDENCE):
            share, rounds = simulate(arguments, faster, confidence)
            row = {"faster by": f"{faster:.0%}", "confidence of a look": f"{confidence:.0%}"}
            rows.append(row | {"decided": f"{share:.1%}", "median rounds": f"{rounds}"})
            if not faster and confidence > CONFIDENCE:
                errs = share
    print(table_of(rows).markdown(), end="")
    chance = 2 * math.sqrt(0.05 * 0.95 / arguments.trials)
    if errs > 1 - CONFIDENCE + chance:
        raise LimitError(f"{errs:.1%} of decisions on the limit, allowed are {1 - CONFIDENCE:.0%}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="simulated benchmarks (1000)")
    parser.add_argument("--rounds", type=int, default=8, help="rounds before the first look (8)")
    parser.add_argument("--looks", type=int, default=LOOKS, help=f"most looks ({LOOKS})")
    parser.add_argument("--noise", type=float, default=0.05, help="scatter of the times of a round (0.05)")
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap draws (1000)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run, with expected failures as one line and an exit status."""
    with errors_as_exit_status():
        run(parse(argv))


if __name__ == "__main__":
    main()
