"""How far a model can be pruned: what its plan predicts from calibration alone, held against what pruning costs.

The model is pruned to every ratio of the forecast and held against the dense one on windows of each text; none of them
should be calibrated on.

    python benchmarks/quality/how_far.py MODEL --calibration self --text chats.jsonl wiki.test.raw
        [--nsamples 32] [--seqlen 512] [--windows 6]
"""

from __future__ import annotations

import argparse
import copy

from pruning import Remembered

from cfsp.evaluation.loss import divergence
from cfsp.models.reference import load_model
from cfsp.pruning.block_by_block import apply_plan
from cfsp.pruning.prune import plan_model
from cfsp.pruning.settings import PruneSettings
from cfsp.text.tokens import token_windows
from phoneready.text import load_calibration


def main() -> None:
    """Print a Markdown table, a row for each ratio as soon as it is known."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", default=["self"])
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=6)
    arguments = parser.parse_args()
    loaded = load_model(arguments.model)
    drawn = load_calibration(
        arguments.calibration, loaded, nsamples=arguments.nsamples, seqlen=arguments.seqlen
    )
    loaded, drawn, plan, states = plan_model(loaded, drawn, PruneSettings())
    assert plan.forecast is not None
    dense = Remembered(loaded.model)
    texts = [
        token_windows(name, loaded.tokenizer, seqlen=arguments.seqlen, max_windows=arguments.windows)
        for name in arguments.text
    ]
    print(
        f"| removed | predicted | {' | '.join(arguments.text)} |\n|{'---:|' * (2 + len(texts))}", flush=True
    )
    for ratio, loss in zip(plan.forecast.ratios, plan.forecast.losses, strict=True):
        pruned = copy.deepcopy(loaded.model)
        apply_plan(pruned, plan.at_ratio(ratio), input_ids=drawn.input_ids, states=states)
        found = [divergence(dense, pruned, windows).kl_mean for windows in texts]
        cells = (f"{kl:.3f} ({kl / loss:.2f})" for kl in found)
        print(f"| {ratio:.0%} | {loss:.3f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
