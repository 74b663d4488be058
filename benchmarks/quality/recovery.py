"""Recovery of pruned SmolLM2-135M-Instruct: methods and losses against each other, and against a dense control.

Everything is done by the command line, each step in a process of its own. A step whose output is there already is not
done again, nor a run whose row --json has: many hours can be spread, over machines too. The dense control is the dense
model with the same training, which is what a recovered model is to be compared with: in-domain data would improve any
model.

    python benchmarks/quality/recovery.py DIR --chats chats.jsonl --text text.jsonl --wikitext wiki.test.raw
        [--ratios 0.2 0.3] [--variants ig-lora lora lora-distill] [--seeds 0 1 2] [--max-tokens 500000]
        [--text-windows 74] [--chat-windows 16] [--prompts prompts.jsonl] [--task-data DIR] [--limit 300] [--json FILE]
        [--training --set eval_every=10 ...]

Trained on the chats (every 20th is held out) and the text in equal shares; measured on the first windows of 1024
tokens of --wikitext, on windows of the held-out chats in random order, on --prompts (degenerate answers) and on
the tasks under examples/tasks (with --task-data).
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruning import split_chats

from cfsp.files import write_json
from cfsp.reading import read_json
from cfsp.records import read_record
from phoneready.evaluation.evaluation_record import Evaluation

DENSE = "smollm2-135m"
TASKS = Path(__file__).resolve().parents[2] / "examples" / "tasks"
_NEXT_TOKEN = ["--loss", "next-token"]
_DISTILL = ["--loss", "distill", "--learning-rate", "2e-3"]
VARIANTS = {
    "ig-lora": ["--method", "ig-lora", "--set", "rank=32", *_NEXT_TOKEN],
    "lora": ["--method", "lora", "--set", "rank=32", *_NEXT_TOKEN],
    "ig-lora-distill": ["--method", "ig-lora", "--set", "rank=32", *_DISTILL],
    "lora-distill": ["--method", "lora", "--set", "rank=32", *_DISTILL],
    "ig-lora-both": ["--method", "ig-lora", "--set", "rank=32", "--loss", "both"],
    "full": ["--method", "full", *_NEXT_TOKEN],
    "full-distill": ["--method", "full", "--loss", "distill"],
    "full-both": ["--method", "full", "--loss", "both"],
}


@dataclass(frozen=True)
class Run:
    """One model to train and measure.

    Attributes:
        ratio: Of FFN channels removed before; 0 is the dense control.
        variant: A name in VARIANTS, or `unrecovered`.
        seed: Of training.
    """

    ratio: float
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.ratio:g}-{self.variant}-{self.seed}"


def main() -> None:
    """Do what is missing, and print one JSON line a run and a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--chats", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-tokens", type=int, default=500_000)
    parser.add_argument("--nsamples", type=int, default=96, help="Calibration windows.")
    parser.add_argument(
        "--text-windows", type=int, default=74, help="Of 1024 tokens of --wikitext; may be 0."
    )
    parser.add_argument("--chat-windows", type=int, default=16, help="Of 1024 tokens of held-out chats.")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--task-data", type=Path)
    parser.add_argument("--limit", type=int, help="Items of each task.")
    parser.add_argument("--json", type=Path, help="Rows, kept as they come.")
    parser.add_argument(
        "--training",
        nargs=argparse.REMAINDER,
        default=[],
        help="Last of all: further options of `phoneready recover`.",
    )
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "held_out.jsonl").exists():
        split_chats(arguments.chats, folder)
    data = [str(folder / "train.jsonl"), str(arguments.text)]
    runs = [Run(0.0, "unrecovered", 0)]
    # Without a plan there are no importances for ranks to follow; distilled from itself, a model does not change.
    controls = [v for v in arguments.variants if not {"ig-lora", "distill"} & set(VARIANTS[v])]
    runs += [Run(0.0, *pair) for pair in itertools.product(controls, arguments.seeds)]
    for ratio in arguments.ratios:
        runs.append(Run(ratio, "unrecovered", 0))
        runs += [Run(ratio, *pair) for pair in itertools.product(arguments.variants, arguments.seeds)]
    rows: list[dict[str, Any]] = (
        read_json(arguments.json) if arguments.json and arguments.json.exists() else []
    )
    done = {(row["ratio"], row["variant"], row["seed"]) for row in rows}
    for run in runs:
        if (run.ratio, run.variant, run.seed) in done:
            continue
        prune(folder, run.ratio, data, arguments.nsamples)
        recover(folder, run, data, ["--max-tokens", arguments.max_tokens, *arguments.training])
        rows.append(measure(folder, run, arguments))
        print(json.dumps(rows[-1]), flush=True)
        if arguments.json:
            write_json(arguments.json, rows)
    print(table(rows))


def prune(folder: Path, ratio: float, data: list[str], nsamples: int) -> None:
    """The checkpoint that recovery starts from, calibrated on the training data."""
    output = folder / f"pruned-{ratio:g}"
    if ratio and not output.exists():
        phoneready(
            "prune",
            DENSE,
            "-o",
            output,
            "--prune-ratio",
            ratio,
            "--set",
            f"nsamples={nsamples}",
            *references(data),
        )


def recover(folder: Path, run: Run, data: list[str], training: list[object]) -> None:
    """Train; a killed training goes on."""
    if run.variant == "unrecovered" or (folder / run.name).exists():
        return
    options = ["--set", f"seed={run.seed}", *training]
    for reference in data:
        options += ["--data", reference]
    phoneready("recover", start(folder, run.ratio), "-o", folder / run.name, *VARIANTS[run.variant], *options)


def measure(folder: Path, run: Run, arguments: argparse.Namespace) -> dict[str, Any]:
    """Evaluate against the dense model, and alone on tasks and prompts."""
    model = start(folder, run.ratio) if run.variant == "unrecovered" else str(folder / run.name)
    texts, rest = folder / f"{run.name}.texts.json", folder / f"{run.name}.rest.json"
    against = [] if model == DENSE else ["--against", DENSE]
    if arguments.text_windows and not texts.exists():
        options = [*against, "--prompts", "none", "--save", texts]
        phoneready(
            "eval",
            model,
            *options,
            "--text",
            arguments.wikitext,
            "--set",
            f"max_windows={arguments.text_windows}",
        )
    if not (chats := folder / f"{run.name}.chats.json").exists():
        options = [
            *against,
            "--prompts",
            "none",
            "--save",
            chats,
            "--set",
            f"max_windows={arguments.chat_windows}",
        ]
        phoneready("eval", model, *options, "--chats", folder / "held_out.jsonl")
    asked = ["--prompts", arguments.prompts, "--set", f"max_new_tokens={128}"]
    wanted: list[object] = asked if arguments.prompts else ["--prompts", "none"]
    wanted += ["--tasks", TASKS, "--set", f"task_data={arguments.task_data}"] if arguments.task_data else []
    wanted += ["--set", f"limit={arguments.limit}"] if arguments.task_data and arguments.limit else []
    if (arguments.prompts or arguments.task_data) and not rest.exists():
        phoneready("eval", model, "--text", "none", "--save", rest, *wanted)
    row: dict[str, Any] = {"ratio": run.ratio, "variant": run.variant, "seed": run.seed}
    for prefix, file in (("", texts), ("chat_", chats)):
        if not file.exists():
            continue
        text = read_record(Evaluation, file).texts[0]
        row |= {f"{prefix}perplexity": text.perplexity, f"{prefix}tokens": sum(text.n_tokens)}
        if text.distance:
            row |= {f"{prefix}kl": text.distance.kl_mean, f"{prefix}top1": text.distance.same_top1}
    if rest.exists():
        found = json.loads(rest.read_text())
        row |= {f"{t['task']} {m['name']}": m["value"] for t in found["tasks"] for m in t["metrics"]}
        row |= {"degenerate": found["degeneration"]["share"]} if found["degeneration"] else {}
    if (record := folder / run.name / "recovery.json").exists():
        trained = json.loads(record.read_text())
        kept = {point["step"]: point["perplexity"] for point in trained["validations"]}
        row |= {name: trained[name] for name in ("tokens_seen", "seconds")}
        row |= {"perplexity_before": kept[0], "perplexity_after": kept[trained["kept_step"]]}
    return row


def start(folder: Path, ratio: float) -> str:
    """What training starts from."""
    return str(folder / f"pruned-{ratio:g}") if ratio else DENSE


def references(data: list[str]) -> list[object]:
    """Calibration options."""
    return [word for reference in data for word in ("--calibration", reference)]


def phoneready(*words: object) -> None:
    """Run a command; its result is read from files."""
    command = [sys.executable, "-m", "phoneready", *map(str, words)]
    print("$", *command[2:], file=sys.stderr, flush=True)
    subprocess.run(command, stdout=sys.stderr, check=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Every run a row, every figure a column."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        lines.append("| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
