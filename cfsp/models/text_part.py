"""The text part of a folder that can see or hear as well: a model type of its own, in the folder's files.

What encodes images stays where it is. Pruning keeps hidden_size, so what an image is turned into (a `mmproj` file of
the folder, in llama.cpp) still fits the pruned text part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from cfsp.errors import InputError
from cfsp.models.config_file import check_generation_config
from cfsp.models.text_settings import TEXT_PARTS
from cfsp.models.weights import (
    OUTPUT_MATRIX,
    check_memory,
    model_from_weights,
    quiet_transformers,
    safetensors_files,
    weight_count,
)
from cfsp.reading import as_input_error, read_json_object


def is_text_part(folder: Path) -> bool:
    """Whether a folder's model is a part of what the folder holds."""
    file = folder / "config.json"
    return file.is_file() and str(read_json_object(file).get("model_type")) in TEXT_PARTS


def text_names(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Tensors of a folder's files that belong to its text model -> that model's names of them."""
    prefixes = _prefixes(folder) if is_text_part(folder) else {"": ""}
    return {name: ours for name in names if (ours := _text_name(name, prefixes)) is not None}


def config_from_settings(settings: Mapping[str, Any], where: str) -> Any:
    """transformers configuration of `read_model_config`'s settings; raises InputError that names `where`."""
    with as_input_error(f"{where}/config.json is not a valid config"):
        return transformers.AutoConfig.for_model(**settings)


def load_text_part(folder: Path, settings: Mapping[str, Any], *, dtype: torch.dtype) -> Any:
    """The model of a folder's text part, in eval mode.

    Args:
        folder: Of a type in TEXT_PARTS.
        settings: `read_model_config`'s.
        dtype: Of the model.

    Raises:
        InputError: The text part's tensors are missing, damaged, or of the wrong shape.
    """
    import safetensors

    config = config_from_settings(settings, str(folder))
    weights: dict[str, torch.Tensor] = {}
    files = safetensors_files(folder)
    check_memory(weight_count(files, tied=bool(config.tie_word_embeddings)), dtype, str(folder))
    for file in files:
        with as_input_error(f"{file} is damaged or cut short"), safetensors.safe_open(file, "pt") as handle:
            names = text_names(folder, handle.keys())
            weights |= {ours: handle.get_tensor(name).to(dtype) for name, ours in names.items()}
    if settings.get("tie_word_embeddings") is None and OUTPUT_MATRIX not in weights:
        config.tie_word_embeddings = True
    if config.tie_word_embeddings:
        weights.pop(OUTPUT_MATRIX, None)
    if not weights:
        raise InputError(f"{folder} holds no weights of a {settings['model_type']} model")
    builder = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = model_from_weights(config, weights, dtype=dtype, where=str(folder), cls=builder)
    if check_generation_config(folder):
        with quiet_transformers(), as_input_error(f"{folder / 'generation_config.json'} cannot be used"):
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _prefixes(folder: Path) -> Mapping[str, str]:
    return TEXT_PARTS[str(read_json_object(folder / "config.json")["model_type"])].prefixes


def _text_name(name: str, prefixes: Mapping[str, str]) -> str | None:
    """The text model's name of a tensor; None of one that is no part of it."""
    return next(
        (ours + name.removeprefix(prefix) for prefix, ours in prefixes.items() if name.startswith(prefix)),
        None,
    )
