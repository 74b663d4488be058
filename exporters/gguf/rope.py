"""Rotary position embedding in llama.cpp's terms: metadata keys, and the factors of llama3's scaling.

llama.cpp rotates by position / freq_factor * freq_base^(-2i/d) * freq_scale. Hugging Face's models rotate by
position * inv_freq, so a scaling that changes single frequencies is written as freq_factor = plain / scaled inv_freq.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cfsp.errors import InputError
from cfsp.models.gguf_model import llama3_divisors
from exporters.checkpoint_reader import ModelConfig

Keys = dict[str, float | int | str]
"""Metadata without the architecture's prefix."""
# llama.cpp's constants, which deci, llama, openelm, qwen2 and qwen3 do not read from the file.
_YARN_FIXED = {"beta_fast": 32.0, "beta_slow": 1.0}


def rope_metadata(config: ModelConfig) -> Keys:
    """What a file says of the rotary embedding.

    Raises:
        InputError: A scaling that llama.cpp does not compute.
    """
    keys: Keys = {"rope.dimension_count": config.head_dim, "rope.freq_base": float(config.rope_theta)}
    if config.rope_scaling is None:
        return keys
    kind = config.rope_scaling["rope_type"]
    if kind not in _SCALINGS:
        raise InputError(
            "llama.cpp does not compute this rope scaling for this architecture",
            field="rope_type",
            value=kind,
            allowed=", ".join(("default", *_SCALINGS)),
        )
    return keys | _SCALINGS[kind](config.rope_scaling, config)


def _linear(scaling: Mapping[str, Any], _: ModelConfig) -> Keys:
    return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}


def _yarn(scaling: Mapping[str, Any], config: ModelConfig) -> Keys:
    for key, fixed in _YARN_FIXED.items():
        if float(scaling.get(key, fixed)) != fixed:
            raise InputError(
                "llama.cpp has this constant built in", field=key, value=scaling[key], allowed=str(fixed)
            )
    if scaling.get("mscale") or scaling.get("mscale_all_dim"):
        raise InputError("yarn with mscale is not supported for this architecture", field="mscale")
    if scaling.get("truncate", True) is not True:
        raise InputError(
            "llama.cpp truncates yarn's correction range", field="truncate", value=False, allowed="true"
        )
    factor = float(scaling["factor"])
    keys: Keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(
            scaling.get("original_max_position_embeddings") or config.max_position_embeddings
        ),
    }
    if scaling.get("attention_factor") is not None:
        # llama.cpp multiplies the magnitude that yarn derives from the factor.
        keys["rope.scaling.attn_factor"] = float(scaling["attention_factor"]) / (0.1 * math.log(factor) + 1.0)
    return keys


_SCALINGS: Mapping[str, Callable[[Mapping[str, Any], ModelConfig], Keys]] = {
    "linear": _linear,
    "yarn": _yarn,
    "llama3": lambda *_: {},  # no key says it: see rope_factors
}


def rope_factors(config: ModelConfig) -> npt.NDArray[np.float32] | None:
    """The tensor rope_freqs.weight, (head_dim / 2,) float32; None where the model needs none."""
    scaling = config.rope_scaling
    if scaling is None or scaling["rope_type"] != "llama3":
        return None
    return llama3_divisors(config.rope_theta, config.head_dim, scaling)
