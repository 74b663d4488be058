"""Loading a model type that is another one but for factors, order or names of weights as that one.

So it is pruned, exported and run as that one. Which types are, and how, is in `cfsp.models.families`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from cfsp.errors import InputError
from cfsp.models.families import FOLDS, fold_of, text_model_of
from cfsp.models.weights import OUTPUT_MATRIX, model_from_weights
from cfsp.reading import read_json_object

_OF_THE_TYPE = ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map")
"""Settings that say which type it is, or were made for it."""
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta")


def is_folded(folder: Path) -> bool:
    """Whether a folder's model is loaded as one of another type, or a part of what it holds."""
    file = folder / "config.json"
    settings = read_json_object(file) if file.is_file() else {}
    return text_model_of(str(settings.get("model_type"))) is not None or fold_of(settings) is not None


def folded_config(config: Any) -> Any:
    """The configuration of the other type; one of a type that is not folded is returned as it is."""
    settings = config.to_dict()
    fold = fold_of(settings)
    if fold is None:
        return config
    changed = fold.settings(settings)
    known = transformers.CONFIG_MAPPING[fold.target]().to_dict().keys() - {*_OF_THE_TYPE}
    if not changed.keys().isdisjoint(_ROPE):
        known -= {*_ROPE}
    kept = {key: value for key, value in settings.items() if key in known}
    return transformers.AutoConfig.for_model(fold.target, **{**kept, **changed})


def folded(model: Any, where: str) -> Any:
    """A model of the other type that computes what this one does, in eval mode; this one is of no more use."""
    fold, settings = FOLDS[model.config.model_type], model.config.to_dict()
    config, factors = folded_config(model.config), fold.factors(settings)
    check_factors(factors, where)
    tied = settings["tie_word_embeddings"]
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not tied or name != OUTPUT_MATRIX:
            weights |= fold.tensors(name, tensor, settings)
    for name, tensor in weights.items():
        times_(name, tensor, factors)
    made = model_from_weights(config, weights, dtype=model.dtype, where=where)
    made.generation_config = model.generation_config
    return made


def times_(name: str, tensor: torch.Tensor, factors: Mapping[str, float]) -> None:
    """Multiply a parameter, by its name, in its place; one without a factor is left alone."""
    factor = factors.get(name.split(".")[-2])
    if factor is not None:
        with torch.no_grad():
            tensor.mul_(factor)


def check_factors(factors: Mapping[str, float], where: str) -> None:
    """Raise InputError for a factor that no model can have."""
    for name, factor in factors.items():
        if not 1e-6 < factor < 1e6:
            raise InputError(
                f"{where}: {name} would be multiplied by this", value=factor, allowed="1e-6 to 1e6"
            )
