"""Pruned checkpoints: Hugging Face folders that load with and without phoneready.

Uniform widths give a plain folder. Different widths and heads are written as `per_layer_config`, the schema of
transformers 5, with a small modelling file through `auto_map`, so that transformers 4 and 5 both build them.
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import safetensors.torch
import torch
import transformers

from cfsp.devices import CPU, OR_NARROW, placed
from cfsp.errors import InputError
from cfsp.files import atomic_directory, sha256_file, write_json
from cfsp.models.architectures import keyless_blocks, model_shape, stated_widths, width_settings
from cfsp.models.config_file import (
    check_generation_config,
    dense_settings,
    read_model_config,
    shape_from_config,
)
from cfsp.models.families import FAMILIES
from cfsp.models.families.row import FULL, WINDOWED
from cfsp.models.offload import NARROW, WHOLE, Keeping, held_model, let_go, offloaded_model
from cfsp.models.remote_code import modeling_pruned
from cfsp.models.shape import ModelShape, require_supported
from cfsp.models.source import LoadedModel, ModelSource
from cfsp.models.weights import (
    OUTPUT_MATRIX,
    check_finite,
    check_memory,
    model_class,
    model_from_weights,
    read_safetensors,
    safetensors_files,
    save_weights,
    sha256_files,
    storable_dtype,
    uniform_dtype,
)
from cfsp.progress import Progress, no_progress
from cfsp.reading import as_input_error, read_json
from cfsp.records import Record, read_record, tool_version, write_record
from cfsp.validation import Seed

INFO_FILE = "phoneready.json"
PLAN_FILE = "pruning_plan.json"
_MOMENTS_FILE = "input_moments.safetensors"
NOTICE_PATTERNS = ("LICENSE*", "NOTICE*", "USE_POLICY*")  # files that have to go where a model goes
# Keys of tokenizer_config.json that say where a tokenizer was loaded from, or that only one major version knows.
_DROPPED = (
    *("auto_map", "backend", "gguf_file", "is_local", "local_files_only"),
    *("name_or_path", "tokenizer_file", "vocab_file"),
)
_LEFTOVERS = (
    *("tokenizer.model", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is and where it came from."""

    KIND: ClassVar[str] = "checkpoint"
    SCHEMA_VERSION: ClassVar[int] = 2

    source: ModelSource  # the dense model
    shape: ModelShape
    plan_sha256: str | None  # None without a plan
    weights_sha256: str  # of model.safetensors, or its shards in order of name
    dtype: str
    versions: dict[str, str]  # of the packages that wrote it
    seed: Seed


def save_checkpoint(
    loaded: LoadedModel,
    directory: Path,
    *,
    plan: Record | None = None,
    input_moments: Mapping[str, torch.Tensor] | None = None,
    beside: Mapping[str, Record | Mapping[str, torch.Tensor]] | None = None,
    seed: int = 0,
    force: bool = False,
    progress: Progress = no_progress,
) -> CheckpointInfo:
    """Write a model, pruned or dense, with its tokenizer, licence and provenance, atomically.

    Args:
        input_moments: Module name to mean squared input per channel, (in_features,) float32.
        beside: File name to a further record or table of tensors.

    Raises:
        InputError: The folder exists, or cannot be written; the weights are not finite; the plan is another model's.
    """
    model = loaded.model
    shape = model_shape(model)
    planned = getattr(plan, "shape", None)
    if planned is not None and not planned.agrees_with(shape):
        raise InputError("the plan's widths are not the model's", field="plan", value=planned.ffn_widths)
    shape = shape if planned is None else shape.with_origins(planned)
    check_finite(model, loaded.source.name)
    dtype = storable_dtype(model, loaded.stored_dtype or model.dtype)
    with atomic_directory(directory, force=force) as folder:
        save_weights(model, folder, dtype, progress=progress)
        _save_config(model, folder, shape, str(dtype).removeprefix("torch."))
        save_tokenizer(loaded.tokenizer, folder)
        origin = loaded.source.path
        # A lone GGUF file may lie in a folder of other things, whose licence is not its own.
        if origin and loaded.source.kind != "gguf":
            copy_notices(Path(origin) if Path(origin).is_dir() else Path(origin).parent, folder)
        if loaded.source.license and not any(folder.glob("LICENSE*")):
            of = loaded.source.base_model or loaded.source.name
            text = f"Derived from {of}, whose stated licence is: {loaded.source.license}"
            printable = "".join(c if c.isprintable() else " " for c in text)  # as a terminal may show it
            (folder / "LICENSE").write_text(f"{printable}\n", encoding="utf-8")
        files = {**({} if plan is None else {PLAN_FILE: plan}), **(beside or {})}
        if input_moments is not None:
            files[_MOMENTS_FILE] = {n: values.float().contiguous() for n, values in input_moments.items()}
        for name, content in files.items():
            if isinstance(content, Mapping):
                safetensors.torch.save_file(dict(content), folder / name)
            else:
                write_record(folder / name, content)
        let_go(model)
        packages = ("torch", "transformers", "tokenizers", "safetensors")
        versions = {"phoneready": tool_version(), "python": platform.python_version()}
        info = CheckpointInfo(
            # Absolute, as whoever reads it may work elsewhere, and checkpoints are moved.
            source=replace(loaded.source, path=origin and str(Path(origin).absolute())),
            shape=shape,
            plan_sha256=sha256_file(folder / PLAN_FILE) if plan is not None else None,
            weights_sha256=sha256_files(safetensors_files(folder)),
            dtype=str(dtype).removeprefix("torch."),
            versions=versions | {name: importlib.metadata.version(name) for name in packages},
            seed=seed,
        )
        write_record(folder / INFO_FILE, info)
    return info


def _save_config(model: Any, folder: Path, shape: ModelShape, dtype: str) -> None:
    """config.json, generation_config.json, and the modelling file if blocks differ; raises InputError."""
    native = model_class(model.config)
    model.config.architectures, model.config.dtype = [native.__name__], dtype
    model.config.save_pretrained(folder)
    # Not `save_pretrained`: published models have settings that contradict each other, which it refuses.
    model.generation_config.to_json_file(folder / "generation_config.json")
    stored = read_json(folder / "config.json")
    row, rope = FAMILIES[stored["model_type"]], stored.get("rope_parameters")
    if row.release == 4 and isinstance(rope, dict):
        # In both spellings: version 4 of transformers reads `rope_theta`, `rope_scaling` and, in some model types, a
        # base of sliding windows, and would silently take its defaults.
        of_windows, rope = rope.get(WINDOWED), dict(rope.get(FULL, rope))
        theta = rope.pop("rope_theta", None)
        if isinstance(of_windows, dict):
            setting, base = row.window_rope_setting, of_windows["rope_theta"]
            if not setting and base != theta:
                problem = "transformers 4 has one base for all blocks"
                raise InputError(problem, field="rope_theta", value=base, allowed=str(theta))
            stored |= {setting: base} if setting else {}
        if theta is not None:
            stored["rope_theta"] = theta
        stored["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    code = Path(str(modeling_pruned.__file__))
    (folder / code.name).unlink(missing_ok=True)
    stored, _ = dense_settings(stored, str(folder))
    stored.pop("auto_map", None)
    widths, settings = shape.ffn_widths, model.config.to_dict()
    of_widths = width_settings(settings, widths)
    stored |= {"architectures": [native.__name__], **of_widths}
    if not _is_stated(shape, settings | of_widths):
        most = model.config.num_key_value_heads
        kv_heads = [most if block.is_keyless else block.kv_groups or 0 for block in shape.blocks]
        shutil.copyfile(code, folder / code.name)
        stored["auto_map"] = {"AutoModelForCausalLM": f"{code.stem}.{per_layer_class(model.config).__name__}"}
        ours = modeling_pruned.per_layer_settings(widths, kv_heads, most)
        stored["per_layer_config"] = modeling_pruned.joined_settings(stored.get("per_layer_config"), ours)
    write_json(folder / "config.json", stored)


def _is_stated(shape: ModelShape, settings: Mapping[str, Any]) -> bool:
    """Whether transformers' own class builds a shape by settings that state nothing of single blocks but heads."""
    keyless = keyless_blocks(settings)
    heads = settings.get("num_key_value_heads") or settings["num_attention_heads"]
    return shape.ffn_widths == stated_widths(settings) and all(
        block.has_attention and block.kv_groups == (0 if index in keyless else heads)
        for index, block in enumerate(shape.blocks)
    )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a fast tokenizer so that AutoTokenizer of transformers 4 and 5 reads it unchanged; raises InputError."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            "only fast tokenizers (those with a tokenizer.json) are supported", value=type(tokenizer).__name__
        )
    tokenizer.save_pretrained(folder)
    for leftover in _LEFTOVERS:
        (folder / leftover).unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    settings = {key: value for key, value in read_json(file).items() if key not in _DROPPED}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {"model_input_names": list(tokenizer.model_input_names)}
    # Version 5 lists these under a name that version 4 expects a mapping under.
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, list):
        del settings["extra_special_tokens"]
        settings["additional_special_tokens"] = extra
    write_json(file, settings)


def copy_notices(source: Path, folder: Path) -> None:
    """Copy a model's licence files, but for links that would publish what lies elsewhere."""
    whole = source.resolve()
    inside = (whole, whole.parent.parent / "blobs")  # to which the files of the hub's cache are links
    for file in (file for pattern in NOTICE_PATTERNS for file in source.glob(pattern) if file.is_file()):
        if any(file.resolve().is_relative_to(place) for place in inside):
            shutil.copyfile(file, folder / file.name)
        else:
            _log.warning("%s leads out of its folder, and is not copied", file)


def load_pruned(directory: Path, dtype: torch.dtype | None = None, *, by_blocks: bool = False) -> Any:
    """A checkpoint in eval mode, without running its code; by_blocks: offloaded to its files. Raises InputError."""
    where, file = str(directory), directory / "config.json"
    settings = read_model_config(directory)
    with as_input_error(f"{file} cannot be used"):
        stated, given = dense_settings(settings, str(file))
        plain = transformers.AutoConfig.for_model(**stated)
        known = plain.to_dict()
        shape = shape_from_config(known, given, str(file))
        require_supported(shape, str(file), keyless_blocks(known))
        config = transformers.AutoConfig.for_model(**settings)
        cls = model_class(plain) if _is_stated(shape, known) else per_layer_class(plain)
    files = safetensors_files(directory)
    if by_blocks:
        model = offloaded_model(config, files, where=where, cls=cls)
    else:
        weights = {name: tensor for one in files for name, tensor in read_safetensors(one).items()}
        if not weights:
            raise InputError(f"{where} has no tensors in its weight files")
        dtype, tied = dtype or next(iter(weights.values())).dtype, config.tie_word_embeddings
        counted = (w.numel() for name, w in weights.items() if not tied or name != OUTPUT_MATRIX)
        check_memory(sum(counted), dtype, where)
        model = model_from_weights(config, weights, dtype=dtype, where=where, cls=cls)
    model.config.__dict__.pop("auto_map", None)
    check_finite(model, where)
    let_go(model)
    if is_pruned_checkpoint(directory):  # the info and the plan must be about these weights
        info, plan, shape = read_checkpoint_info(directory), directory / PLAN_FILE, model_shape(model)
        if not info.shape.agrees_with(shape):
            told = info.shape.ffn_widths if info.shape.ffn_widths != shape.ffn_widths else info.shape
            raise InputError(f"{directory / INFO_FILE} disagrees with the weights", field="shape", value=told)
        if info.plan_sha256 is not None and not plan.is_file():
            raise InputError(f"{plan} is missing, though {INFO_FILE} names it")
        if info.plan_sha256 is not None and sha256_file(plan) != info.plan_sha256:
            raise InputError(
                f"{plan} is not the plan that these weights were made with (its SHA-256 differs)"
            )
    model.generation_config = read_generation_config(directory) or model.generation_config
    return model


def open_pruned(directory: Path, device: torch.device | str = CPU, keeping: Keeping = WHOLE) -> Any:
    """`load_pruned` on a device, its weights kept in a way; raises InputError if the device cannot hold it."""
    has_narrow = uniform_dtype(safetensors_files(directory)) in NARROW.values()
    instead = OR_NARROW if keeping.is_whole and has_narrow else CPU.type
    model = load_pruned(directory, keeping.dtype, by_blocks=keeping.in_files)
    model = placed(model, device, instead=instead)
    return model if keeping.is_whole or keeping.in_files else held_model(model)


def is_pruned_checkpoint(directory: Path) -> bool:
    """Whether a folder was written by `save_checkpoint`."""
    return (directory / INFO_FILE).is_file()


def read_checkpoint_info(directory: Path) -> CheckpointInfo:
    """phoneready.json; raises InputError if it is missing or malformed."""
    return read_record(CheckpointInfo, directory / INFO_FILE)


def read_generation_config(folder: Path) -> Any:
    """transformers' generation config of a folder, None if it has none; raises InputError for a malformed one."""
    if not check_generation_config(folder):
        return None
    with as_input_error(f"{folder / 'generation_config.json'} cannot be used"):
        return transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)


def load_input_moments(directory: Path) -> dict[str, torch.Tensor] | None:
    """The stored input moments, or None if the checkpoint has none."""
    file = directory / _MOMENTS_FILE
    return read_safetensors(file) if file.is_file() else None


def per_layer_class(config: Any) -> Any:
    """The class in remote_code/ that builds this configuration's model with blocks that differ."""
    name = f"Pruned{model_class(config).__name__}"
    if (found := getattr(modeling_pruned, name, None)) is None:
        problem = f"transformers has no class of which {name} could be made"
        raise InputError(problem, field="model_type", value=config.model_type)
    return found


_RECORD, _TENSORS = "rounded.json", "rounded.safetensors"


@dataclass(frozen=True)
class RoundedFormat:
    """What the numbers are."""

    KIND: ClassVar[str] = "rounded"
    SCHEMA_VERSION: ClassVar[int] = 1

    format: str  # what export calls it
    types: dict[str, str]  # tensor of a GGUF file, or layer of an ONNX variant -> how it is stored
    predicted_loss: float | None  # nats a token that the types cost, if they were chosen by that


class RoundedNumbers(NamedTuple):
    """A file's matrices."""

    format: RoundedFormat
    # Name -> a GGUF matrix's bytes, (rows, bytes of a row) uint8; or an ONNX layer's numbers and scales.
    tensors: Mapping[str, torch.Tensor]

    @property
    def files(self) -> dict[str, Record | Mapping[str, torch.Tensor]]:
        """For `save_checkpoint`, beside the weights."""
        return {_RECORD: self.format, _TENSORS: self.tensors}


def read_rounded_format(folder: Path) -> RoundedFormat | None:
    """What a checkpoint's are; None where it has none. Raises InputError where the record is damaged."""
    file = folder / _RECORD
    return read_record(RoundedFormat, file) if file.is_file() else None


def read_rounded(folder: Path, name: str) -> RoundedNumbers | None:
    """A checkpoint's numbers of a format; None where it has none of it. Raises InputError where they are damaged."""
    found = read_rounded_format(folder)
    if found is None or found.format != name:
        return None
    return RoundedNumbers(found, read_safetensors(folder / _TENSORS))
