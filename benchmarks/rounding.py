"""How long rounding one matrix takes, what it holds in memory and what it loses: to the nearest, then for its inputs.

    python benchmarks/rounding.py --rows 4096 --columns 14336

The matrix is random and its inputs are as correlated as those of a trained model: few directions have most of their
squares, and one of them stands out. Processor seconds are those of all threads.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from exporters.onnx.matrix import round_to_nearest
from exporters.onnx.variants import INT4
from exporters.quantize.rounding import fit

T = TypeVar("T")
_TOKENS = 512


def main() -> None:
    """Print each step's time and loss, and the most memory that was held."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=14336)
    asked = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(asked.rows, asked.columns, generator=generator)
    gram = gram_of_inputs(asked.columns, generator)
    nearest = timed("nearest", lambda: round_to_nearest(weight, INT4))
    show(weight, nearest.dequantize(), gram)
    rounded = timed("GPTQ and refinement", lambda: fit(weight, nearest, gram))
    show(weight, rounded.dequantize(), gram)
    print(
        f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB, H {gram.nbytes / 2**30:.1f}"
    )


def gram_of_inputs(columns: int, generator: torch.Generator) -> torch.Tensor:
    """X^T X / T in float64, with eigenvalues that fall like 1 / n and channels of unlike sizes."""
    strengths = torch.arange(1, _TOKENS + 1) ** -0.5
    directions = torch.randn(_TOKENS, columns, generator=generator) * strengths[:, None]
    x = (directions * torch.randn(columns, generator=generator).exp()).double()
    gram = x.T @ x / _TOKENS
    gram.diagonal().add_(0.1 * gram.diagonal().mean())
    return gram


def timed(what: str, function: Callable[[], T]) -> T:
    """What a function gives; how long it took is printed."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = function()
    print(
        f"{what}: {time.process_time() - cpu:.1f} s of processors, {time.perf_counter() - wall:.1f} s of clock"
    )
    return result


def show(weight: torch.Tensor, rounded: torch.Tensor, gram: torch.Tensor) -> None:
    """Print the share of the output's mean square that is lost, tr(E H E^T) / tr(W H W^T), from the first rows."""
    weight, error = weight[:256].double(), (weight - rounded)[:256].double()
    share = (error @ gram * error).sum() / (weight @ gram * weight).sum()
    print(f"  loses {share:.6f}")


if __name__ == "__main__":
    main()
