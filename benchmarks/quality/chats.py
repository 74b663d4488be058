"""What the calibration text does to a chat model: KL and same-top-1 against the dense model on held-out chats.

Every 20th chat of the data is held out; the model is calibrated on the others, on text, on both, or on what it
wrote itself. Without any training.

    python benchmarks/quality/chats.py --chats chats.jsonl --text text.jsonl [--ratios 0.2] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from cfsp.calibration import load_calibration
from cfsp.evaluation import divergence, sample_answers
from cfsp.files import write_json
from cfsp.model_reference import load_model
from cfsp.prune import prune_model
from cfsp.prune_settings import PruneSettings
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


def settings_from(prune_ratio: float, given: list[str]) -> PruneSettings:
    """The defaults with NAME=VALUE changes; a value has the type of the default."""
    changes = {}
    for name, _, value in (change.partition("=") for change in given):
        changes[name] = type(getattr(PruneSettings(), name))(value)
    return PruneSettings(prune_ratio=prune_ratio, **changes)


def main() -> None:
    """Print one JSON line a source, size and ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chats", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2])
    parser.add_argument("--sources", nargs="+", default=["self", "text", "chats", "both"])
    parser.add_argument("--nsamples", type=int, nargs="+", default=[96])
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="Other settings to prune with."
    )
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
        for nsamples, source in itertools.product(arguments.nsamples, arguments.sources):
            drawn = load_calibration(references[source], loaded, nsamples=nsamples, seqlen=1024, seed=0)
            for ratio in arguments.ratios:
                settings = settings_from(ratio, arguments.set)
                pruned = replace(loaded, model=copy.deepcopy(loaded.model))
                prune_model(pruned, drawn, settings)
                result = divergence(loaded.model, pruned.model, windows)
                rows.append(
                    {
                        "source": source,
                        "calibration_tokens": drawn.n_tokens,
                        "settings": asdict(settings),
                        "kl_mean": round(result.kl_mean, 4),
                        "same_top1": round(result.same_top1, 4),
                        "perplexity_ratio": round(result.perplexity_ratio, 4),
                        "n_tokens": result.n_tokens,
                        "answers": sample_answers(pruned.model, loaded.tokenizer, max_new_tokens=40),
                    }
                )
                print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
