"""What the metadata of a GGUF file may be, held against before anything, llama.cpp too, is given the file.

llama.cpp divides by some of the values, allocates by others, and ends the process where an assertion fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from cfsp.models.config_file import ContextLength, Epsilon, LayerCount, Positive, Size, TokenId
from cfsp.validation import check_kinds, kinds

_PerBlock = Size | list[Annotated[int, Field(ge=0, le=2**24)]]

_TEXTS = (
    *("general.architecture", "general.name", "general.license", "general.organization"),
    *("general.base_model.0.name", "general.base_model.0.organization", "phoneready.source_sha256"),
    *("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template"),
)
_IDS = ("bos", "eos", "eot", "unknown", "padding", "seperator")
_SWITCHES = ("bos_token", "eos_token", "space_prefix")
_SIZES = ("embedding_length", "vocab_size", "attention.key_length", "attention.value_length")
_KINDS = kinds(
    **dict.fromkeys(_TEXTS, str),
    **dict.fromkeys(("tokenizer.ggml.tokens", "tokenizer.ggml.merges"), list[str]),
    **dict.fromkeys([f"tokenizer.ggml.{name}_token_id" for name in _IDS], TokenId),
    **dict.fromkeys([f"tokenizer.ggml.add_{name}" for name in _SWITCHES], bool),
    **{"tokenizer.ggml.token_type": list[int], "tokenizer.ggml.scores": list[float]},
)
_ARCHITECTURE_KINDS = kinds(
    **dict.fromkeys((*_SIZES, "rope.dimension_count"), Size),
    **dict.fromkeys(("feed_forward_length", "attention.head_count", "attention.head_count_kv"), _PerBlock),
    **{
        "block_count": LayerCount,
        "context_length": ContextLength,
        "attention.layer_norm_rms_epsilon": Epsilon,
        "attention.sliding_window": Annotated[int, Field(ge=0, lt=2**32)],
        "rope.freq_base": Positive,
        "rope.scaling.type": str,
        "rope.scaling.factor": Annotated[float, Field(ge=0, allow_inf_nan=False)],
    },
)


def check_metadata(metadata: Mapping[str, Any], path: Path) -> None:
    """Hold a file's metadata against what each key has to be.

    Raises:
        InputError: Values of another kind or out of range; all are named.
    """
    check_kinds(metadata, _KINDS, str(path))
    prefix = f"{metadata.get('general.architecture')}."
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    check_kinds(own, _ARCHITECTURE_KINDS, str(path))
