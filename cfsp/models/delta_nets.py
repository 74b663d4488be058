"""How GGUF files hold gated delta nets: value heads in another order, rates of decay as they are multiplied with.

Value heads read the key heads in groups, [k0, k0, ..., k1, k1, ...]; ggml repeats key heads whole,
[k0, k1, ..., k0, k1, ...], so that everything that belongs to value heads is stored in that order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

OWN_NUMBERS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"dt_bias": ("dt_proj", ".bias"), "A_log": ("A_log", "")}
)
"""Parameters of a net's own -> by which name the gguf package knows them, and what stands behind it in a file."""


@dataclass(frozen=True)
class Tiling:
    """Value heads in ggml's order along one axis."""

    groups: int  # key heads
    per_group: int  # value heads that read each of them
    axis: int = 0  # of the tensor
    first: int = 0  # where along it the value heads begin; what stands before stays

    def order(self, count: int) -> npt.NDArray[np.intp]:
        """Of `count` places along the axis, which of the checkpoint's stands in each of the file's."""
        heads = np.arange(self.first, count).reshape(self.groups, self.per_group, -1)
        return np.concatenate([np.arange(self.first), heads.swapaxes(0, 1).reshape(-1)])

    def tiled(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The checkpoint's values in the file's order."""
        return np.take(values, self.order(values.shape[self.axis]), self.axis)

    def grouped(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The file's values in the checkpoint's order."""
        return np.take(values, np.argsort(self.order(values.shape[self.axis])), self.axis)


def tilings(key_heads: int, value_heads: int, key_width: int) -> Mapping[str, Tiling]:
    """Of a net's modules, and parameters of its own, by name; none where each key head has one value head.

    `key_width`: numbers of all key heads.
    """
    per_group = value_heads // key_heads
    if per_group == 1:
        return {}
    values = Tiling(key_heads, per_group)
    behind_keys = Tiling(key_heads, per_group, first=2 * key_width)
    return {
        **dict.fromkeys(("in_proj_qkv", "conv1d"), behind_keys),
        **dict.fromkeys(("in_proj_z", "in_proj_b", "in_proj_a", "dt_bias", "A_log"), values),
        "out_proj": Tiling(key_heads, per_group, axis=1),
    }


def rates_of(a_log: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What a file has of A_log: -exp(A_log)."""
    return -np.exp(a_log)


def a_log_of(rates: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A_log of what a file has; not a number where that is not below 0."""
    with np.errstate(all="ignore"):
        return np.log(-rates)


def widths(settings: Mapping[str, Any]) -> tuple[int, int]:
    """(numbers of all key heads, of all value heads) by transformers' settings."""
    return (
        settings["linear_num_key_heads"] * settings["linear_key_head_dim"],
        settings["linear_num_value_heads"] * settings["linear_value_head_dim"],
    )
