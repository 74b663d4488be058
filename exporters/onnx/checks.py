"""The matrices of a graph on disk, held against the model's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from cfsp.errors import LimitError
from cfsp.models.architectures import block_linears, spec_for
from exporters.onnx.layers import TABLE
from exporters.onnx.matrix import Int8Rows, Rounded, round_rows, round_to_nearest
from exporters.onnx.variants import HEAD, BlockFormat
from exporters.onnx.weights import HEAD_PARTS, is_tied, packed_names, read_weight
from exporters.proof import FloatArray, check_matrix

_STORED = re.compile(r"(.+?)(?:\.(\d))?\.weight(\.q[48])?")
"""(module, which part of it if its rows are of unlike formats, bits)."""
Sums = tuple[float, float]
"""Of a matrix q w and w w, whose quotient is its slope (`exporters.proof`)."""


def check_numbers(path: Path, model: Any, chosen: Mapping[str, Sums] = MappingProxyType({})) -> None:
    """Hold every matrix of one of the product's own graphs against the model's.

    Args:
        path: The graph.
        model: What it was made from, float32.
        chosen: By `slope_sums`, of layers whose numbers were chosen for a text.

    Raises:
        LimitError: A matrix is not the model's (`exporters.proof`), is missing, or is stored twice.
    """
    values = ir.load(path).graph.initializers
    tensors = {name: value.const_value for name, value in values.items() if value.const_value is not None}
    found = Counter[str]()
    tied = is_tied(model)
    for name, tensor in tensors.items():
        match = _STORED.fullmatch(name)
        if match is None or len(tensor.shape) < 2:
            continue
        module, part, bits = match.groups()
        is_table = f"{module}.weight" == TABLE
        names: tuple[str, ...] = HEAD_PARTS if tied else (TABLE,)
        if not is_table:
            names = packed_names(_in_model(model, module))
        names = names if part is None else names[int(part) : int(part) + 1]
        found.update(names)
        exact = torch.cat([read_weight(model, one) for one in names])
        stored = torch.from_numpy(np.array(tensor.numpy()))
        if stored.ndim == 2 and not is_table:
            stored = stored.T
        form: BlockFormat | None = None
        if bits:
            scales = torch.from_numpy(np.array(tensors[f"{name.removesuffix(bits)}.scale"].numpy()))
            if stored.ndim == 2:
                stored = Int8Rows(stored, scales).dequantize()
            else:
                packed = Rounded.from_packed(stored, scales, exact.shape[1], int(bits[-1]))
                stored, form = packed.dequantize(), packed.form
        if stored.shape != exact.shape:
            raise LimitError(f"{name} in {path.name} is {tuple(stored.shape)}, not {tuple(exact.shape)}")
        sums = [chosen[one] for one in names if one in chosen]
        inner, squares = (sum(each) for each in zip(*sums, strict=True)) if sums else (0.0, 0.0)

        def nearest(rows: FloatArray, form: BlockFormat | None = form, plain: bool = not bits) -> FloatArray:
            if plain:
                return rows
            weight = torch.from_numpy(rows)
            rounded = round_rows(weight) if form is None else round_to_nearest(weight, form)
            return np.asarray(rounded.dequantize().numpy())

        check_matrix(
            f"{name} in {path.name}",
            len(exact),
            _rows_of(exact),
            _rows_of(stored),
            nearest,
            inner / squares if squares else None,
        )
    linears = (name for block in block_linears(model) for name in block)
    for name in (*linears, *HEAD_PARTS, *(() if tied else (TABLE,))):
        if found[name] != 1:
            raise LimitError(f"{path.name} has {found[name]} matrices for {name}, not 1")


def slope_sums(model: Any, layers: Mapping[str, Rounded]) -> dict[str, Sums]:
    """Layer -> the sums of its slope, of numbers that were chosen for a text."""
    found = {}
    for name, layer in layers.items():
        exact = read_weight(model, name)
        found[name] = float((layer.dequantize() * exact).sum()), float(exact.square().sum())
    return found


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


def _rows_of(matrix: torch.Tensor) -> Callable[[int, int], FloatArray]:
    return lambda start, stop: matrix[start:stop].float().numpy()
