"""What a GGUF file says of a text when it reads it in pieces of other sizes, on one processor.

llama.cpp has other kernels for one token than for several, and rounds activations to eight bits between them; so far
may figures of two devices be apart, too, whose kernels are both right.

    python benchmarks/batch_rounding.py FILE.gguf [--text builtin:python-docs] [--seqlen 64] [--windows 4]
        [--sizes 1 8 32]
"""

from __future__ import annotations

import argparse
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cfsp.text.tokens import token_windows
from exporters.gguf.language_model import outline_of
from exporters.gguf.runtime import open_model
from runtime_bench.presentation.table import Column, Table


@dataclass(frozen=True)
class Difference:
    """From what the file says of windows that it reads at once.

    Attributes:
        size: Tokens that are read at once.
        window: Largest difference of a window's log-likelihood, nats.
        token: Mean difference of a token's, nats.
    """

    size: int
    window: float
    token: float


def main() -> None:
    """Print a table, a line for each size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--text", default="builtin:python-docs")
    parser.add_argument("--seqlen", type=int, default=64)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 8, 32])
    arguments = parser.parse_args()
    tokenizer = outline_of(arguments.file, arguments.seqlen).tokenizer
    windows = token_windows(
        arguments.text, tokenizer, seqlen=arguments.seqlen, max_windows=arguments.windows
    ).ids
    whole = log_likelihoods(arguments.file, windows, arguments.seqlen)
    rows = []
    for size in arguments.sizes:
        apart = log_likelihoods(arguments.file, windows, size) - whole
        rows.append(Difference(size, apart.sum(1).abs().max().item(), apart.abs().mean().item()))
    columns: list[Column[Difference]] = [
        Column("tokens at once", lambda row: str(row.size), right=True),
        Column("largest difference of a window, nats", lambda row: f"{row.window:.2g}", right=True),
        Column("mean difference of a token, nats", lambda row: f"{row.token:.2g}", right=True),
    ]
    print(f"{len(windows)} windows of {arguments.seqlen} tokens, held against all of a window at once:\n")
    print(Table(columns, rows).markdown())


def log_likelihoods(file: Path, windows: torch.Tensor, size: int) -> torch.Tensor:
    """Of each token after a window's first, (n_windows, seqlen - 1), with so many tokens read at once."""
    n_ctx = windows.shape[1]
    with closing(open_model(file, n_ctx=n_ctx, n_threads=1, n_batch=size, cache_type="f32")) as model:
        rows = [
            np.concatenate([piece.copy() for piece in model.iter_logits(window.numpy())])[:-1]
            for window in windows
        ]
    found = torch.from_numpy(np.stack(rows)).log_softmax(-1)
    return found.gather(2, windows[:, 1:, None])[..., 0]


if __name__ == "__main__":
    main()
