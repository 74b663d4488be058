"""llama.cpp's importance matrix from what calibration has measured anyway.

When a block of weights is quantized, its error in every input channel is weighted by that channel's mean squared input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cfsp.errors import InputError
from cfsp.models.checkpoint import is_pruned_checkpoint, load_input_moments, open_pruned
from cfsp.models.offload import WHOLE, Keeping
from cfsp.pruning.moments import collect_input_moments
from exporters.gguf.architecture import read_layout
from exporters.gguf.quants import Quant
from exporters.gguf.tensors import linear_inputs, tensor_specs

Imatrix = Mapping[str, npt.NDArray[np.float32]]
"""Tensor name -> mean squared input per channel, (in_features in the file,)."""


def read_imatrix(
    checkpoint: Path,
    quants: Sequence[Quant],
    input_ids: torch.Tensor | None = None,
    *,
    use: bool = True,
    device: str = "cpu",
    keeping: Keeping = WHOLE,
) -> Imatrix:
    """A checkpoint's input moments by the file's tensor names, or else those of a text; empty where none are used.

    Padded channels get moment 0: their weights are zero. Matrices of zeros alone get moments of 1, as some types are
    not written without.

    Args:
        checkpoint: Hugging Face folder, pruned or dense.
        quants: What is written.
        input_ids: Text to take them from where the checkpoint has none, (nsamples, seqlen).
        use: Whether those that can do without use it, too.
        device: Where to measure them.
        keeping: How the model's weights are kept.

    Raises:
        InputError: A moment has another length than its layer has inputs, or is negative or not finite; or there is
            none, and a quantization cannot do without.
    """
    used = use and any(quant.uses_imatrix for quant in quants)
    moments = stored_moments(checkpoint) if used else None
    if used and not moments and input_ids is not None:
        model = open_pruned(checkpoint, device, keeping)
        moments = collect_input_moments(model, input_ids)
    if not moments:
        for quant in quants:
            if quant.needs_imatrix:
                raise InputError(
                    "cannot be written without an importance matrix",
                    field="quant",
                    value=quant.name,
                    allowed="--calibration text, or a checkpoint with the input moments that prune leaves; "
                    "and no --no-imatrix",
                )
        return {}
    chosen = read_layout(checkpoint)
    specs = {spec.name: spec for spec in tensor_specs(chosen)}
    result: dict[str, npt.NDArray[np.float32]] = {}
    for module, in_features in linear_inputs(chosen.config).items():
        if module not in moments:
            continue
        values = _checked(module, moments[module], in_features)
        if chosen.padded_width and module.endswith(f".{chosen.config.spec.down}"):
            values = np.pad(values, (0, chosen.padded_width - len(values)))
        name = chosen.name(module)
        result[name] = floored(specs[name].of_inputs(values))
    zeros = (spec for spec in specs.values() if not spec.sources and len(spec.shape) == 2)
    return result | {spec.name: np.ones(spec.shape[1], np.float32) for spec in zeros}


def _checked(module: str, moments: torch.Tensor, in_features: int) -> npt.NDArray[np.float32]:
    values = moments.detach().to(torch.float32).numpy()
    if values.shape != (in_features,) or not np.isfinite(values).all() or (values < 0).any():
        raise InputError(
            "input moments do not belong to this checkpoint", field=module, value=tuple(values.shape)
        )
    return values


def stored_moments(checkpoint: Path) -> dict[str, torch.Tensor] | None:
    """What pruning has left of them; None for any other folder."""
    return load_input_moments(checkpoint) if is_pruned_checkpoint(checkpoint) else None


def floored(moments: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Mean squared inputs as importances: one that never fired must still count, or its weights become arbitrary."""
    least = 1e-6 * float(moments.mean()) or 1.0
    return np.maximum(moments, least).astype(np.float32)
