"""What llama.cpp's files hold of blocks in which something else than attention mixes tokens.

A gated delta net's value heads read the key heads in groups, [k0, k0, ..., k1, k1, ...]; ggml repeats key heads whole,
[k0, k1, ..., k0, k1, ...], so that everything that belongs to value heads is stored in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from exporters.checkpoint_reader import DeltaNet, ModelConfig

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Tiling:
    """Value heads in ggml's order along one axis.

    Attributes:
        groups: Key heads.
        per_group: Value heads that read each of them.
        axis: Of the tensor.
        first: Where along it the value heads begin; what stands before stays.
    """

    groups: int
    per_group: int
    axis: int = 0
    first: int = 0

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


@dataclass(frozen=True)
class BlockTensor:
    """A tensor of a block that is no matrix of all blocks, nor a norm before or behind one.

    Attributes:
        parameter: In the checkpoint, behind the block's name.
        shape: There.
        module: By whose name the gguf package knows it.
        suffix: Of the name in the file.
        stored: Shape in the file.
        tiling: How value heads are ordered there; None where they are as in the checkpoint.
        compute: What is made of the values; None for nothing.
        is_plain: Stored in float32 always.
    """

    parameter: str
    shape: tuple[int, ...]
    module: str
    suffix: str
    stored: tuple[int, ...]
    tiling: Tiling | None = None
    compute: Callable[[FloatArray], FloatArray] | None = None
    is_plain: bool = False

    @property
    def is_linear(self) -> bool:
        """Whether it is a Linear's weight, which is stored in the bits that are asked for."""
        return len(self.shape) == 2


def mixer_tensors(config: ModelConfig) -> tuple[BlockTensor, ...]:
    """Of a block without keys of its own, in file order; none of a model type whose blocks all attend."""
    mixer = config.spec.mixer
    return _TENSORS[mixer.kind](mixer.module, config) if mixer else ()


def _short_convolution(name: str, config: ModelConfig) -> tuple[BlockTensor, ...]:
    size = config.hidden_size
    return (
        _kernels(f"{name}.conv", size, config.convolution_length),
        _linear(f"{name}.in_proj", (3 * size, size)),
        _linear(f"{name}.out_proj", (size, size)),
    )


def _delta_net(name: str, config: ModelConfig) -> tuple[BlockTensor, ...]:
    net, size = config.delta_net, config.hidden_size
    assert net is not None  # of a model type with such blocks
    return (
        _linear(f"{name}.in_proj_qkv", (net.channels, size), _tiling(net, first=2 * net.key_width)),
        _linear(f"{name}.in_proj_z", (net.value_width, size), _tiling(net)),
        _kernels(f"{name}.conv1d", net.channels, net.length, _tiling(net, first=2 * net.key_width)),
        _of_heads(f"{name}.dt_bias", f"{name}.dt_proj", ".bias", net),
        _of_heads(f"{name}.A_log", f"{name}.A_log", "", net, lambda a: -np.exp(a)),
        _linear(f"{name}.in_proj_b", (net.value_heads, size), _tiling(net)),
        _linear(f"{name}.in_proj_a", (net.value_heads, size), _tiling(net)),
        BlockTensor(
            f"{name}.norm.weight", (net.value_head_dim,), f"{name}.norm", ".weight", (net.value_head_dim,)
        ),
        _linear(f"{name}.out_proj", (size, net.value_width), _tiling(net, axis=1)),
    )


_TENSORS: Mapping[str, Callable[[str, ModelConfig], tuple[BlockTensor, ...]]] = MappingProxyType(
    {"conv": _short_convolution, "linear_attention": _delta_net}
)
"""By what `layer_types` calls such blocks."""


def _linear(module: str, shape: tuple[int, int], tiling: Tiling | None = None) -> BlockTensor:
    return BlockTensor(f"{module}.weight", shape, module, ".weight", shape, tiling)


def _kernels(module: str, channels: int, length: int, tiling: Tiling | None = None) -> BlockTensor:
    """Of a convolution: as torch has them, (channels, 1, length), and as llama.cpp does, (channels, length)."""
    stored = (channels, length)
    return BlockTensor(
        f"{module}.weight", (channels, 1, length), module, ".weight", stored, tiling, is_plain=True
    )


def _of_heads(
    parameter: str,
    module: str,
    suffix: str,
    net: DeltaNet,
    compute: Callable[[FloatArray], FloatArray] | None = None,
) -> BlockTensor:
    """A number of each value head."""
    shape = (net.value_heads,)
    return BlockTensor(parameter, shape, module, suffix, shape, _tiling(net), compute)


def _tiling(net: DeltaNet, axis: int = 0, first: int = 0) -> Tiling | None:
    per_group = net.value_heads // net.key_heads
    return Tiling(net.key_heads, per_group, axis, first) if per_group > 1 else None
