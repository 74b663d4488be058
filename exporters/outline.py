"""What a file of weights says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FileOutline:
    """What a file says without being run: all that is needed to ask an engine elsewhere about texts.

    Attributes:
        path: What an engine opens, one that gives the logits of every position.
        sha256: Its hash.
        source_sha256: Hash of the dense model's weights that it was made from, where it says so.
        tokenizer: A transformers tokenizer.
        vocab_size: Length of a row of logits.
        context_length: Most tokens of one text.
        n_batch: Tokens that are given to the engine at once.
        n_seq: Texts that the engine has at once.
        cache_type: Of keys and values, that of proofs, as the engine calls it; None for the file's own.
        ends: Tokens that end a text, where the engine does not know them.
        stated_sampling: As in `cfsp.evaluation.language_model.LanguageModel`.
    """

    path: Path
    sha256: str
    source_sha256: str | None
    tokenizer: Any
    vocab_size: int
    context_length: int
    n_batch: int
    n_seq: int = 1
    cache_type: str | None = None
    ends: tuple[int, ...] = ()
    stated_sampling: Mapping[str, Any] = field(default_factory=dict)
