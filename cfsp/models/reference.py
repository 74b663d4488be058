"""From a model reference to a model and its tokenizer.

A reference is one of
    smollm2-135m         a built-in alias (see cfsp.models.builtin)
    FOLDER               a Hugging Face folder with safetensors, or a checkpoint that phoneready saved
    FILE.gguf            a GGUF file, dequantized
    OWNER/NAME[@REV]     a model on the Hugging Face hub

Of a multimodal folder the text part is loaded, a model type of its own. Pruning keeps hidden_size, so what an image is
turned into (a `mmproj` file, in llama.cpp) still fits.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

from cfsp.devices import CPU, OR_NARROW, placed
from cfsp.errors import InputError
from cfsp.files import sha256_file, short_name
from cfsp.models.builtin import BUILTIN_MODELS, fetch_builtin
from cfsp.models.checkpoint import (
    NOTICE_PATTERNS,
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
from cfsp.models.gguf_file import read_gguf
from cfsp.models.gguf_model import keeping_of_gguf, model_from_gguf, tying_note
from cfsp.models.gguf_tokenizer import tokenizer_from_gguf
from cfsp.models.offload import (
    AUTO,
    NARROW,
    WHOLE,
    Keeping,
    held_model,
    keeping_of_files,
    let_go,
    offloaded_model,
)
from cfsp.models.source import LoadedModel, ModelSource
from cfsp.models.weights import (
    INDEX_FILE,
    OUTPUT_MATRIX,
    SINGLE_FILE,
    cast_weights,
    check_factors,
    check_finite,
    check_floats,
    check_memory,
    model_from_weights,
    quiet_transformers,
    safetensors_files,
    sha256_files,
    shard_names,
    times_,
    uniform_dtype,
    weight_count,
)
from cfsp.progress import Progress, no_progress
from cfsp.reading import as_input_error, one_line, panicking_silently, read_json_object
from cfsp.validation import check_kinds, kinds

_log = logging.getLogger(__name__)
_REFERENCE = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_TOKENIZER_PATTERNS = ("tokenizer*", "special_tokens_map.json", "chat_template*")
_MODEL_PATTERNS = (INDEX_FILE, "generation_config.json", "README.md", *NOTICE_PATTERNS)


def load_model(
    reference: str | Path,
    *,
    dtype: str = AUTO,
    device: torch.device = CPU,
    may_stream: bool = False,
    progress: Progress = no_progress,
) -> LoadedModel:
    """Load a causal LM and its tokenizer.

    Args:
        reference: See the module's docstring.
        dtype: Of the weights while they are not at hand, a name in `cfsp.precision.DTYPES`: bfloat16 and float16 round
            them, and keep 16 bits in memory; they are float32 while something computes with them.
        may_stream: Whether weights that take too much memory may be offloaded (`cfsp.models.offload`).

    Raises:
        InputError: The reference leads nowhere, or what it leads to cannot be used.
    """
    source = find_model(reference, progress=progress)
    path, stored, own = Path(source.path or ""), None, None
    may_stream = may_stream and device == CPU  # a GPU reads no files

    def chosen(ask: Callable[[str], Keeping]) -> Keeping:
        """How weights are kept: whole if nothing else is asked for or allowed, and in files only if that is."""
        if not may_stream and dtype not in NARROW:
            return WHOLE
        keeping = ask(dtype)
        return Keeping(keeping.dtype) if keeping.in_files and not may_stream else keeping

    if path.is_file():
        file = read_gguf(path)
        tokenizer, keeping = tokenizer_from_gguf(file), chosen(partial(keeping_of_gguf, file))
        model = model_from_gguf(file, dtype=keeping.dtype, by_blocks=keeping.in_files, progress=progress)
        said = file.metadata.get
        base = said("general.base_model.0.name") or said("general.name")
        owner = said("general.base_model.0.organization") or said("general.organization")
        source = replace(
            source,
            sha256=source.sha256 or sha256_file(path),
            license=said("general.license"),
            base_model=source.base_model or (f"{owner}/{base}" if owner and base else base),
            made_from=said("phoneready.source_sha256"),
            tied=tying_note(file, model.config),
        )
        if source.tied:
            _log.warning("%s: %s", path, source.tied)
    else:
        progress(f"loading {source.name}", 0, 1)
        settings = read_model_config(path)
        tokenizer = load_folder_tokenizer(path)
        keeping = chosen(partial(keeping_of_folder, path))
        # What is folded into the weights of another type would be rounded.
        own = None if fold_of(settings) else uniform_dtype(safetensors_files(path))
        stored = None if is_folded(path) else own
        read = torch.float32 if is_folded(path) else keeping.dtype
        model = load_folder(path, dtype=read, by_blocks=keeping.in_files)
        source = folder_source(path, source)
        progress(f"loading {source.name}", 1, 1)
    if dtype in NARROW and not keeping.in_files:
        cast_weights(model, NARROW[dtype])
    check_finite(model, str(path))  # after they are rounded, too
    let_go(model)
    if dtype in NARROW and keeping.is_whole:
        cast_weights(model, torch.float32)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise InputError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens but the model embeds only {rows}"
        )
    model = placed(model, device, instead=OR_NARROW if dtype == AUTO else CPU.type)
    model = model if keeping.is_whole or keeping.in_files else held_model(model)
    if dtype in NARROW:
        source = source if own == NARROW[dtype] else replace(source, rounded=dtype)
        stored = NARROW[dtype]
    return LoadedModel(model, tokenizer, source, stored)


def load_tokenizer(reference: str | Path) -> Any:
    """Load only the tokenizer of a reference; raises InputError as `load_model`."""
    path = Path(find_model(reference, tokenizer_only=True).path or "")
    return tokenizer_from_gguf(path) if path.is_file() else load_folder_tokenizer(path)


def find_model(
    reference: str | Path, *, progress: Progress = no_progress, tokenizer_only: bool = False
) -> ModelSource:
    """Find, or fetch, what a reference stands for: a GGUF file or a folder, unread; raises InputError."""
    text = str(reference)
    path = Path(reference)
    if text in BUILTIN_MODELS:
        row = BUILTIN_MODELS[text]
        file = fetch_builtin(text, progress=progress)
        return ModelSource(text, "builtin", row.name, str(file), sha256=row.sha256, base_model=row.base_model)
    if path.is_dir():
        return ModelSource(text, "folder", short_name(path.resolve().name), str(path))
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError("not a model", field="model", value=text, allowed="a folder or a .gguf file")
        return ModelSource(text, "gguf", short_name(path.stem), str(path))
    hub = _REFERENCE.fullmatch(text)
    if hub is None or path.suffix == ".gguf":
        known = f"a folder, a .gguf file, OWNER/NAME on the hub, or built in: {', '.join(BUILTIN_MODELS)}"
        raise InputError("no such model", field="model", value=text, allowed=known)
    import huggingface_hub

    name = hub["name"]
    progress(f"fetching {name}", 0, 1)
    patterns = [*_TOKENIZER_PATTERNS, *(() if tokenizer_only else _MODEL_PATTERNS)]
    try:
        with quiet_transformers():
            config = huggingface_hub.hf_hub_download(name, "config.json", revision=hub["revision"])
            read_model_config(Path(config).parent)  # judged before the weights are fetched
            commit = Path(config).parent.name
            fetch = partial(huggingface_hub.snapshot_download, name, revision=commit, ignore_patterns=["*/*"])
            folder = Path(fetch(allow_patterns=["config.json", *patterns]))
            if not tokenizer_only:
                # Weights lie in other forms beside these, as large again.
                index = folder / INDEX_FILE
                fetch(allow_patterns=[SINGLE_FILE, *(shard_names(index) if index.is_file() else ())])
    except InputError:
        raise
    except Exception as error:  # the client's errors, and those of what it sends requests with, share no base
        raise InputError(
            f"{name} is no local path and cannot be fetched from the hub: {one_line(error, 160)}",
            allowed="a folder, a .gguf file, or a hub model that can be reached",
        ) from error
    progress(f"fetching {name}", 1, 1)
    return ModelSource(text, "hub", name.rpartition("/")[2], str(folder), revision=folder.name)


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
                read = {ours: one.get_tensor(name) for name, ours in names.items()}
            check_floats(read, str(file))
            weights |= {name: tensor.to(dtype) for name, tensor in read.items()}
            del read
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
