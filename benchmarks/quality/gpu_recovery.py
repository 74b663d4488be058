"""Recovery where tokens are cheap: pruned models are trained on a GPU, judged before and after, and brought away.

Everything is done by the command line, each step in a process of its own. What has its output is not done again, and
a training that is stopped when the time is up goes on where it was saved last: call the same command until it exits
with 0. Without a GPU it does the same on the CPU, with fewer `--max-tokens`.

    python benchmarks/quality/gpu_recovery.py DIR --data chats.jsonl --data text.jsonl --chats held.jsonl
        --text held.txt [--model smollm2-135m] [--ratios 0.2 0.3] [--max-tokens 20000000] [--minutes 9.5]
        [--device auto] [--prompts prompts.jsonl] [--windows 16] [--format Q4_0] [--piece-bytes 15000000]
        [--peak-tflops 989] [--training --batch-size 32 ...]

Trained on `--data` in equal shares (`self` is text that the dense model writes), all weights, distilled from the dense
model. DIR/record.json has a row for each model: figures on `--chats` and `--text`, degenerate answers, and of training
tokens a second and the share of `--peak-tflops` (989: bfloat16 of an H100 SXM, by NVIDIA's data sheet). The
file of each recovered model lies in a folder such as DIR/pieces-0.3, cut so that none is larger than `--piece-bytes`;
`cat` joins them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfsp.files import sha256_file, write_json, write_text
from cfsp.models.weights import safetensors_files, weight_count
from cfsp.reading import read_json
from cfsp.records import read_record
from cfsp.recovery.recovery_record import RECOVERY_FILE, RecoveryRecord
from runtime_bench.presentation.table import table_of

_FORWARD_AND_BACKWARD, _FORWARD = 6, 2
"""Operations a weight and token: a product and a sum, and twice as many for the gradients (Kaplan et al. 2020)."""


@dataclass(frozen=True)
class Step:
    """A command of phoneready, and what it leaves.

    Attributes:
        output: Folder or file that is there when it is done.
        words: Of the command.
    """

    output: Path
    words: tuple[object, ...]


def main() -> None:
    """Do what is missing until the time is up; print the table of what there is."""
    arguments = _parser().parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * arguments.minutes
    is_done = all(_do(step, deadline) for step in _steps(folder, arguments))
    rows = [row for row in _rows(folder, arguments) if row]
    write_json(folder / "record.json", rows)
    print(table_of(rows).markdown() if rows else "nothing is measured yet")
    if not is_done:
        sys.exit("the time is up: the same command goes on")
    for ratio in arguments.ratios:
        _cut(
            next((folder / f"files-{ratio:g}").glob("*.gguf")),
            folder / f"pieces-{ratio:g}",
            arguments.piece_bytes,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--chats", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3])
    parser.add_argument("--max-tokens", type=int, default=20_000_000)
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--windows", type=int, default=16, help="Of 512 tokens to measure on, of each text.")
    parser.add_argument("--nsamples", type=int, default=96, help="Calibration windows.")
    parser.add_argument("--format", default="Q4_0")
    parser.add_argument("--piece-bytes", type=int, default=15_000_000)
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument(
        "--training",
        nargs=argparse.REMAINDER,
        default=[],
        help="Last of all: further options of `phoneready recover`.",
    )
    return parser


def _steps(folder: Path, arguments: argparse.Namespace) -> Iterator[Step]:
    device = ("--device", arguments.device)
    dense = folder / "dense"
    yield Step(
        dense, ("prune", arguments.model, "-o", dense, "--prune-ratio", 0, "--reconstruct", "none",
                "--calibration", "builtin:python-docs", "--nsamples", 1, *device),
    )  # fmt: skip
    calibration = [word for one in arguments.data for word in ("--calibration", one)]
    data = [word for one in arguments.data for word in ("--data", one)]
    for ratio in arguments.ratios:
        pruned, recovered, files = (folder / f"{name}-{ratio:g}" for name in ("pruned", "recovered", "files"))
        yield Step(
            pruned, ("prune", arguments.model, "-o", pruned, "--prune-ratio", ratio, *calibration,
                     "--nsamples", arguments.nsamples, "--seqlen", 512, *device),
        )  # fmt: skip
        yield _judging(pruned, arguments)
        yield Step(
            recovered, ("recover", pruned, "-o", recovered, "--method", "full", "--loss", "distill", *data,
                        "--max-tokens", arguments.max_tokens, *device, *arguments.training),
        )  # fmt: skip
        yield _judging(recovered, arguments)
        yield Step(
            files, ("export", recovered, "-o", files, "--gguf", arguments.format, *calibration,
                    "--nsamples", arguments.nsamples, "--seqlen", 512, *device),
        )  # fmt: skip


def _judging(model: Path, arguments: argparse.Namespace) -> Step:
    """Against the dense model, on texts, and on questions where there are some: greedily and sampled."""
    saved = model.with_name(f"{model.name}.json")
    asked = ("--prompts", arguments.prompts, "--sampled", "--max-new-tokens", 128)
    return Step(
        saved, ("eval", model, "--against", arguments.model, "--chats", arguments.chats, "--text", arguments.text,
                "--seqlen", 512, "--windows", arguments.windows, "--save", saved, "--device", arguments.device,
                *(asked if arguments.prompts else ("--no-prompts",))),
    )  # fmt: skip


def _do(step: Step, deadline: float) -> bool:
    """Whether a step is done; one that is still at work when the time is up is ended."""
    if step.output.exists():
        return True
    if time.monotonic() >= deadline:
        return False
    command = [sys.executable, "-m", "phoneready", *map(str, step.words)]
    print("$", *command[2:], file=sys.stderr, flush=True)
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        status = process.wait(deadline - time.monotonic())
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        return False
    # Where no validation was better than the start, `recover` writes that, and exits with 1.
    if status and not step.output.exists():
        sys.exit(f"phoneready {step.words[0]} exited with {status}")
    return True


def _rows(folder: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for ratio in arguments.ratios:
        for name in (f"pruned-{ratio:g}", f"recovered-{ratio:g}"):
            if (saved := folder / f"{name}.json").exists():
                yield {"model": name, **_judged(read_json(saved)), **_trained(folder, name, arguments)}


def _judged(found: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for text in found["texts"]:
        over = text["bits_per_byte"] / text["against_bits_per_byte"]
        row |= {f"{text['kind']}: KL": f"{text['divergence']['kl_mean']:.4f}"}
        row |= {f"{text['kind']}: bits per byte, times dense": f"{over:.3f}"}
    greedy, sampled = found["degeneration"], found.get("sampled")
    for name, answers in (("greedy", greedy), ("sampled", sampled and sampled["degeneration"])):
        if answers:
            shares = f"{answers['share']:.1%} ({answers['against_share']:.1%})"
            row |= {f"degenerate, {name} (dense)": shares}
    return row


def _trained(folder: Path, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What training took; each weight of the teacher is read once forward, of the student also backward."""
    if not (folder / name / RECOVERY_FILE).exists():
        return {"tokens": "", "tokens a second": "", "of the peak": ""}
    record = read_record(RecoveryRecord, folder / name / RECOVERY_FILE)
    operations = _FORWARD_AND_BACKWARD * _weights(folder / name) + _FORWARD * _weights(folder / "dense")
    speed = record.tokens_seen / record.seconds
    return {
        "tokens": record.tokens_seen,
        "tokens a second": f"{speed:,.0f}",
        "of the peak": f"{speed * operations / (arguments.peak_tflops * 1e12):.1%}",
    }


def _weights(checkpoint: Path) -> int:
    tied = read_json(checkpoint / "config.json")["tie_word_embeddings"]
    return weight_count(safetensors_files(checkpoint), tied=tied)


def _cut(file: Path, folder: Path, piece_bytes: int) -> None:
    """A file in pieces that `cat` joins, and its hash."""
    folder.mkdir(exist_ok=True)
    with file.open("rb") as stream:
        for number, piece in enumerate(iter(lambda: stream.read(piece_bytes), b"")):
            (folder / f"{file.name}.{number:02d}").write_bytes(piece)
    write_text(folder / f"{file.name}.sha256", f"{sha256_file(file)}  {file.name}\n")


if __name__ == "__main__":
    main()
