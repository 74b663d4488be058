"""Text that built-in models wrote, which comes with the package, so that `self` samples nothing for it.

A file holds the beginning of what a model writes from a seed on, as token ids; tools/write_text.py makes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from cfsp.files import atomic_file

FOLDER = Path(__file__).with_name("written")
_NAME = "input_ids"


def digest(origin: Mapping[str, Any]) -> str:
    """32 hex digits that stand for where a text comes from: the model, how it is asked, the seed."""
    return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:32]


def read_written(origin: Mapping[str, Any], n_tokens: int) -> torch.Tensor | None:
    """The first tokens of a text that comes with the package, (n_tokens,) int64; None where so many do not."""
    path = FOLDER / f"{digest(origin)}.safetensors"
    if not path.is_file():
        return None
    ids = safetensors.torch.load_file(path)[_NAME]
    return ids[:n_tokens].to(torch.int64) if len(ids) >= n_tokens else None


def write_written(origin: Mapping[str, Any], ids: torch.Tensor, about: Mapping[str, str]) -> Path:
    """Keep a text for the package.

    Args:
        origin: Where it comes from.
        ids: (n_tokens,) int64, below 65,536.
        about: What the file says of itself.

    Returns:
        The file.
    """
    small = torch.from_numpy(ids.numpy().astype(np.uint16))
    if not torch.equal(small.to(torch.int64), ids):
        raise ValueError("token ids beyond 16 bits")
    path = FOLDER / f"{digest(origin)}.safetensors"
    with atomic_file(path) as temporary:
        safetensors.torch.save_file({_NAME: small}, temporary, metadata=dict(about))
    return path
