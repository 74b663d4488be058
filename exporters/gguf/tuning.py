"""Scales and norms of a written file, trained on a text end to end (`exporters.quantize.scale_tuning`).

The codes stay. What a row's numbers are proportional to, the float16 scales and minima of its blocks, is multiplied by
one factor a row; norms are float32 in every file. So the file has as many bytes as before, and computes as fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cfsp.devices import placed
from cfsp.models.architectures import block_linears
from cfsp.models.checkpoint import load_pruned
from cfsp.models.gguf_file import GGUFTensor, read_gguf
from cfsp.precision import products_in
from cfsp.progress import Progress, no_progress
from exporters.gguf.architecture import read_layout
from exporters.gguf.llama_library import dequantized
from exporters.gguf.packing import SCALES, StoredMatrix
from exporters.gguf.tensors import TensorSpec, tensor_specs
from exporters.matrices import slope_of
from exporters.quantize.scale_tuning import TunedScales, tune_scales

_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LEARNING_RATE = 2e-3
"""Measured on SmolLM2-135M: at 1e-3 files of 3 bits keep more bits per byte, at 3e-3 those of 4 more divergence."""


def tune_file(
    checkpoint: Path,
    base: Path,
    path: Path,
    input_ids: torch.Tensor,
    *,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> dict[str, float]:
    """Train scales and norms of a file, in place.

    Args:
        checkpoint: Hugging Face folder, which the file is to compute what it computes.
        base: The unquantized file of it.
        path: A file that was quantized from that one.
        input_ids: Text, (nsamples, seqlen).
        device: Where to compute.
        progress: Told after each window.

    Returns:
        Tensor that was changed -> its slope (`exporters.matrices`).
    """
    model = placed(load_pruned(checkpoint, dtype=torch.float32), device)
    specs = tensor_specs(read_layout(checkpoint))
    tensors = {tensor.name: tensor for tensor in read_gguf(path).tensors}
    stored: dict[str, torch.Tensor] = {}
    for spec in specs:
        if spec.is_matrix and tensors[spec.name].kind.name in SCALES:
            parts = spec.split(tensors[spec.name].dequantize())
            stored |= {
                name: torch.from_numpy(np.ascontiguousarray(part)).to(device) for name, part in parts.items()
            }
    table = stored.get(_TABLE, model.get_input_embeddings().weight.detach())
    tied = model.config.tie_word_embeddings
    head = table if tied else stored.get(_HEAD, model.get_output_embeddings().weight.detach())
    linears = [name for block in block_linears(model) for name in block if f"{name}.weight" in stored]
    weights = {name: stored[f"{name}.weight"] for name in linears}
    with products_in("auto", model.device.type):
        scales = tune_scales(model, weights, head, table, input_ids, _LEARNING_RATE, progress=progress)
    changed = [tuned_tensor(spec, tensors[spec.name], scales) for spec in specs]
    slopes, exact = {}, {tensor.name: tensor for tensor in read_gguf(base).tensors}
    with path.open("r+b") as stream:
        for spec, data in zip(specs, changed, strict=True):
            if data is None:
                continue
            tensor = tensors[spec.name]
            values = dequantized(data, tensor.kind.name) if spec.is_matrix else data
            slopes[spec.name] = slope_of(values, exact[spec.name].dequantize())
            stream.seek(tensor.offset)
            stream.write(data.tobytes())
    return slopes


def tuned_tensor(spec: TensorSpec, tensor: GGUFTensor, found: TunedScales) -> npt.NDArray[Any] | None:
    """What a file's tensor becomes, as it is stored; None of one that stays."""
    modules = [name.removesuffix(".weight") for name, _ in spec.sources]
    if all(name in found.rows for name in modules):
        factors = spec.stack([found.rows[name].numpy() for name in modules])
        padded = np.ones(spec.shape[0], np.float32)
        padded[: len(factors)] = factors
        stored = StoredMatrix(tensor.kind.name, tensor.data.reshape(spec.shape[0], -1))
        return stored.scaled(padded[:, None]).data
    norm = found.norms.get(spec.sources[0][0])
    return None if norm is None else norm.numpy() + np.float32(spec.offset)
