"""Models of GGUF files: configuration from the metadata, weights dequantized into a transformers model.

transformers' own reader needs accelerate, differs between major versions, and leaves out special tokens and the scaling
of rotary frequencies.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from cfsp.errors import InputError
from cfsp.models.architectures import keyless_blocks, stated_widths
from cfsp.models.families import FOLDS, family_of_gguf
from cfsp.models.families.row import FULL, WINDOWED, Family
from cfsp.models.gguf_file import (
    CONVOLUTIONS,
    DELTA_NET_NUMBERS,
    EMBEDDING,
    OUTPUT,
    ROPE_FREQUENCIES,
    GGUFFile,
    GGUFTensor,
    drafting_blocks,
    is_drafting,
    tensor_names,
    tilings,
)
from cfsp.models.offload import AUTO, Keeping, keeping_of, offloaded_copy
from cfsp.models.rope import split_pairs
from cfsp.models.weights import check_factors, check_memory, model_class, model_from_weights, times_
from cfsp.progress import Progress, no_progress
from cfsp.reading import as_input_error
from cfsp.validation import check_kinds, kinds

SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""llama.cpp's names under general.sampling -> Hugging Face's."""
_YARN = {"yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0}
"""llama.cpp's defaults."""
_STILL = 1e20  # divisors from which on nothing turns
_LLAMA3_FACTORS = (8.0, 16.0, 32.0)
_STEP = 4  # of the blocks that attend, if a file does not say it; llama.cpp's number
_BLOCKS_OF_27B = 62
_ROUNDING = 1.3
"""Relative error of weights in a type of b bits: this, times 2^-b; measured on normal numbers, 8 % for Q4_0."""
_LEAST_DIFFERENCE, _MOST_DIFFERENCE, _CHUNK_ROWS = 0.005, 0.5, 4096


def config_from_gguf(file: GGUFFile) -> Any:
    """transformers configuration of a GGUF file, special token ids included; raises InputError."""
    row, said = _row(file), file.hyperparameter
    own = kinds(row.gguf_kinds)
    check_kinds({key: value for key in own if (value := said(key)) is not None}, own, str(file.path))
    shapes = {tensor.name: tensor.shape for tensor in file.tensors}
    heads, hidden, kv_heads = said("attention.head_count"), said("embedding_length"), None
    if not heads or not hidden or EMBEDDING not in shapes:
        raise InputError(
            f"{file.path} lacks the model's dimensions or its embeddings (a vocabulary-only file?)"
        )

    # Which blocks mix tokens by something else than attention.
    n_blocks, mixing = drafting_blocks(file).start, dict[str, Any]()
    kv_heads = said("attention.head_count_kv", heads)
    if row.mixer and row.mixer.step_key:
        key, step = "attention.recurrent_layers", said(row.mixer.step_key, _STEP)
        recurrent = said(key, [(block + 1) % step != 0 for block in range(n_blocks)])
        if len(recurrent) < n_blocks or all(recurrent[:n_blocks]):
            raise InputError(f"{file.path}: no block attends, or not one number for each", field=key)
        mixing["layer_types"] = [row.mixer.kind if one else FULL for one in recurrent[:n_blocks]]
    elif row.mixer and isinstance(kv_heads, list):
        if len(kv_heads) != n_blocks or not any(kv_heads) or said("attention.sliding_window"):
            field = "attention.head_count_kv"
            raise InputError(f"{file.path}: no {row.model_type} model has these", field=field, value=kv_heads)
        mixing["layer_types"] = [FULL if n else row.mixer.kind for n in kv_heads]
        counts = set(kv_heads) - {0}
        kv_heads = counts.pop() if len(counts) == 1 else kv_heads
    for key, value in {"attention.head_count_kv": kv_heads, "attention.head_count": heads}.items():
        if isinstance(value, list):
            raise _each_block_has(file, key)
    for name, where in row.gguf_settings.items():
        mixing[name] = file.require(f"{file.architecture}.{where}") if isinstance(where, str) else where

    ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    rope = _rope_settings(file)
    settings: dict[str, Any] = {
        "vocab_size": shapes[EMBEDDING][0],
        "hidden_size": hidden,
        "num_hidden_layers": n_blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **mixing,
        "head_dim": said(f"attention.key_length{'_swa' if row.own_heads else ''}", hidden // heads),
        "max_position_embeddings": said("context_length", 2048),
        row.epsilon_setting: _shortest(file.require(f"{file.architecture}.attention.layer_norm_rms_epsilon")),
        "torch_dtype": "float32",
        **rope,
        **{name: file.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in ids.items()},
    }

    stated = file.require(f"{file.architecture}.feed_forward_length")
    widths = tuple(stated if isinstance(stated, list) else [stated] * n_blocks)
    ways = [{row.shared_keys.wide_setting: wide} for wide in (False, True)] if row.shared_keys else [{}]
    ffns = ({"intermediate_size": widths[0], **way} for way in ways)
    known = {"model_type": row.model_type, **settings}
    fitting = next((one for one in ffns if stated_widths({**known, **one}) == widths), None)
    if fitting is None:  # the configuration of a dense model cannot say it
        raise _each_block_has(file, "feed_forward_length")
    settings |= fitting

    if row.has_windows:
        settings |= _window_settings(file, row, rope, n_blocks)
    cap = said("final_logit_softcapping", 0.0)
    if cap and not row.cap_setting:
        raise InputError(f"{file.path}: unsupported", field="final_logit_softcapping", value=cap, allowed="0")
    if row.own_heads and not settings.get("sliding_window"):
        raise InputError(f"{file.path}: no {row.model_type} model does without", field="sliding_window")
    if row.block_inputs:
        settings[row.block_inputs.rows_setting] = settings["vocab_size"]
    if row.cap_setting:
        settings[row.cap_setting] = _shortest(cap) if cap else None
    if row.partial_rope:
        head_dim = settings["head_dim"]
        turned = said("rope.dimension_count", head_dim)
        sections = said("rope.dimension_sections", [])[:3]  # frequencies for each axis of an image
        problem = f"{file.path}: unsupported"
        if turned > head_dim or turned % 2:
            allowed = f"an even number, at most {head_dim}"
            raise InputError(problem, field="rope.dimension_count", value=turned, allowed=allowed)
        if sections and (len(sections) < 3 or sum(sections) != turned // 2):
            allowed = f"three numbers, {turned // 2} together"
            raise InputError(problem, field="rope.dimension_sections", value=sections, allowed=allowed)
        settings["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": settings["rope_theta"],
            **settings.get("rope_scaling", {}),
            "partial_rotary_factor": turned / head_dim,
            **({"mrope_section": sections} if sections else {}),
        }
    if row.release > 4 and "rope_parameters" in settings:
        for key in ("rope_theta", "rope_scaling"):  # transformers 5 would keep what says the same again
            settings.pop(key, None)
    if row.scale_setting:
        # llama.cpp's default, which for the family's largest model it knows by the number of blocks.
        settings[row.scale_setting] = hidden // heads if n_blocks == _BLOCKS_OF_27B else settings["head_dim"]
    heads, keys = settings.get("linear_num_value_heads", 0), settings.get("linear_num_key_heads", 1)
    if heads % keys:
        problem, allowed = "no multiple of the key heads", f"{keys} n"
        raise InputError(problem, field="ssm.time_step_rank", value=heads, allowed=allowed)
    settings["tie_word_embeddings"] = OUTPUT not in shapes or _is_stored_twice(file)
    settings |= {key: f"blk.0.{name}.bias" in shapes for key, name in row.bias_settings.items()}
    with as_input_error(f"{file.path}: metadata that does not fit together"):
        return transformers.AutoConfig.for_model(row.model_type, **settings)


def _window_settings(file: GGUFFile, row: Family, rope: Mapping[str, Any], n_blocks: int) -> dict[str, Any]:
    """Which blocks have a sliding window, how wide it is, and the base of their rope; raises InputError."""
    window, base = (file.hyperparameter(key) for key in ("attention.sliding_window", "rope.freq_base_swa"))
    if not window:
        return {"layer_types": [FULL] * n_blocks} | ({"sliding_window": None} if row.rotates_windowed else {})
    settings = {"sliding_window": window}
    if row.window_rope_setting:
        settings[row.window_rope_setting] = _shortest(base or 10000.0)
    elif row.plain_window_rope:  # transformers 5 would take the family's own base for these blocks
        plain = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        windowed = plain | ({"rope_theta": _shortest(base)} if base else {})
        settings["rope_parameters"] = {FULL: plain | rope.get("rope_scaling", {}), WINDOWED: windowed}
    key = "attention.sliding_window_pattern"
    pattern = file.hyperparameter(key)  # without one transformers' default is llama.cpp's, too
    pattern = [True] * n_blocks if pattern == 0 else pattern
    if isinstance(pattern, list):
        if len(pattern) < n_blocks:
            problem = f"{file.path}: not one for each block"
            raise InputError(problem, field=key, value=len(pattern), allowed=str(n_blocks))
        settings["layer_types"] = [WINDOWED if windowed else FULL for windowed in pattern[:n_blocks]]
    elif pattern is not None:
        settings["sliding_window_pattern"] = pattern
    return settings


def _each_block_has(file: GGUFFile, key: str) -> InputError:
    return InputError(f"{file.path} has a {key} for each block; use the checkpoint it was exported from")


def _rope_settings(file: GGUFFile) -> dict[str, Any]:
    """rope_theta and rope_scaling: plain, yarn, Llama 3's divisors or a part of each head; raises InputError."""
    theta = _shortest(file.hyperparameter("rope.freq_base", 10000.0))
    kind = file.hyperparameter("rope.scaling.type", "none")
    if kind == "yarn":
        prefix = f"{file.architecture}.rope.scaling."
        factor = _shortest(file.require(f"{prefix}factor"))
        own = {key.removeprefix(prefix): one for key, one in file.metadata.items() if key.startswith(prefix)}
        odd = {
            key: value for key, value in own.items() if key.startswith("yarn_") and value != _YARN.get(key)
        }
        if odd or factor <= 1:
            key, value = next(iter(odd.items()), ("factor", factor))
            raise InputError(f"{file.path}: unsupported", field=f"rope.scaling.{key}", value=value)
        scaling: dict[str, Any] = {
            "rope_type": "yarn",
            "factor": factor,
            # llama.cpp multiplies the magnitude that yarn derives from the factor.
            "attention_factor": own.get("attn_factor", 1.0) * (0.1 * math.log(factor) + 1.0),
            "original_max_position_embeddings": file.require(f"{prefix}original_context_length"),
        }
        return {"rope_theta": theta, "rope_scaling": scaling}
    if kind != "none":
        allowed = "none, yarn"
        raise InputError(f"{file.path}: unsupported", field="rope.scaling.type", value=kind, allowed=allowed)
    stored = next((tensor for tensor in file.tensors if tensor.name == ROPE_FREQUENCIES), None)
    if stored is None:
        return {"rope_theta": theta}
    divisors = stored.dequantize()
    turned = int((divisors == 1).sum())
    if (divisors[:turned] == 1).all() and (divisors[turned:] >= _STILL).all():
        scaling = {"rope_type": "proportional", "partial_rotary_factor": turned / len(divisors)}
        return {"rope_theta": theta, "rope_scaling": scaling}
    for factor in _LLAMA3_FACTORS:
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        if np.allclose(divisors, llama3_divisors(theta, 2 * len(divisors), scaling), rtol=1e-3):
            return {"rope_theta": theta, "rope_scaling": scaling}
    raise InputError(
        f"{file.path}: {ROPE_FREQUENCIES} is neither Llama 3's scaling nor a rope of a part of each head"
    )


def llama3_divisors(theta: float, head_dim: int, scaling: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    """Divisors of rotary frequencies in Llama 3's scaling, (head_dim / 2,) float32: the tensor rope_freqs.weight.

    With w = 2 pi / inv_freq, the wavelength, and L the original context, frequencies with w < L / high_freq_factor
    stay, those with w > L / low_freq_factor are divided by the factor, and between the two the divisor is
    interpolated: inv_freq' = (1 - s) * inv_freq / factor + s * inv_freq,
    s = (L / w - low_freq_factor) / (high_freq_factor - low_freq_factor).
    """
    factor, low, high = (float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(scaling["original_max_position_embeddings"])
    inv_freq = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = np.clip((context * inv_freq / (2 * math.pi) - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def _shortest(value: float) -> float:
    """The number that was meant by a stored float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _row(file: GGUFFile) -> Family:
    windowed = bool(file.hyperparameter("attention.sliding_window"))
    return family_of_gguf(file.architecture, str(file.path), windowed=windowed)


def model_from_gguf(
    file: GGUFFile, *, dtype: torch.dtype, by_blocks: bool = False, progress: Progress = no_progress
) -> Any:
    """The model of a GGUF file, in eval mode; by_blocks: offloaded, as float32. Raises InputError."""
    config, where = config_from_gguf(file), str(file.path)
    n_weights = _weight_count(file, config)
    if by_blocks:
        weights = _weights(file, config, torch.float32, progress)
        model = offloaded_copy(config, weights, n_weights, where=where)
    else:
        check_memory(n_weights, dtype, where)
        read = dict(_weights(file, config, dtype, progress))
        model = model_from_weights(config, read, dtype=dtype, where=where)
    eos, generation = config.eos_token_id, model.generation_config
    ends = [i for i in (eos, file.metadata.get("tokenizer.ggml.eot_token_id")) if i is not None]
    generation.eos_token_id = ends if len(set(ends)) > 1 else eos
    generation.bos_token_id, generation.pad_token_id = config.bos_token_id, config.pad_token_id
    if sampling := sampling_of_gguf(file):
        generation.update(do_sample=True, **sampling)
    return model


def sampling_of_gguf(file: GGUFFile) -> dict[str, Any]:
    """How a file recommends to sample, under Hugging Face's names; empty if it says nothing."""
    metadata = {name: file.metadata.get(f"general.sampling.{key}") for key, name in SAMPLING.items()}
    # 0.9 and not 0.8999999761581421, as which a float32 comes back.
    return {
        name: value if isinstance(value, int) else float(f"{value:.7g}")
        for name, value in metadata.items()
        if value is not None
    }


def keeping_of_gguf(file: GGUFFile, asked: str = AUTO) -> Keeping:
    """`keeping_of` a file's weights; on disk they are dequantized, as float32."""
    return keeping_of(_weight_count(file, config_from_gguf(file)), torch.float32, asked)


def _weight_count(file: GGUFFile, config: Any) -> int:
    left_out = (*_unread(file, config), *([OUTPUT] if _twice(file, config) else []))
    return sum(math.prod(tensor.shape) for tensor in file.tensors if tensor.name not in left_out)


def _weights(
    file: GGUFFile, config: Any, dtype: torch.dtype, progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters by transformers' names, dequantized one by one; of what is stored twice, one. Raises InputError."""
    row, modules = _row(file), tensor_names(file.architecture, config.num_hidden_layers)
    own = {**DELTA_NET_NUMBERS, row.scalar: (row.scalar, ".weight")}
    names = {}  # llama.cpp's of every tensor that the model can have -> transformers'
    misfit = f"{file.path}: the metadata does not fit the tensors"
    with torch.device("meta"), as_input_error(misfit):
        parameters = model_class(config)(config).state_dict()
    for parameter in parameters:
        module, _, kind = parameter.rpartition(".")
        called, suffix = own.get(kind, ("", f".{kind}"))
        names[f"{modules.get_name(f'{module}.{called}' if called else module)}{suffix}"] = parameter

    # What weights of a model that is read as one of another type are multiplied by.
    fold = next((fold for fold in FOLDS.values() if fold.gguf_name == file.architecture), None)
    factors: Mapping[str, float] = {}
    if fold is not None and fold.gguf_keys:
        if file.hyperparameter("rope.scaling.finetuned") is False:
            raise InputError(
                f"{file.path}: unsupported", field="rope.scaling.finetuned", value=False, allowed="true"
            )
        stated = {name: file.hyperparameter(key) for name, key in fold.gguf_keys.items()}
        factors = fold.factors(config.to_dict() | stated)
        check_factors(factors, str(file.path))

    tiled = {}
    if hasattr(config, "linear_num_key_heads"):
        keys, value_heads = config.linear_num_key_heads, config.linear_num_value_heads
        tiled = dict(tilings(keys, value_heads, keys * config.linear_key_head_dim))
    both, unread = _twice(file, config), _unread(file, config)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for done, tensor in enumerate(file.tensors, 1):
        progress("reading GGUF", done, len(file.tensors))
        if tensor.name in unread or (both and tensor.name == OUTPUT):
            continue
        if tensor.name not in names:
            raise InputError(
                f"{file.path} has a tensor that {file.architecture} models do not have", value=tensor.name
            )
        stored, name = max(both.values(), key=_bits) if tensor.name in both else tensor, names[tensor.name]
        is_kernel = tensor.name.endswith(CONVOLUTIONS)  # in torch it has one input
        shape = (tensor.shape[0], 1, *tensor.shape[1:]) if is_kernel else tensor.shape
        if shape != (expected := tuple(parameters[name].shape)):
            raise InputError(misfit, field=tensor.name, value=shape, allowed=str(expected))
        values = torch.from_numpy(stored.dequantize()).float()
        stored.let_go()
        part = tensor.name.split(".")[-2]
        if row.layouts[0].interleaved_rope and part in heads:
            values = split_pairs(values, heads[part])
        in_mixer = row.mixer is not None and f".{row.mixer.module}." in name
        if row.norm_offset and tensor.name.endswith("norm.weight") and not in_mixer:
            values -= row.norm_offset
        if (
            in_mixer
        ):  # value heads of gated delta nets in another order, rates of decay as they are multiplied with
            last = name.removesuffix(".weight").rpartition(".")[2]
            if last == "A_log":
                with np.errstate(all="ignore"):  # not a number if that is not below 0
                    values = torch.from_numpy(np.log(-values.numpy()))
            values = torch.from_numpy(tiled[last].grouped(values.numpy())) if last in tiled else values
        times_(name, values, factors)
        yield name, values.view(shape).to(dtype)


def _unread(file: GGUFFile, config: Any) -> frozenset[str]:
    """Tensors that no parameter is made of: the rope's, keys of blocks that read others', and what drafts tokens."""
    settings = {"model_type": config.model_type, **vars(config)}
    keyless = keyless_blocks(settings) if _row(file).shared_keys else ()
    keys = {f"blk.{n}.{part}.weight" for n in keyless for part in ("attn_k", "attn_v", "attn_k_norm")}
    drafts = filter(is_drafting(file), (tensor.name for tensor in file.tensors))
    return frozenset({ROPE_FREQUENCIES, *keys, *drafts})


def tying_note(file: GGUFFile, config: Any) -> str | None:
    """What to say of a file whose output matrix is its embedding in other bits; None of any other."""
    both = _twice(file, config)
    if not both:
        return None
    embedding, output = both[EMBEDDING].kind.name, both[OUTPUT].kind.name
    return (
        f"the output matrix ({output}) is the embedding ({embedding}) but for rounding, so "
        f"{math.prod(both[OUTPUT].shape)} weights were stored twice; "
        f"{max(both.values(), key=_bits).kind.name} is kept for both"
    )


def _twice(file: GGUFFile, config: Any) -> dict[str, GGUFTensor]:
    """The embedding and the output matrix that were found to be one; empty of a file that has one, or two."""
    tensors = {tensor.name: tensor for tensor in file.tensors}
    both = {name: tensors[name] for name in (OUTPUT, EMBEDDING) if name in tensors}
    return both if len(both) == 2 and config.tie_word_embeddings else {}


def _is_stored_twice(file: GGUFFile) -> bool:
    """Whether rounding explains how every row of the output matrix differs from the embedding's."""
    tensors = {tensor.name: tensor for tensor in file.tensors}
    embedding, output = tensors[EMBEDDING], tensors[OUTPUT]
    if embedding.shape != output.shape:
        return False
    rounding = 2 * _ROUNDING * math.hypot(*(2.0 ** -_bits(tensor) for tensor in (embedding, output)))
    limit = min(max(rounding, _LEAST_DIFFERENCE), _MOST_DIFFERENCE)
    for start in range(0, embedding.shape[0], _CHUNK_ROWS):
        ours, theirs = (tensor.rows(start, start + _CHUNK_ROWS) for tensor in (embedding, output))
        with np.errstate(all="ignore"):  # a damaged file is told of later
            sizes, differences = (np.square(values).sum(1) for values in (ours, ours - theirs))
            # Rows of unused tokens are next to nothing.
            if not (differences <= limit**2 * np.maximum(sizes, sizes.mean())).all():
                return False
    return True


def _bits(tensor: GGUFTensor) -> int:
    """Of a weight, as the type's name has them: 4 for IQ4_NL."""
    digits = re.search(r"\d+", tensor.kind.name)
    return int(digits[0]) if digits else 0
