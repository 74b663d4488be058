"""Which folders hold a text model beside other parts, and what config.json says of that model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from cfsp.errors import InputError

# Releases of transformers have put the text model before, and behind, what is common to all parts.
_PREFIXES = MappingProxyType(
    {
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "model.language_model.": "model.",
        "lm_head.": "lm_head.",
    }
)


@dataclass(frozen=True)
class TextPart:
    """The text model of a kind of folder.

    Attributes:
        model_type: What it is where config.json does not say.
        prefixes: How names of its tensors begin in the folder -> how that model's own do.
    """

    model_type: str
    prefixes: Mapping[str, str] = field(default_factory=lambda: _PREFIXES)


TEXT_PARTS: Mapping[str, TextPart] = MappingProxyType(
    {
        "gemma3": TextPart("gemma3_text"),
        "gemma4": TextPart("gemma4_text"),
        "mistral3": TextPart("mistral"),
        "qwen3_5": TextPart("qwen3_5_text"),
    }
)
"""By the model type of the folder."""
_OF_THE_WHOLE = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
    *("dtype", "torch_dtype", "quantization_config"),
)
"""Settings that stand beside the parts where the part does not say them."""


def text_settings(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings of the text model; those of a model that has no other parts as they are.

    Args:
        settings: Of config.json.
        where: File named in errors.

    Raises:
        InputError: It says nothing of the text model.
    """
    part = TEXT_PARTS.get(str(settings.get("model_type")))
    if part is None:
        return dict(settings)
    own = settings.get("text_config")
    if not isinstance(own, dict):
        raise InputError(
            f"{where}: nothing is said of the text model", field="text_config", value=type(own).__name__
        )
    of_the_whole = {key: settings[key] for key in _OF_THE_WHOLE if settings.get(key) is not None}
    return {"model_type": part.model_type} | of_the_whole | own
