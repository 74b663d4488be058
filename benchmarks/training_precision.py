"""What a training step of all weights takes with products in float32 and in bfloat16, on this processor.

Both students are there at once, each with a teacher, and take turns on the same tokens; what is compared is processor
time (user + system, all threads) of a pass forward and back, the teacher's pass and the loss among it.

    python benchmarks/training_precision.py [CHECKPOINT] [--sequences 2] [--seqlen 512] [--rounds 6]
"""

from __future__ import annotations

import argparse
import time

import torch

from cfsp.models.reference import load_model
from cfsp.models.weights import cast_weights
from cfsp.recovery.settings import RecoverySettings
from cfsp.recovery.student import Student, Teacher
from runtime_bench.records.summary import ratio_interval

DTYPES = (torch.float32, torch.bfloat16)


def main() -> None:
    """Take turns and print the times and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", default="smollm2-135m")
    parser.add_argument("--teacher", default="smollm2-135m")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    students = {dtype: student(arguments, dtype) for dtype in DTYPES}
    shape = (arguments.sequences, arguments.seqlen)
    ids = torch.randint(0, 1000, shape, generator=torch.Generator().manual_seed(0))
    times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in DTYPES}
    for turn in range(arguments.rounds + 1):
        for dtype, one in students.items():
            taken = step_s(one, ids)
            if turn:  # the first warms up
                times[dtype].append(taken)
    for dtype, taken_s in times.items():
        print(f"{dtype}: " + " ".join(f"{seconds:.2f}" for seconds in taken_s) + " s")
    found = ratio_interval(times[torch.float32], times[torch.bfloat16], paired=True)
    print(f"float32 to bfloat16: {found.ratio:.2f} ({found.low:.2f} to {found.high:.2f})")


def student(arguments: argparse.Namespace, dtype: torch.dtype) -> Student:
    """A checkpoint that learns from a teacher's distribution, as `recover --method full --loss distill` has it."""
    settings = RecoverySettings(method="full", loss="distill")
    teacher = load_model(arguments.teacher, dtype="float32").model.requires_grad_(False)
    cast_weights(teacher, dtype)
    model = load_model(arguments.checkpoint, dtype="float32").model.requires_grad_(True)
    return Student(model, settings, dtype, Teacher(teacher).eval())


def step_s(one: Student, ids: torch.Tensor) -> float:
    """Processor seconds of one pass forward and back."""
    one.zero_grad()
    began = time.process_time()
    one(input_ids=ids, labels=ids).backward()
    return time.process_time() - began


if __name__ == "__main__":
    main()
