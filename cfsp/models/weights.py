"""Building transformers models from tensors, and reading and writing safetensors."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import huggingface_hub
import huggingface_hub.utils
import safetensors
import safetensors.torch
import torch
import transformers
from pydantic import Field

from cfsp.errors import InputError
from cfsp.files import write_json
from cfsp.memory import require_memory
from cfsp.models.architectures import spec_for
from cfsp.progress import Progress, no_progress
from cfsp.reading import as_input_error, read_json_object
from cfsp.validation import check_kinds, kinds

_log = logging.getLogger(__name__)
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SHARD_BYTES = 10**9
_ShardName = Annotated[str, Field(pattern=r"^[^/\\\x00-\x1f]{1,240}\.safetensors$")]
_INDEX = kinds(weight_map=dict[str, _ShardName])


OUTPUT_MATRIX = "lm_head.weight"  # a file may have it beside the embedding that it is
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def model_class(config: Any) -> Any:
    """transformers' own causal LM class for a configuration whose model type is in the architecture table."""
    spec_for(config)
    known, kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING, type(config)
    if kind not in known:
        problem = "models with code of their own are not supported"
        raise InputError(problem, field="config", value=kind.__name__)
    return known[kind]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers and the hub's client from drawing bars and from logging anything but errors."""
    logs, client = transformers.utils.logging, huggingface_hub.utils.logging
    with ExitStack() as stack:
        for library in (logs, client):
            stack.callback(library.set_verbosity, library.get_verbosity())
            library.set_verbosity_error()
        if logs.is_progress_bar_enabled():
            logs.disable_progress_bar()
            stack.callback(logs.enable_progress_bar)
        yield


def model_from_weights(
    config: Any, weights: Mapping[str, torch.Tensor], *, dtype: torch.dtype, where: str, cls: Any = None
) -> Any:
    """A causal LM in eval mode; raises InputError for missing, unknown, misshapen or quantized weights."""
    builder = cls or model_class(config)
    check_floats(weights, where)
    with quiet_transformers(), torch.device("meta"), as_input_error(f"{where} cannot be used"):
        stated = sum(parameter.numel() for parameter in builder(config).parameters())
    # transformers would make all that is missing, and takes sizes that are not stated from its default model.
    if stated > 2 * (n_stored := sum(tensor.numel() for tensor in weights.values())):
        raise InputError(
            f"{where}: the configuration states a model of {stated:,} weights, and {n_stored:,} are stored",
            allowed="the sizes of this model (hidden_size, intermediate_size, num_hidden_layers, vocab_size, ...)",
        )
    with quiet_transformers(), as_input_error(f"{where}: the weights do not fit the configuration"):
        model, report = builder.from_pretrained(
            None,
            config=config,
            state_dict=dict(weights),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
        )
    for key, what in (
        ("mismatched_keys", "tensors of the wrong shape"),
        ("missing_keys", "missing tensors"),
        ("unexpected_keys", "tensors that the model does not have"),
    ):
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in report.get(key) or ())
        # Old checkpoints store rotary frequencies, which are computed nowadays.
        names = [name for name in names if not name.endswith("inv_freq")]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(f"{where}: {what}: {', '.join(names[:3])}{more}")
    return model.eval()


def check_memory(n_weights: int, dtype: torch.dtype, where: str) -> None:
    """Raise InputError for a model that does not fit into memory."""
    kind = str(dtype).removeprefix("torch.")
    what = f"{where}: the model, {n_weights / 1e9:.2g} billion weights in {kind},"
    require_memory(n_weights * dtype.itemsize, what, "a smaller model, or a machine with more memory")


def uniform_dtype(files: Iterable[Path]) -> torch.dtype | None:
    """The dtype of all tensors of safetensors files; None if they differ, or are no plain numbers."""
    kinds = set()
    for file in files:
        with as_input_error(f"{file} is damaged or cut short"), safetensors.safe_open(file, "pt") as opened:
            kinds |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    return _DTYPES.get(kinds.pop()) if len(kinds) == 1 else None


def weight_count(files: Iterable[Path], *, tied: bool) -> int:
    """Weights in safetensors files, by their headers; of tied ones without the output matrix."""
    total = 0
    for file in files:
        with as_input_error(f"{file} is damaged or cut short"), safetensors.safe_open(file, "pt") as handle:
            names = [name for name in handle.keys() if not tied or name != OUTPUT_MATRIX]  # noqa: SIM118
            total += sum(math.prod(handle.get_slice(name).get_shape()) for name in names)
    return total


def check_finite(model: Any, where: str) -> None:
    """Raise InputError if a weight is NaN or infinite, naming the tensor."""
    for name, parameter in model.named_parameters():
        if not all(bool(torch.isfinite(piece).all()) for piece in _pieces(parameter)):
            narrow = parameter.dtype == torch.float16
            raise InputError(
                f"{where}: the weights of {name} are not all finite (NaN or infinity)",
                allowed="bfloat16: float16 holds none above 65504" if narrow else "",
            )


def storable_dtype(model: Any, dtype: torch.dtype) -> torch.dtype:
    """The dtype, or float32 if that is float16 and a number of the model is too large for it."""
    if dtype == torch.float16:
        largest = torch.finfo(dtype).max
        for name, parameter in model.named_parameters():
            if any(bool((piece.abs() > largest).any()) for piece in _pieces(parameter)):
                _log.warning("%s has a number too large for float16: the weights are stored in float32", name)
                return torch.float32
    return dtype


def save_weights(model: Any, folder: Path, dtype: torch.dtype, *, progress: Progress = no_progress) -> None:
    """Write a model's weights in a dtype, in shards as Hugging Face names them; at most one is held."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    stored = model.state_dict().keys()
    # Numbers that are not trained; those that are computed from the configuration are not among the stored.
    parameters |= {name: buffer for name, buffer in model.named_buffers() if name in stored}
    sizes = {name: torch.empty(p.shape, dtype=dtype, device="meta") for name, p in parameters.items()}
    split = huggingface_hub.split_torch_state_dict_into_shards(sizes, max_shard_size=SHARD_BYTES)
    for done, (file, names) in enumerate(split.filename_to_tensors.items()):
        progress("writing weights", done, len(split.filename_to_tensors))
        shard = {name: parameters[name].to("cpu", dtype).contiguous() for name in names}
        safetensors.torch.save_file(shard, folder / file, metadata={"format": "pt"})
    progress("writing weights", len(split.filename_to_tensors), len(split.filename_to_tensors))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX_FILE, index)


def cast_weights(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give all that is stored a dtype; what is computed, such as rotary frequencies, keeps its own."""
    for tensor in module.state_dict(keep_vars=True).values():
        if tensor.is_floating_point() and tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)


def _pieces(parameter: torch.Tensor) -> Iterable[torch.Tensor]:
    return torch.split(parameter.detach().flatten(), 2**24)


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face folder, in order of name; raises InputError for pickled or missing ones."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if (index := folder / INDEX_FILE).is_file():
        files = [folder / name for name in shard_names(index)]
        missing = ", ".join(one.name for one in files if not one.is_file())
        if missing or not files:
            raise InputError(f"{index} names weight files that are missing: {missing}")
        return files
    if any(file.suffix in (".bin", ".pt", ".pth") for file in folder.glob("*")):
        problem = f"{folder} holds pickled weights only, which can run code when they are read"
        raise InputError(problem, allowed="safetensors")
    raise InputError(f"{folder} has no weights", allowed=f"{SINGLE_FILE} or {INDEX_FILE} with its shards")


def shard_names(file: Path) -> list[str]:
    """The safetensors files that an index names, all of them in its folder itself."""
    index = {"weight_map": None} | read_json_object(file)
    check_kinds(index, _INDEX, str(file))
    return sorted(set(index["weight_map"].values()))


def check_floats(weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise InputError for weights that are codes of a quantizer and not numbers."""
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise is_quantized(where, name, str(tensor.dtype).removeprefix("torch."))


def is_quantized(where: str, name: str, kind: str) -> InputError:
    """The error of a tensor that is stored in codes."""
    allowed = "float32, float16 or bfloat16: the model before it was quantized"
    return InputError(f"{where}: {name} is quantized", field="dtype", value=kind, allowed=allowed)


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file; raises InputError if it is missing or damaged."""
    with as_input_error(f"{file} is damaged or cut short"):
        return dict(safetensors.torch.load_file(file))


def sha256_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Over names, shapes, types and bytes of tensors on the CPU."""
    digest = hashlib.sha256()
    for name, tensor in named:
        values = tensor.contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sha256_files(files: Iterable[Path]) -> str:
    """Over the bytes of several files, one after another."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def times_(name: str, tensor: torch.Tensor, factors: Mapping[str, float]) -> None:
    """Multiply a parameter in place by its module's factor, if there is one."""
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
