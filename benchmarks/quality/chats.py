"""What the calibration text does to a chat model: KL and same-top-1 against the dense model on held-out chats.

Every 20th chat of the data is held out; the model is calibrated on the others, on text, on both, or on what it
wrote itself. Without any training.

    python benchmarks/quality/chats.py --chats chats.jsonl --text text.jsonl [--ratios 0.2] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import tempfile
from pathlib import Path

from cfsp.calibration import load_calibration
from cfsp.evaluation import divergence, sample_answers
from cfsp.files import write_json
from cfsp.model_reference import load_model
from cfsp.plan import PruneSettings, apply_plan
from cfsp.prune import plan_for
from cfsp.statistics import collect_statistics
from cfsp.text import token_windows

HELD_OUT_EVERY = 20


def split_chats(path: Path, directory: Path) -> tuple[Path, Path]:
    """Write every 20th row to one file and the others to another; returns (train, held_out)."""
    train, held_out = directory / "train.jsonl", directory / "held_out.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # Data sets are often sorted by origin; the first windows should show all of them.
    kept = random.Random(0).sample(lines[::HELD_OUT_EVERY], len(lines[::HELD_OUT_EVERY]))
    held_out.write_text("".join(kept), encoding="utf-8")
    train.write_text("".join(x for i, x in enumerate(lines) if i % HELD_OUT_EVERY), encoding="utf-8")
    return train, held_out


def main() -> None:
    """Print one JSON line a source, size, score and ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chats", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2])
    parser.add_argument("--scores", nargs="+", default=[PruneSettings().score])
    parser.add_argument("--sources", nargs="+", default=["self", "text", "chats", "both"])
    parser.add_argument("--nsamples", type=int, nargs="+", default=[128])
    parser.add_argument("--ridge", type=float, nargs="+", default=[PruneSettings().ridge])
    parser.add_argument("--strength", type=float, nargs="+", default=[PruneSettings().strength])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    loaded = load_model("smollm2-135m")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        train, held_out = split_chats(arguments.chats, Path(temporary))
        windows = token_windows(str(held_out), loaded.tokenizer, seqlen=1024, max_windows=arguments.windows)
        references = {
            "self": ["self"],
            "text": [str(arguments.text)],
            "chats": [str(train)],
            "both": [str(train), str(arguments.text)],
        }
        for nsamples in arguments.nsamples:
            for source in arguments.sources:
                calibration = load_calibration(
                    references[source], loaded, nsamples=nsamples, seqlen=1024, seed=0
                )
                statistics = collect_statistics(loaded.model, calibration.input_ids)
                settings = [
                    PruneSettings(prune_ratio=r, score=s, ridge=g, strength=a)
                    for r in arguments.ratios
                    for s in arguments.scores
                    for g in arguments.ridge
                    for a in arguments.strength
                ]
                for setting in settings:
                    plan = plan_for(loaded, statistics, calibration, setting)
                    model = copy.deepcopy(loaded.model)
                    apply_plan(model, plan, grams=statistics.grams)
                    result = divergence(loaded.model, model, windows)
                    rows.append(
                        {
                            "source": source,
                            "nsamples": nsamples,
                            "prune_ratio": setting.prune_ratio,
                            "score": setting.score,
                            "ridge": setting.ridge,
                            "strength": setting.strength,
                            "kl_mean": round(result.kl_mean, 4),
                            "same_top1": round(result.same_top1, 4),
                            "perplexity_ratio": round(result.perplexity_ratio, 4),
                            "n_tokens": result.n_tokens,
                            "answers": sample_answers(model, loaded.tokenizer, max_new_tokens=40),
                        }
                    )
                    print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
