"""Perplexity of SmolLM2-135M-Instruct on WikiText-2 test after pruning, without any training.

The paper's settings against phoneready's defaults and what lies between, at equal kept shares of FFN channels.
Calibration: 128 random windows of 1024 tokens of the validation split, seed 0. Measured on the first 74 windows of
1024 tokens of the test split.

    python benchmarks/quality/wikitext.py --wikitext DIR [--ratios 0.2 0.3 0.5] [--json FILE]

DIR holds wiki.validation.raw and wiki.test.raw (WikiText-2 raw, CC BY-SA).
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from cfsp.evaluation.loss import perplexity
from cfsp.files import write_json
from cfsp.models.reference import load_model
from cfsp.precision import products_in
from cfsp.pruning.block_by_block import apply_plan
from cfsp.pruning.plan import make_plan
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.statistics import collect_statistics
from cfsp.text.calibration import load_calibration
from cfsp.text.tokens import token_windows

PAPER = PruneSettings(score="activation_norm", align=1, reconstruct="none", dtype="float32")
VARIANTS = {
    "CFSP, the paper's settings": PAPER,
    "phoneready's defaults": PruneSettings(),
    "channels ranked by `activation_norm`": PruneSettings(score="activation_norm"),
}


def main() -> None:
    """Print one JSON line a variant and ratio, then a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--windows", type=int, default=74)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    loaded = load_model("smollm2-135m")
    calibration = load_calibration(
        [str(arguments.wikitext / "wiki.validation.raw")],
        loaded,
        nsamples=arguments.nsamples,
        seqlen=1024,
        seed=0,
    )
    test = token_windows(
        str(arguments.wikitext / "wiki.test.raw"),
        loaded.tokenizer,
        seqlen=1024,
        max_windows=arguments.windows,
    )
    rows: list[dict[str, Any]] = []

    def show(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)

    show({"variant": "dense", "prune_ratio": 0.0, "perplexity": perplexity(loaded.model, test)})
    for name in arguments.variants:
        # Statistics are of the dense model: they serve all ratios.
        with products_in(VARIANTS[name].dtype, loaded.model.device.type):
            statistics = collect_statistics(loaded.model, calibration.input_ids, keep_states=True)
        for ratio in arguments.ratios:
            plan = make_plan(loaded, statistics, calibration, replace(VARIANTS[name], prune_ratio=ratio))
            model = copy.deepcopy(loaded.model)
            apply_plan(model, plan, input_ids=calibration.input_ids, states=statistics.states)
            show(
                {
                    "variant": name,
                    "prune_ratio": ratio,
                    "keep_ratio": round(plan.keep_ratio, 5),
                    "perplexity": perplexity(model, test),
                    "n_scored": test.ids[:, 1:].numel(),
                    "windows_sha256": test.sha256,
                }
            )
    if arguments.json:
        write_json(arguments.json, rows)
    print("\n| variant | " + " | ".join(map(str, arguments.ratios)) + " |")
    print("|---" * (len(arguments.ratios) + 1) + "|")
    for name in arguments.variants:
        cells = [f"{r['perplexity']:.2f}" for r in rows if r["variant"] == name]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
