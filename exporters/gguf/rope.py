"""Rotary position embedding in llama.cpp's terms: metadata keys, and the factors of single frequencies.

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
from cfsp.models.rope import long_magnitude, yarn_magnitude
from exporters.checkpoint_reader import ModelConfig

Keys = dict[str, float | int | str]
"""Metadata without the architecture's prefix."""
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Those of every text; those of a context that is longer than the original one, and of one that is not."""
BY_FREQUENCY = ("llama3", "longrope", "proportional")
"""Scalings that are written as such tensors."""
# llama.cpp's constants, which deci, llama, openelm, qwen2 and qwen3 do not read from the file.
_STILL = 1e30
"""Divisor of a frequency at which nothing turns; llama.cpp's converter has the same."""
_YARN_FIXED = {"beta_fast": 32.0, "beta_slow": 1.0}


def rope_metadata(config: ModelConfig) -> Keys:
    """What a file says of the rotary embedding.

    Raises:
        InputError: A scaling that llama.cpp does not compute.
    """
    head_dim = config.full_head_dim or config.head_dim
    keys: Keys = {
        "rope.dimension_count": config.rotary_dim or head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    if config.full_head_dim:
        keys["rope.dimension_count_swa"] = config.head_dim
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
    # llama.cpp multiplies the magnitude that yarn derives from the factor.
    magnitude = yarn_magnitude(scaling) / (0.1 * math.log(factor) + 1.0)
    return keys if math.isclose(magnitude, 1.0) else keys | {"rope.scaling.attn_factor": magnitude}


def _longrope(scaling: Mapping[str, Any], config: ModelConfig) -> Keys:
    return {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": config.steady_context,
        "rope.scaling.attn_factor": long_magnitude(scaling, config.max_position_embeddings),
    }


_SCALINGS: Mapping[str, Callable[[Mapping[str, Any], ModelConfig], Keys]] = {
    "linear": _linear,
    "yarn": _yarn,
    "longrope": _longrope,
    **dict.fromkeys(("llama3", "proportional"), lambda *_: {}),  # no key says it: see rope_tensors
}


def rope_tensors(config: ModelConfig) -> dict[str, npt.NDArray[np.float32]]:
    """Divisors of the frequencies, (head_dim / 2,) float32, by the tensor's name; none where the model needs none."""
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "llama3":
        return {ROPE_TENSORS[0]: llama3_divisors(config.rope_theta, config.head_dim, scaling)}
    if scaling.get("rope_type") == "longrope":
        lists = (scaling["long_factor"], scaling["short_factor"])
        return {
            name: np.array(values, np.float32) for name, values in zip(ROPE_TENSORS[1:], lists, strict=True)
        }
    if scaling.get("rope_type") == "proportional" or config.full_head_dim:
        return {ROPE_TENSORS[0]: _proportional(scaling, config.full_head_dim or config.head_dim)}
    return {}


def _proportional(scaling: Mapping[str, Any], head_dim: int) -> npt.NDArray[np.float32]:
    """Of a rope that turns a part of each head, at the frequencies that all of it would have: 1, and without end.

    llama.cpp's architectures whose blocks have heads of two sizes read divisors whatever the rope is.
    """
    turned = int(float(scaling.get("partial_rotary_factor") or 1.0) * head_dim // 2)
    return np.array([1.0] * turned + [_STILL] * (head_dim // 2 - turned), np.float32)
