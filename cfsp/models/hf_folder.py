"""Loading models and tokenizers from Hugging Face folders.

Of a multimodal folder the text part is loaded, a model type of its own. Pruning keeps hidden_size, so what an image is
turned into (a `mmproj` file, in llama.cpp) still fits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

from cfsp.errors import InputError
from cfsp.models.checkpoint import (
    is_pruned_checkpoint,
    load_pruned,
    read_checkpoint_info,
    read_generation_config,
)
from cfsp.models.config_file import (
    check_generation_config,
    check_tokenizer_files,
    dense_settings,
    read_model_config,
)
from cfsp.models.families import FOLDS, fold_of, text_model_of
from cfsp.models.offload import AUTO, NARROW, WHOLE, Keeping, keeping_of_files, offloaded_model
from cfsp.models.source import ModelSource
from cfsp.models.weights import (
    OUTPUT_MATRIX,
    check_factors,
    check_memory,
    model_from_weights,
    quiet_transformers,
    safetensors_files,
    sha256_files,
    times_,
    weight_count,
)
from cfsp.reading import as_input_error, panicking_silently, read_json_object
from cfsp.validation import check_kinds, kinds

# Releases of transformers have put the text model before, and behind, what is common to all parts.
_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}
_OF_THE_TYPE = ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map")
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta")


def load_folder(folder: Path, *, dtype: torch.dtype, by_blocks: bool = False) -> Any:
    """The model of a folder, in eval mode, without running its code; by_blocks: offloaded. Raises InputError."""
    settings = read_model_config(folder)
    files, where = safetensors_files(folder), str(folder)
    if _has_own_shape(folder, settings):
        return load_pruned(folder, dtype, by_blocks=by_blocks)
    check_generation_config(folder)
    if is_part := is_text_part(folder):
        config = config_from_settings(settings, where)
    else:
        with quiet_transformers(), as_input_error(f"{folder / 'config.json'} cannot be used"):
            config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    if by_blocks:
        model = offloaded_model(config, files, where=where)
    else:
        check_memory(weight_count(files, tied=bool(config.tie_word_embeddings)), dtype, where)
        weights: dict[str, torch.Tensor] = {}
        for file in files:
            with as_input_error(f"{file} is damaged or cut short"), safetensors.safe_open(file, "pt") as one:
                names = text_names(folder, one.keys())
                weights |= {ours: one.get_tensor(name).to(dtype) for name, ours in names.items()}
        if is_part and settings.get("tie_word_embeddings") is None and OUTPUT_MATRIX not in weights:
            config.tie_word_embeddings = True
        if is_part and config.tie_word_embeddings:
            weights.pop(OUTPUT_MATRIX, None)
        if not weights:
            raise InputError(f"{folder} holds no weights of a {settings['model_type']} model")
        # Of a type that is folded into another one there is no row, and no `model_class`.
        builder = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model = model_from_weights(config, weights, dtype=dtype, where=where, cls=builder)
    model.generation_config = read_generation_config(folder) or model.generation_config
    return folded(model, where) if fold_of(settings) else model


def config_from_settings(settings: Mapping[str, Any], where: str) -> Any:
    """transformers configuration of `read_model_config`'s settings; raises InputError that names `where`."""
    with as_input_error(f"{where}/config.json is not a valid config"):
        return transformers.AutoConfig.for_model(**settings)


def is_text_part(folder: Path) -> bool:
    """Whether a folder's model is a part of what the folder holds."""
    file = folder / "config.json"
    return file.is_file() and text_model_of(str(read_json_object(file).get("model_type"))) is not None


def text_names(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Tensors of a folder's files that belong to its text model -> that model's names of them."""
    prefixes = _PREFIXES if is_text_part(folder) else {"": ""}
    found = {}
    for name in names:
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is not None:
            found[name] = prefixes[prefix] + name.removeprefix(prefix)
    return found


def is_folded(folder: Path) -> bool:
    """Whether a folder's model is loaded as one of another type, or a part of what it holds."""
    file = folder / "config.json"
    return is_text_part(folder) or fold_of(read_json_object(file) if file.is_file() else {}) is not None


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


def keeping_of_folder(folder: Path, asked: str = AUTO) -> Keeping:
    """`keeping_of` a folder's weights; text parts, and what is folded into another type, do not stay in files."""
    settings = read_model_config(folder)
    keeping = keeping_of_files(folder, asked)
    if _has_own_shape(folder, settings) or not is_folded(folder):
        return keeping
    return Keeping(NARROW[asked]) if asked in NARROW and not keeping.is_whole else WHOLE


def _has_own_shape(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a folder is read as a pruned one: phoneready saved it, or its settings say so."""
    return is_pruned_checkpoint(folder) or bool(dense_settings(settings, str(folder / "config.json"))[1])


def load_folder_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a folder, as tokenizer.json says it and not a model type's class; raises InputError."""
    if not (folder / "tokenizer.json").is_file():
        how = (
            "a fast tokenizer: transformers' AutoTokenizer reads an old one, and saves it with tokenizer.json"
        )
        raise InputError(f"{folder} has no tokenizer.json", allowed=how)
    check_tokenizer_files(folder)
    damaged = as_input_error(f"the tokenizer in {folder} cannot be loaded")
    with quiet_transformers(), damaged, panicking_silently():
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        tokenizer("A text.", verbose=False)  # some parts are read, and panic, with the first text
    template = folder / "chat_template.json"
    if tokenizer.chat_template is None and template.is_file():
        settings = read_json_object(template)
        check_kinds(settings, kinds(chat_template=str | None), str(template))
        tokenizer.chat_template = settings.get("chat_template")
    # The general class would add token_type_ids, which none of the supported models takes.
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def folder_source(folder: Path, source: ModelSource) -> ModelSource:
    """Complete a source with hash, licence and base model; a pruned checkpoint names its dense model's."""
    completed = replace(source, sha256=sha256_files(safetensors_files(folder)))
    if is_pruned_checkpoint(folder):
        dense = read_checkpoint_info(folder).source
        completed = replace(completed, name=dense.name, made_from=dense.sha256)
        return replace(completed, license=dense.license, base_model=dense.base_model)
    card, file = {}, folder / "README.md"
    if file.is_file():  # top-level `key: value` lines, and one-item lists, of the front matter
        with file.open(encoding="utf-8", errors="replace") as stream:
            head = re.match(r"---\n(.*?)\n---", stream.read(2**16), re.DOTALL)
        line = r"^(\w+):[ \t]*(?:\n[ \t]*-[ \t]*)?([^\s#][^\n]*)$"
        pairs = re.findall(line, head[1] if head else "", re.MULTILINE)
        card = {key: value.strip().strip("'\"") for key, value in pairs}
    base_model = card.get("base_model") or (source.reference if source.kind == "hub" else None)
    return replace(completed, license=card.get("license"), base_model=base_model)
