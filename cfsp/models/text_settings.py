"""Which folders hold a text model beside other parts, and what config.json says of that model."""

from __future__ import annotations

from collections.abc import Mapping
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
TEXT_PARTS: Mapping[str, Mapping[str, str]] = MappingProxyType({"gemma3": _PREFIXES, "mistral3": _PREFIXES})
"""Model type of a folder -> how names of its text model's tensors begin, and how that model's own do."""
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
    if str(settings.get("model_type")) not in TEXT_PARTS:
        return dict(settings)
    own = settings.get("text_config")
    if not isinstance(own, dict) or "model_type" not in own:
        raise InputError(
            f"{where}: nothing is said of the text model", field="text_config", value=type(own).__name__
        )
    return {key: settings[key] for key in _OF_THE_WHOLE if settings.get(key) is not None} | own
