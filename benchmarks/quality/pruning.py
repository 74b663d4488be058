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
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from cfsp.evaluation.language_model import PROMPTS, answer
from cfsp.evaluation.loss import divergence
from cfsp.evaluation.torch_model import TorchLanguageModel, next_token_logits
from cfsp.files import write_json
from cfsp.models.reference import load_model
from cfsp.models.source import LoadedModel
from cfsp.precision import products_in, rounding_dtype
from cfsp.pruning.block_by_block import apply_plan
from cfsp.pruning.plan import make_plan
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.statistics import BlockStatistics, collect_statistics
from cfsp.reading import read_json
from cfsp.text.calibration import Calibration, load_calibration
from cfsp.text.tokens import TokenWindows, token_windows

MODEL = "smollm2-135m"
HELD_OUT_EVERY = 20
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "score activation_norm": {"score": "activation_norm"},
    "strength 0": {"strength": 0.0},
    "strength 4": {"strength": 4.0},
    "no reconstruction": {"reconstruct": "none"},
    "correction 0": {"correction": 0.0},
    "correction 1": {"correction": 1.0},
    "ridge 0.001": {"ridge": 1e-3},
    "float32 products": {"dtype": "float32"},
    "bfloat16 products": {"dtype": "bfloat16"},
}
"""Name to what differs from the defaults."""
KEY = ("variant", "source", "nsamples", "prune_ratio")
COLUMNS = ("chat_kl", "chat_top1", "chat_ratio", "text_kl", "text_top1", "text_ratio")


class Remembered:
    """A model that computes its logits on a window of text once: 192 KiB a token where there are 49,152 tokens."""

    gives_logits = True

    def __init__(self, model: Any) -> None:
        self._model, self._found = model, dict[bytes, list[tuple[slice, torch.Tensor]]]()

    def next_token_logits(self, window: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """As `cfsp.evaluation.torch_model.next_token_logits`."""
        key = window.numpy().tobytes()
        if key not in self._found:
            self._found[key] = list(next_token_logits(self._model, window))
        return iter(self._found[key])


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
        dense = Remembered(loaded.model)
        done = {tuple(r[name] for name in KEY) for r in rows}
        for source, nsamples in itertools.product(arguments.sources, arguments.nsamples):
            keys = [
                key
                for variant, ratio in itertools.product(variants, arguments.ratios)
                if (key := (variant, source, nsamples, ratio)) not in done
            ]
            if not keys:
                continue
            drawn = load_calibration(references[source], loaded, nsamples=nsamples, seqlen=1024, seed=0)
            wanted = [settings_of(variant, ratio) for variant, _, _, ratio in keys]
            statistics = statistics_by_dtype(loaded, drawn, wanted)
            for key, settings in zip(keys, wanted, strict=True):
                found = row(
                    loaded, drawn, statistics[rounding_dtype(settings.dtype)], settings, measured, dense
                )
                rows.append(dict(zip(KEY, key, strict=True)) | found)
                print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
                if arguments.json:
                    write_json(arguments.json, rows)
    print(table(rows))


def settings_of(variant: str, ratio: float) -> PruneSettings:
    """The defaults, but for what the variant is about."""
    return PruneSettings(**{"prune_ratio": ratio} | VARIANTS[variant])


def statistics_by_dtype(
    loaded: LoadedModel, drawn: Calibration, wanted: Iterable[PruneSettings]
) -> dict[torch.dtype, BlockStatistics]:
    """What these settings read of the dense model, once for each number format."""
    groups: dict[torch.dtype, list[PruneSettings]] = {}
    for settings in wanted:
        groups.setdefault(rounding_dtype(settings.dtype), []).append(settings)
    found = {}
    for dtype, group in groups.items():
        with products_in(group[0].dtype, loaded.model.device.type):
            found[dtype] = collect_statistics(loaded.model, drawn.input_ids, keep_states=True)
    return found


def row(
    loaded: LoadedModel,
    drawn: Calibration,
    statistics: BlockStatistics,
    settings: PruneSettings,
    measured: dict[str, TokenWindows],
    dense: Remembered,
) -> dict[str, Any]:
    """Prune a copy of the model and measure it."""
    plan = make_plan(loaded, statistics, drawn, settings)
    pruned = copy.deepcopy(loaded.model)
    apply_plan(pruned, plan, input_ids=drawn.input_ids, states=statistics.states)
    found: dict[str, Any] = {
        "settings": asdict(plan.settings),
        "calibration_sha256": plan.calibration_sha256,
        "keep_ratio": round(plan.keep_ratio, 5),
    }
    for name, windows in measured.items():
        result = divergence(dense, pruned, windows)
        found |= {f"{name}_kl": round(result.kl_mean, 4), f"{name}_top1": round(result.same_top1, 4)}
        found |= {f"{name}_ratio": round(result.perplexity_ratio, 4), f"{name}_tokens": sum(result.n_tokens)}
    judged = TorchLanguageModel(replace(loaded, model=pruned))
    return found | {"answers": answer(judged, PROMPTS, max_new_tokens=40)}


def table(rows: list[dict[str, Any]]) -> str:
    """Every row's figures."""
    head = (*KEY, *COLUMNS)
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(str(r[name]) for name in head) + " |" for r in rows)])


if __name__ == "__main__":
    main()
