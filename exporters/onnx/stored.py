"""The matrices of a graph on disk, as a runtime reads them, held against the model's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from cfsp.errors import LimitError
from cfsp.models.architectures import spec_for
from cfsp.models.offload import at_hand
from exporters.matrices import FloatArray, check_matrix
from exporters.onnx.block_quantize import Rounded, round_to_nearest
from exporters.onnx.int8_rows import Int8Rows, round_rows
from exporters.onnx.layers import TABLE
from exporters.onnx.variants import HEAD
from exporters.onnx.weights import HEAD_PARTS, is_tied, packed_names, read_weight

_STORED = re.compile(r"(.+?)(?:\.(\d))?\.weight(\.q[48])?")
"""(module, which part of it if its rows are of unlike formats, bits)."""
Sums = tuple[float, float]
"""Of a matrix q w and w w, whose quotient is its slope (`exporters.matrices`)."""


def check_numbers(path: Path, model: Any, chosen: Mapping[str, Sums] = MappingProxyType({})) -> None:
    """Hold every matrix of a graph against the model's.

    Args:
        path: One of the product's own graphs.
        model: What it was made from, float32.
        chosen: By `slope_sums`, of layers whose numbers were chosen for a text.

    Raises:
        LimitError: A matrix is not the model's (`exporters.matrices`), or there is none.
    """
    values = ir.load(path).graph.initializers
    tensors = {name: value.const_value for name, value in values.items() if value.const_value is not None}
    found = False
    for name, tensor in tensors.items():
        match = _STORED.fullmatch(name)
        if match is None or len(tensor.shape) < 2:
            continue
        found, (module, part, bits) = True, match.groups()
        names = _modules(model, module, part)
        data, exact = torch.from_numpy(np.array(tensor.numpy())), _exact(model, names)
        if data.ndim == 2 and f"{module}.weight" != TABLE:
            data = data.T
        scale = tensors[f"{name.removesuffix(bits)}.scale"].numpy() if bits else np.ones(0)
        scales, n_bits = torch.from_numpy(np.array(scale)), int(bits[-1]) if bits else None
        stored, plain = _as_read(data, scales, exact.shape[1], n_bits)
        check_matrix(
            f"{name} in {path.name}",
            len(exact),
            _rows_of(exact),
            _rows_of(stored),
            partial(_rounded, plain),
            _slope([chosen[name] for name in names if name in chosen]),
        )
    if not found:
        raise LimitError(f"{path.name} has no matrix that is known")


def slope_sums(model: Any, layers: Mapping[str, Rounded]) -> dict[str, Sums]:
    """Layer -> the sums of its slope, of numbers that were chosen for a text."""
    found = {}
    for name, layer in layers.items():
        exact = read_weight(model, name)
        found[name] = float((layer.dequantized() * exact).sum()), float(exact.square().sum())
    return found


def _modules(model: Any, module: str, part: str | None) -> Sequence[str]:
    """The model's modules whose rows a stored matrix has; none for a token embedding that is no output matrix."""
    if f"{module}.weight" == TABLE:
        names: Sequence[str] = HEAD_PARTS if is_tied(model) else ()
    else:
        names = packed_names(_in_model(model, module))
    return names if part is None else names[int(part) : int(part) + 1]


def _exact(model: Any, names: Sequence[str]) -> torch.Tensor:
    """What a stored matrix was made from, (rows, columns) float32."""
    if names:
        return torch.cat([read_weight(model, name) for name in names])
    embedding = model.get_input_embeddings()
    with at_hand(embedding):
        table: torch.Tensor = embedding.weight.detach().float()
    return table


def _in_model(model: Any, module: str) -> str:
    """The model's own name of a module of the graph, in which all architectures have the same."""
    spec = spec_for(model.config)
    if module in ("logits", HEAD):  # it may be named as what it gives
        return HEAD
    names = {f"mlp.{part}_proj": f"{spec.mlp}.{getattr(spec, part)}" for part in ("gate", "up", "down")}
    names["self_attn.o_proj"] = f"{spec.attention}.{spec.output}"
    *_, block, part = module.split(".", 3)
    part = names.get(part, part.replace("self_attn.", f"{spec.attention}."))
    return f"{spec.layers}.{block}.{part}"


def _as_read(
    data: torch.Tensor, scales: torch.Tensor, columns: int, bits: int | None
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """What stored numbers stand for, (rows, columns), and what rounds rows to the nearest of the kind."""
    if not bits:
        return data, lambda rows: rows
    if data.ndim == 2:
        return Int8Rows(data, scales).dequantized(), lambda rows: round_rows(rows).dequantized()
    stored = Rounded.from_packed(data, scales, columns, bits)
    return stored.dequantized(), lambda rows: round_to_nearest(rows, stored.form).dequantized()


def _slope(sums: Sequence[Sums]) -> float | None:
    inner, squares = (sum(each) for each in zip(*sums, strict=True)) if sums else (0.0, 0.0)
    return inner / squares if squares else None


def _rounded(plain: Callable[[torch.Tensor], torch.Tensor], rows: FloatArray) -> FloatArray:
    return np.asarray(plain(torch.from_numpy(rows)).numpy())


def _rows_of(matrix: torch.Tensor) -> Callable[[int, int], FloatArray]:
    return lambda start, stop: matrix[start:stop].float().numpy()
