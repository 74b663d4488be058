"""From a model reference to a model and its tokenizer.

A reference is one of
    smollm2-135m         a built-in alias (see cfsp.models.builtin)
    FOLDER               a Hugging Face folder with safetensors, or a checkpoint that phoneready saved
    FILE.gguf            a GGUF file, dequantized
    OWNER/NAME[@REV]     a model on the Hugging Face hub
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cfsp.devices import CPU, OR_NARROW, placed
from cfsp.errors import InputError
from cfsp.files import sha256_file, short_name
from cfsp.models.builtin import BUILTIN_MODELS, fetch_builtin
from cfsp.models.checkpoint import NOTICE_PATTERNS
from cfsp.models.config_file import read_model_config
from cfsp.models.families import fold_of
from cfsp.models.gguf_file import read_gguf
from cfsp.models.gguf_model import keeping_of_gguf, model_from_gguf, tying_note
from cfsp.models.gguf_tokenizer import tokenizer_from_gguf
from cfsp.models.hf_folder import (
    folder_source,
    is_folded,
    keeping_of_folder,
    load_folder,
    load_folder_tokenizer,
)
from cfsp.models.offload import AUTO, NARROW, WHOLE, Keeping, held_model, let_go
from cfsp.models.source import LoadedModel, ModelSource
from cfsp.models.weights import (
    INDEX_FILE,
    SINGLE_FILE,
    cast_weights,
    check_finite,
    quiet_transformers,
    safetensors_files,
    shard_names,
    uniform_dtype,
)
from cfsp.progress import Progress, no_progress
from cfsp.reading import one_line

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
