"""llama.cpp's importance matrix from what calibration has measured anyway.

When a block of weights is quantized, its error in every input channel is weighted by that channel's mean squared input.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cfsp.errors import InputError
from cfsp.models.checkpoint import is_pruned_checkpoint, load_input_moments
from exporters.checkpoint_reader import CheckpointTensors, ModelConfig, read_config
from exporters.gguf.architecture import ChosenLayout, choose_layout, linear_names


def read_imatrix(checkpoint: Path) -> dict[str, npt.NDArray[np.float32]]:
    """The importance matrix of a checkpoint, by the file's tensor names; empty where it has no input moments.

    Raises:
        InputError: As `imatrix_from_moments`.
    """
    moments = load_input_moments(checkpoint) if is_pruned_checkpoint(checkpoint) else None
    if not moments:
        return {}
    config = read_config(checkpoint)
    with CheckpointTensors(checkpoint) as tensors:
        return imatrix_from_moments(moments, config, choose_layout(config, tensors.names()))


def imatrix_from_moments(
    moments: Mapping[str, torch.Tensor], config: ModelConfig, chosen: ChosenLayout
) -> dict[str, npt.NDArray[np.float32]]:
    """Translate input moments to the file's tensor names.

    Args:
        moments: Hugging Face module name -> mean squared input per channel, (in_features,).
        config: The model.
        chosen: The file's layout. Padded channels get moment 0: their weights are zero.

    Returns:
        Tensor name -> (in_features in the file,) float32.

    Raises:
        InputError: A moment has another length than its layer has inputs, or is negative or not finite.
    """
    result: dict[str, npt.NDArray[np.float32]] = {}
    for module, name in linear_names(config, chosen).items():
        if module not in moments:
            continue
        values = moments[module].detach().to(torch.float32).numpy()
        if (
            values.shape != (_in_features(module, config),)
            or not np.isfinite(values).all()
            or (values < 0).any()
        ):
            raise InputError(
                "input moments do not belong to this checkpoint", field=module, value=tuple(values.shape)
            )
        if chosen.padded_width and module.endswith("down_proj"):
            values = np.pad(values, (0, chosen.padded_width - len(values)))
        # A channel that never fired in calibration must still count a little, or its weights become arbitrary.
        floor = 1e-6 * float(values.mean()) or 1.0
        result[name] = np.maximum(values, floor).astype(np.float32)
    return result


def _in_features(module: str, config: ModelConfig) -> int:
    if module.endswith("down_proj"):
        return config.shape.blocks[int(module.split(".")[2])].ffn_width
    if module.endswith("o_proj"):
        return config.num_attention_heads * config.head_dim
    return config.hidden_size
