"""What pruning costs a chat model, by calibration text and by settings, without any training.

Every row of --variants, --sources, --nsamples and --ratios is pruned, and held against the dense model on held-out
chats (every 20th chat, in random order) and on the last quarter of WikiText-2's validation split; the source
`wikitext` calibrates on the other three quarters. A row that --json has already is not done again.

    python benchmarks/quality/pruning.py --chats chats.jsonl --text text.jsonl --wikitext wiki.validation.raw
        [--variants default] [--sources both] [--nsamples 96] [--ratios 0.2] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cfsp.calibration import load_calibration
from cfsp.evaluation import divergence, sample_answers
from cfsp.files import read_json, write_json
from cfsp.model_reference import LoadedModel, load_model
from cfsp.prune import prune_model
from cfsp.prune_settings import PruneSettings
from cfsp.text import TokenWindows, token_windows

MODEL = "smollm2-135m"
HELD_OUT_EVERY = 20
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "score cfsp": {"score": "cfsp"},
    "score wanda_sp": {"score": "wanda_sp"},
    "score flap": {"score": "flap"},
    "score magnitude": {"score": "magnitude"},
    "score taylor": {"score": "taylor"},
    "score fisher": {"score": "fisher"},
    "score obs": {"score": "obs"},
    "score obs_loss": {"score": "obs_loss"},
    "allocation uniform": {"allocation": "uniform"},
    "allocation loss": {"allocation": "loss"},
    "allocation mixed": {"allocation": "mixed"},
    "strength 4": {"strength": 4.0},
    "obs_loss, mixed": {"score": "obs_loss", "allocation": "mixed"},
    "no reconstruction": {"reconstruct": "none"},
    "mean reconstruction": {"reconstruct": "mean"},
    "one-pass reconstruction": {"reconstruct": "one-pass", "ridge": 1e-3},
    "correction 0": {"correction": 0.0},
    "correction 1": {"correction": 1.0},
    "ridge 0.001": {"ridge": 1e-3},
    "float32 products": {"dtype": "float32"},
}
"""Name to what differs from the defaults."""
COLUMNS = ("chat_kl", "chat_top1", "chat_ratio", "text_kl", "text_top1", "text_ratio")


def split_chats(path: Path, directory: Path) -> tuple[Path, Path]:
    """Write every 20th row to one file and the others to another; returns (train, held_out)."""
    train, held_out = directory / "train.jsonl", directory / "held_out.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # Data sets are often sorted by origin; the first windows should show all of them.
    kept = random.Random(0).sample(lines[::HELD_OUT_EVERY], len(lines[::HELD_OUT_EVERY]))
    held_out.write_text("".join(kept), encoding="utf-8")
    train.write_text("".join(x for i, x in enumerate(lines) if i % HELD_OUT_EVERY), encoding="utf-8")
    return train, held_out


def split_wikitext(path: Path, directory: Path) -> tuple[Path, Path]:
    """Write the first three quarters of the lines to one file and the others to another."""
    train, held_out = directory / "wikitext-train.txt", directory / "wikitext-held-out.txt"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = len(lines) * 3 // 4
    train.write_text("".join(lines[:cut]), encoding="utf-8")
    held_out.write_text("".join(lines[cut:]), encoding="utf-8")
    return train, held_out


def main() -> None:
    """Print one JSON line a row, then a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chats", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, "all"], default=["default"])
    parser.add_argument("--sources", nargs="+", default=["both"])
    parser.add_argument("--nsamples", type=int, nargs="+", default=[96])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2])
    parser.add_argument("--windows", type=int, default=16, help="Of 1024 tokens to measure on, of each text.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    variants = list(VARIANTS) if "all" in arguments.variants else arguments.variants
    loaded = load_model(MODEL)
    rows: list[dict[str, Any]] = (
        read_json(arguments.json) if arguments.json and arguments.json.exists() else []
    )
    with tempfile.TemporaryDirectory() as temporary:
        train, held_chats = split_chats(arguments.chats, Path(temporary))
        encyclopedia, held_text = split_wikitext(arguments.wikitext, Path(temporary))
        references = {
            "self": ["self"],
            "wikitext": [str(encyclopedia)],
            "text": [str(arguments.text)],
            "chats": [str(train)],
            "both": [str(train), str(arguments.text)],
        }
        measured = {
            name: token_windows(str(path), loaded.tokenizer, seqlen=1024, max_windows=arguments.windows)
            for name, path in (("chat", held_chats), ("text", held_text))
        }
        for key in itertools.product(variants, arguments.sources, arguments.nsamples, arguments.ratios):
            if any(key == (r["variant"], r["source"], r["nsamples"], r["prune_ratio"]) for r in rows):
                continue
            rows.append(row(loaded, *key, references[key[1]], measured))
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
            if arguments.json:
                write_json(arguments.json, rows)
    print(table(rows))


def row(
    loaded: LoadedModel,
    variant: str,
    source: str,
    nsamples: int,
    ratio: float,
    references: list[str],
    measured: dict[str, TokenWindows],
) -> dict[str, Any]:
    """Prune a copy of the model and measure it."""
    drawn = load_calibration(references, loaded, nsamples=nsamples, seqlen=1024, seed=0)
    settings = PruneSettings(**{"prune_ratio": ratio} | VARIANTS[variant])
    pruned = replace(loaded, model=copy.deepcopy(loaded.model))
    started = time.monotonic()
    plan = prune_model(pruned, drawn, settings).plan
    seconds = time.monotonic() - started
    found: dict[str, Any] = {"variant": variant, "source": source, "nsamples": nsamples, "prune_ratio": ratio}
    found |= {"settings": asdict(plan.settings), "calibration_sha256": plan.calibration_sha256}
    found |= {"keep_ratio": round(plan.keep_ratio, 5), "seconds": round(seconds, 1)}
    for name, windows in measured.items():
        result = divergence(loaded.model, pruned.model, windows)
        found |= {f"{name}_kl": round(result.kl_mean, 4), f"{name}_top1": round(result.same_top1, 4)}
        found |= {f"{name}_ratio": round(result.perplexity_ratio, 4), f"{name}_tokens": result.n_tokens}
    return found | {"answers": sample_answers(pruned.model, loaded.tokenizer, max_new_tokens=40)}


def table(rows: list[dict[str, Any]]) -> str:
    """Every row's figures."""
    head = ("variant", "source", "nsamples", "prune_ratio", *COLUMNS)
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(str(r[name]) for name in head) + " |" for r in rows)])


if __name__ == "__main__":
    main()
