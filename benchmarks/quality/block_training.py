"""Blocks of a pruned model trained one by one, on what the blocks before give, towards what the dense model's give.

Every matrix and norm of a block is trained on hidden states alone: no output matrix, no pass back through the whole
model. Two streams of states run beside each other, the dense model's and the student's, as they do while a block is
solved in closed form (`cfsp.pruning.block_by_block`). With h the student's states before a block B of the dense model
and h* the dense model's, the student's block is trained towards

    B(h) + c (B(h*) - B(h))

Training the whole model at once, which it is to be held beside, is `phoneready recover`.

    python benchmarks/quality/block_training.py PRUNED FOLDER --data chats.jsonl --data text.jsonl
        [--error relative] [--share 1] [--nsamples 32] [--seqlen 512] [--passes 1] [--rate 3e-4] [--seed 0]
    phoneready eval FOLDER --against smollm2-135m --chats chats_held.jsonl --text text_held.jsonl
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cfsp.models.architectures import decoder_layers
from cfsp.models.checkpoint import PLAN_FILE, save_checkpoint
from cfsp.models.offload import Calls, enter_blocks, run_layer, run_windows
from cfsp.models.reference import load_model
from cfsp.precision import casting, product_dtype
from cfsp.pruning.plan import PruningPlan
from cfsp.records import read_record
from cfsp.text.calibration import load_calibration
from exporters.quantize.mixture import collect_weight_moments

States = list[torch.Tensor]
"""Each window's, (1, seqlen, hidden_size)."""
WINDOWS_A_STEP = 2
_GRADIENT_WINDOWS = 8


def main() -> None:
    """Train block after block, say how far each one's error falls, and write the checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dense", default="smollm2-135m")
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument(
        "--error",
        choices=("relative", "gradient"),
        default="relative",
        help="all channels count alike, or as their mean squared gradients",
    )
    parser.add_argument("--share", type=float, default=1.0, help="c: of what the blocks before have lost")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--passes", type=int, default=1, help="of every block over the windows")
    parser.add_argument("--rate", type=float, default=3e-4, help="of Adam, at its peak")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.manual_seed(asked.seed)
    dense, student = (load_model(model, dtype="float32") for model in (asked.dense, str(asked.checkpoint)))
    plan = read_record(PruningPlan, asked.checkpoint / PLAN_FILE)
    ids = load_calibration(
        asked.data, dense, nsamples=asked.nsamples, seqlen=asked.seqlen, seed=asked.seed
    ).input_ids
    began = time.process_time()
    train_blocks(dense.model, student.model, ids, asked)
    print(f"{asked.passes} x {ids.numel()} tokens, {time.process_time() - began:.0f} s of processors")
    save_checkpoint(student, asked.folder, plan=plan, seed=asked.seed)


def train_blocks(dense: Any, student: Any, ids: torch.Tensor, asked: argparse.Namespace) -> None:
    """Train every block of the student in place.

    Args:
        dense: The model whose blocks say what is to come out.
        student: With as many blocks.
        ids: (nsamples, seqlen).
        asked: The command line.
    """
    weights: list[torch.Tensor | None] = [None] * len(decoder_layers(dense))
    if asked.error == "gradient":
        names = [f"model.layers.{index}.mlp.down_proj" for index in range(len(weights))]
        found = collect_weight_moments(dense, names, ids[:: max(1, len(ids) // _GRADIENT_WINDOWS)])
        weights = [found[name].rows.float() for name in names]
    for model in (dense, student):
        model.requires_grad_(False)
    with torch.no_grad():
        given, calls = enter_blocks(dense, decoder_layers(dense), ids)
        states, student_calls = enter_blocks(student, decoder_layers(student), ids)
    pairs = zip(decoder_layers(dense), decoder_layers(student), weights, strict=True)
    for index, (whole, block, weight) in enumerate(pairs):
        with torch.no_grad(), casting(product_dtype("auto"), "cpu"):
            wanted = run_windows(whole, index, given, calls)
            follows = wanted if asked.share == 1 else run_windows(whole, index, states, calls)
        targets = [
            follow + asked.share * (want - follow) for want, follow in zip(wanted, follows, strict=True)
        ]
        losses = _train(block, index, states, targets, student_calls, error_of(weight), asked)
        with torch.no_grad(), casting(product_dtype("auto"), "cpu"):
            given, states = wanted, run_windows(block, index, states, student_calls)
        share = len(losses) // asked.passes
        first, last = (sum(some) / len(some) for some in (losses[:share], losses[-share:]))
        print(f"block {index}: {losses[0]:.3g} before, {first:.3g} in the first pass, {last:.3g} in the last")


def error_of(weight: torch.Tensor | None) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The error of states (tokens, hidden_size), each token's relative to its size; channels may have weights."""
    counts = torch.ones(()) if weight is None else weight

    def error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        square, size = (counts * states.square() for states in (found - wanted, wanted))
        return (square.sum(-1) / size.sum(-1)).mean()

    return error


def _train(
    block: torch.nn.Module,
    index: int,
    states: States,
    targets: States,
    calls: Calls,
    error: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    asked: argparse.Namespace,
) -> list[float]:
    """Every step's error, before it."""
    weights = list(block.requires_grad_(True).parameters())
    order = [
        n
        for turn in range(asked.passes)
        for n in random.Random(f"{asked.seed} {turn}").sample(range(len(states)), len(states))
    ]
    steps = [order[start : start + WINDOWS_A_STEP] for start in range(0, len(order), WINDOWS_A_STEP)]
    optimizer = torch.optim.Adam(weights, lr=asked.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, asked.rate, len(steps), pct_start=0.1)
    losses = []
    for windows in steps:
        with casting(product_dtype("auto"), "cpu"):
            found = run_layer(block, torch.cat([states[n] for n in windows]), calls.of(index, windows[0]))
        loss = error(found.float(), torch.cat([targets[n] for n in windows]).float())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    block.requires_grad_(False)
    return losses


if __name__ == "__main__":
    main()
