"""What llama.cpp's files hold of a model in which several hidden states of a token run beside each other (AltUp).

llama.cpp multiplies it in the bits in which it is stored, but its quantizer leaves it as it is: all of it is float32.
"""

from __future__ import annotations

from exporters.checkpoint_reader import ModelConfig
from exporters.gguf.mixers import BlockTensor


def stream_tensors(config: ModelConfig) -> tuple[BlockTensor, ...]:
    """Of a block, in file order; none of a model type that has no such."""
    streams, bypass, size = config.spec.streams, config.spec.bypass, config.hidden_size
    tensors: list[BlockTensor] = []
    if streams:
        n, name = config.streams, streams.module
        tensors += [
            _plain(f"{name}.correction_coefs", (n, n)),
            _plain(f"{name}.prediction_coefs", (n * n, n)),
            _plain(f"{name}.modality_router", (n, size)),
            _plain(f"{name}.router_norm", (size,)),
            _plain(f"{name}.correct_output_scale", (size,), parameter=f"{name}.correct_output_scale"),
        ]
    if bypass:
        rank, name = config.bypass_rank, bypass.module
        tensors += [
            _plain(f"{name}.linear_left", (rank, size)),
            _plain(f"{name}.linear_right", (size, rank)),
            _plain(f"{name}.post_laurel_norm", (size,)),
        ]
    return tuple(tensors)


def _plain(module: str, shape: tuple[int, ...], parameter: str = "") -> BlockTensor:
    return BlockTensor(parameter or f"{module}.weight", shape, module, ".weight", shape, is_plain=True)
