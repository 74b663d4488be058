"""What llama.cpp's files hold of blocks in which something else than attention mixes tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from cfsp.models.delta_nets import OWN_NUMBERS, Tiling, rates_of, tilings
from exporters.checkpoint_reader import ModelConfig

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BlockTensor:
    """A tensor of a block that is no matrix of all blocks, nor a norm before or behind one."""

    parameter: str  # in the checkpoint, behind the block's name
    shape: tuple[int, ...]  # there
    module: str  # by whose name the gguf package knows it
    suffix: str  # of the name in the file
    stored: tuple[int, ...]  # shape in the file
    # How value heads are ordered there; None where they are as in the checkpoint.
    tiling: Tiling | None = None
    compute: Callable[[FloatArray], FloatArray] | None = None  # what is made of the values; None for nothing
    is_plain: bool = False  # stored in float32 always

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
    order = tilings(net.key_heads, net.value_heads, net.key_width)

    def linear(module: str, *shape: int) -> BlockTensor:
        return _linear(f"{name}.{module}", shape, order.get(module))

    def of_heads(parameter: str, compute: Callable[[FloatArray], FloatArray] | None = None) -> BlockTensor:
        """A number of each value head."""
        (module, suffix), shape, tiling = OWN_NUMBERS[parameter], (net.value_heads,), order.get(parameter)
        return BlockTensor(f"{name}.{parameter}", shape, f"{name}.{module}", suffix, shape, tiling, compute)

    norm = (net.value_head_dim,)
    return (
        linear("in_proj_qkv", net.channels, size),
        linear("in_proj_z", net.value_width, size),
        _kernels(f"{name}.conv1d", net.channels, net.length, order.get("conv1d")),
        of_heads("dt_bias"),
        of_heads("A_log", rates_of),
        linear("in_proj_b", net.value_heads, size),
        linear("in_proj_a", net.value_heads, size),
        BlockTensor(f"{name}.norm.weight", norm, f"{name}.norm", ".weight", norm),
        linear("out_proj", size, net.value_width),
    )


_TENSORS: Mapping[str, Callable[[str, ModelConfig], tuple[BlockTensor, ...]]] = MappingProxyType(
    {"conv": _short_convolution, "linear_attention": _delta_net}
)
"""By what `layer_types` calls such blocks."""


def _linear(module: str, shape: tuple[int, ...], tiling: Tiling | None = None) -> BlockTensor:
    return BlockTensor(f"{module}.weight", shape, module, ".weight", shape, tiling)


def _kernels(module: str, channels: int, length: int, tiling: Tiling | None = None) -> BlockTensor:
    """Of a convolution: as torch has them, (channels, 1, length), and as llama.cpp does, (channels, length)."""
    stored = (channels, length)
    return BlockTensor(
        f"{module}.weight", (channels, 1, length), module, ".weight", stored, tiling, is_plain=True
    )
