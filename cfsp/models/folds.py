"""Model types that are another one but for factors, which weights can hold: they are loaded as that one.

Granite is a Llama with four factors: embeddings times m_e, what attention and FFN add times m_r, attention's scores
times m_a in place of 1 / sqrt(head_dim), logits over s. With

    E' = m_e E    o' = m_r o    down' = m_r down    q' = m_a sqrt(head_dim) q

and norm' = norm / (m_e s) of the last norm where the output matrix is E, else head' = head / s, a Llama computes the
same but for rounding. So it is pruned, exported and run as one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers

from cfsp.errors import InputError
from cfsp.models.weights import OUTPUT_MATRIX, model_from_weights
from cfsp.reading import read_json_object

_OF_THE_TYPE = ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map")
"""Settings that say which type it is, or were made for it."""
Factors = Mapping[str, float]
"""Last part of a module's name -> what its weight and bias are multiplied by."""


@dataclass(frozen=True)
class Fold:
    """A model type that is loaded as another one.

    Attributes:
        target: That one.
        own: Settings that the other does not have -> where a GGUF file has them, behind the architecture's name.
        factors: From all settings to the factors; one of its own may be 0 or None, which stands for what the other has.
        gguf_name: llama.cpp's architecture whose files are read as this model type.
    """

    target: str
    own: Mapping[str, str]
    factors: Callable[[Mapping[str, Any]], Factors]
    gguf_name: str


def _granite(settings: Mapping[str, Any]) -> Factors:
    embedding, residual, scaling = (
        settings[name] or 1.0 for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    )
    scores = settings["attention_multiplier"]
    head_dim = settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
    last = {"norm": 1 / embedding / scaling} if settings["tie_word_embeddings"] else {"lm_head": 1 / scaling}
    blocks = {
        "o_proj": residual,
        "down_proj": residual,
        "q_proj": scores * head_dim**0.5 if scores else 1.0,
    }
    return {"embed_tokens": embedding} | last | blocks


FOLDS: Mapping[str, Fold] = MappingProxyType(
    {
        "granite": Fold(
            "llama",
            {
                "embedding_multiplier": "embedding_scale",
                "residual_multiplier": "residual_scale",
                "attention_multiplier": "attention.scale",
                "logits_scaling": "logit_scale",
            },
            _granite,
            gguf_name="granite",
        )
    }
)


def is_folded(folder: Path) -> bool:
    """Whether a folder's model is loaded as one of another type."""
    file = folder / "config.json"
    return file.is_file() and str(read_json_object(file).get("model_type")) in FOLDS


def folded_config(config: Any) -> Any:
    """The configuration of the other type; a configuration of any type that is none in FOLDS is returned."""
    fold = FOLDS.get(config.model_type)
    if fold is None:
        return config
    left_out = (*fold.own, *_OF_THE_TYPE)
    kept = {key: value for key, value in config.to_dict().items() if key not in left_out}
    return transformers.AutoConfig.for_model(fold.target, **kept)


def folded(model: Any, where: str) -> Any:
    """A model of the other type that computes what this one does, in eval mode; this one is of no more use.

    Args:
        model: A causal LM of a type in FOLDS.
        where: File or folder named in errors.
    """
    fold, settings = FOLDS[model.config.model_type], model.config.to_dict()
    config = folded_config(model.config)
    factors = fold.factors(settings)
    check_factors(factors, where)
    tied = settings["tie_word_embeddings"]
    weights = {
        name: tensor for name, tensor in model.state_dict().items() if not tied or name != OUTPUT_MATRIX
    }
    for name, tensor in weights.items():
        times_(name, tensor, factors)
    made = model_from_weights(config, weights, dtype=model.dtype, where=where)
    made.generation_config = model.generation_config
    return made


def times_(name: str, tensor: torch.Tensor, factors: Factors) -> None:
    """Multiply a parameter, by its name, in its place; one without a factor is left alone."""
    factor = factors.get(name.split(".")[-2])
    if factor is not None:
        with torch.no_grad():
            tensor.mul_(factor)


def check_factors(factors: Factors, where: str) -> None:
    """Raise InputError for a factor that no model can have."""
    for name, factor in factors.items():
        if not 1e-6 < factor < 1e6:
            raise InputError(
                f"{where}: {name} would be multiplied by this", value=factor, allowed="1e-6 to 1e6"
            )
