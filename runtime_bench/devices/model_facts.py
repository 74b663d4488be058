"""What a projection needs to know of an exported file, read from its header: nothing is loaded or run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from cfsp.errors import InputError
from cfsp.models.gguf_file import (
    CONVOLUTIONS,
    GGUFFile,
    GGUFTensor,
    drafting_blocks,
    is_drafting,
    looked_up_alone,
    read_gguf,
)

_TABLE = "token_embd.weight"


@dataclass(frozen=True)
class ModelFacts:
    """A file's sizes. What drafts further tokens takes room, and is not read."""

    path: Path
    weight_bytes: int  # Of all tensors
    read_bytes: int  # Of the weights that every generated token reads: all but a lookup table
    n_multiplied: int  # Weights that every token is multiplied by
    bytes_by_type: Mapping[str, int]  # Stored type -> bytes of the matrices of it
    key_value_width: int  # Numbers that one token adds to the cache, over all blocks
    hidden_size: int
    ffn_width: int  # Of the widest FFN
    vocab_size: int
    context_length: int  # Longest that the model knows


def gguf_facts(path: Path) -> ModelFacts:
    """Facts of a GGUF file. Raises InputError: no GGUF file, or one without the keys of a decoder."""
    file = read_gguf(path)
    drafting = is_drafting(file)
    tensors = {tensor.name: tensor for tensor in file.tensors if not drafting(tensor.name)}
    if _TABLE not in tensors:
        raise InputError(f"{path} has no {_TABLE}: it is no decoder")

    def largest(name: str, default: int | None = None) -> int:
        return max(_numbers(file, name, default))

    aside = looked_up_alone(tensors)
    read = [t for t in tensors.values() if t.name not in aside]
    matrices = [t for t in read if len(t.shape) > 1]
    by_type: Counter[str] = Counter()
    for tensor in matrices:
        by_type[tensor.kind.name] += _bytes(tensor)
    hidden = largest("embedding_length")
    return ModelFacts(
        path=path,
        weight_bytes=sum(map(_bytes, file.tensors)),
        read_bytes=sum(map(_bytes, read)),
        n_multiplied=sum(math.prod(t.shape) for t in matrices),
        bytes_by_type=dict(by_type),
        key_value_width=_key_value_width(file),
        hidden_size=hidden,
        ffn_width=largest("feed_forward_length"),
        vocab_size=tensors[_TABLE].shape[0],
        context_length=largest("context_length"),
    )


def _key_value_width(file: GGUFFile) -> int:
    """Numbers that one token adds to the cache, over all blocks that have keys and values of their own."""
    heads = max(_numbers(file, "attention.head_count"))
    size = max(_numbers(file, "embedding_length")) // heads
    layers = drafting_blocks(file).start
    of_blocks = _numbers(file, "attention.head_count_kv", heads)
    of_blocks = of_blocks * layers if len(of_blocks) == 1 else of_blocks
    windowed = file.hyperparameter("attention.sliding_window_pattern")
    windowed = windowed if isinstance(windowed, list) else [False] * layers

    own = layers - (file.hyperparameter("attention.shared_kv_layers") or 0)
    per_head = [
        sum(
            file.hyperparameter(key + ("_swa" if windowed[block] else ""), file.hyperparameter(key, size))
            for key in ("attention.key_length", "attention.value_length")
        )
        for block in range(own)
    ]
    mixing = {tensor.name.split(".")[1] for tensor in file.tensors if tensor.name.endswith(CONVOLUTIONS)}
    pairs = enumerate(zip(of_blocks, per_head, strict=False))
    return sum(count * each for block, (count, each) in pairs if str(block) not in mixing)


def _bytes(tensor: GGUFTensor) -> int:
    return int(tensor.data.nbytes)


def _numbers(file: GGUFFile, name: str, default: int | None = None) -> list[int]:
    """A number of the header that is one for all blocks, or a list of one for each."""
    stored = file.hyperparameter(name, default)
    values = list(stored) if isinstance(stored, (list, tuple)) else [stored]
    # Blocks without attention have no heads.
    if not all(isinstance(value, int) and value >= 0 for value in values) or not any(values):
        raise InputError(f"{file.path} has no usable {file.architecture}.{name}", value=stored)
    return [int(value) for value in values]


FACTS: Mapping[str, Callable[[Path], ModelFacts]] = MappingProxyType({"gguf": gguf_facts})
"""Family of exports -> how its files are read; what has no row is not projected."""
