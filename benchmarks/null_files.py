"""How often the sentences about files are false: 1,000 made-up searches in which nothing pays.

    python benchmarks/null_files.py --cases 1000

Each has a dense file and eight pruned ones that lose the same on average, on windows that differ far more than they.
First what `choose_and_test` says, which chooses on half of the windows; then what is said of the windows that it was
chosen on. For "no difference" the pruned files lose 4 % more, so that it is false.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter

import numpy as np

from phoneready.evaluation.evaluation_record import TextLoss
from phoneready.evaluation.measured_file import choose_and_test
from phoneready.release.steps import FileLosses
from runtime_bench.records.compare import BETTER, NO_DIFFERENCE, WORSE, judge_pairs

FILES, WINDOWS = 8, 16
_Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def made_up(rng: np.random.Generator, role: str, shift: float, hard: _Floats, sizes: _Floats) -> FileLosses:
    """A file whose loss on each window scatters by 8 % about the window's own."""
    nats = math.log(2) * hard * sizes * shift * np.exp(rng.normal(-0.0032, 0.08, len(hard)))
    text = TextLoss(
        "text", "made up", 64, "0" * 64, tuple(map(int, sizes)), (63,) * len(hard), tuple(map(float, nats))
    )
    return FileLosses(f"{role}-{rng.integers(2**62)}", 100, (text,), role, "Q4_0")


def simulate(cases: int, seed: int, *, naive: bool = False) -> dict[str, float]:
    """Sentence -> the share of cases in which it is said and is false."""
    rng, said = np.random.default_rng(seed), Counter[str]()
    for _ in range(cases):
        hard, sizes = np.exp(rng.normal(0, 0.3, WINDOWS)), np.floor(rng.uniform(2000, 4000, WINDOWS))
        for shift, false in (
            (1.0, {BETTER: "paid", WORSE: "did not pay"}),
            (1.04, {NO_DIFFERENCE: "no difference"}),
        ):
            dense = [made_up(rng, "dense", 1.0, hard, sizes)]
            pruned = [made_up(rng, "shipped", shift, hard, sizes) for _ in range(FILES)]
            if naive:
                best = min(pruned, key=lambda file: file.bits_per_byte)
                verdict = judge_pairs(
                    dense[0].windows, best.windows, threshold=0.0 if shift == 1.0 else 0.03
                ).verdict
            else:
                tested = choose_and_test(dense, pruned)
                assert tested is not None
                verdict = tested.found.verdict
            said[false.get(verdict, "")] += 1
    return {name: said[name] / cases for name in ("paid", "did not pay", "no difference")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    for name, way in (("chosen on half of the windows", False), ("naive", True)):
        print(name, simulate(asked.cases, asked.seed, naive=way))
