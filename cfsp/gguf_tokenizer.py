"""Tokenizers of GGUF files, faithful to llama.cpp, and the names that llama.cpp gives to pre-tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["pre_tokenizer_name", "tokenizer_from_gguf"]


def tokenizer_from_gguf(path: Path) -> Any:
    """A PreTrainedTokenizerFast that gives the token ids llama.cpp gives for the same file.

    Raises:
        InputError: Damaged file, no tokenizer in it, or an unknown tokenizer kind.
    """
    raise NotImplementedError


def pre_tokenizer_name(tokenizer: Any) -> str:
    """llama.cpp's `tokenizer.ggml.pre` for a byte-level BPE tokenizer, found by its structure.

    Raises:
        InputError: No known structure matches; the message names the known ones.
    """
    raise NotImplementedError
