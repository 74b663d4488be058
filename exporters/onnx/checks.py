"""What a graph on disk must look like, and its matrices held against the model's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from cfsp.errors import LimitError
from cfsp.models.architectures import spec_for
from cfsp.models.offload import at_hand
from exporters.checkpoint_reader import ModelConfig
from exporters.onnx.graph_builder import CONTRIB
from exporters.onnx.layers import TABLE
from exporters.onnx.matrix import Int8Rows, Rounded, round_rows, round_to_nearest
from exporters.onnx.variants import HEAD, BlockFormat
from exporters.onnx.weights import HEAD_PARTS, is_tied, packed_names, read_weight
from exporters.proof import FloatArray, check_matrix

_PRODUCTS = ("MatMul", "FusedMatMul", "MatMulInteger", "MatMulNBits")
_LOOK_UPS = ("Gather", "GatherBlockQuantized")
_HEADS = ("logits", "lm_head")
_OUTERMOST = re.compile(r"[./]")  # optimum has /lm_head/MatMul
_STORED = re.compile(r"(.+?)(?:\.(\d))?\.weight(\.q[48])?")
"""(module, which part of it if its rows are of unlike formats, bits)."""
Sums = tuple[float, float]
"""Of a matrix q w and w w, whose quotient is its slope (`exporters.proof`)."""


def check_graph(path: Path, config: ModelConfig) -> None:
    """Hold a written graph against the checkpoint's config.

    Raises:
        LimitError: An FFN of another width than the config says, an embedding stored twice, a value without type or
            shape that only the file can say, or a cache input of another size; the first problem is named.
    """
    graph = ir.load(path).graph
    problems = (_widths(graph, config), _embeddings(graph, config), _untyped(graph), _caches(graph, config))
    for problem in chain.from_iterable(problems):
        raise LimitError(f"{path.name}: {problem}")


def _widths(graph: ir.Graph, config: ModelConfig) -> Iterator[str]:
    """Of the stored matrices, not of what the file says about the values between."""
    nodes = {str(node.name).removesuffix(".product"): node for node in graph if node.op_type in _PRODUCTS}
    for index, width in enumerate(config.shape.ffn_widths):
        wanted = {
            "gate_proj": (config.hidden_size, width),
            "up_proj": (config.hidden_size, width),
            "down_proj": (width, config.hidden_size),
        }
        for part, sizes in wanted.items():
            stored = _sizes(nodes.get(f"model.layers.{index}.mlp.{part}"))
            if stored != sizes:
                yield f"block {index}'s {part} is {stored}, not {sizes}"


def _sizes(node: ir.Node | None) -> tuple[int, int] | None:
    """(inputs, outputs) of a matrix product's stored weight."""
    weight = node.inputs[1] if node is not None else None
    tensor = weight.const_value if weight is not None else None
    if node is None or tensor is None:
        return None
    shape = tuple(tensor.shape.numpy())
    if node.op_type != "MatMulNBits":
        return int(shape[0]), int(shape[1])
    columns, block = node.attributes["K"].as_int(), node.attributes["block_size"].as_int()
    return (columns, int(shape[0])) if shape[1] == -(-columns // block) else None


def _embeddings(graph: ir.Graph, config: ModelConfig) -> Iterator[str]:
    """The tables that are looked up and the output matrix, each for the whole vocabulary, are one where tied."""
    tables: dict[str, int] = {}
    heads: dict[str, int] = {}
    for node in graph:
        if node.op_type in _LOOK_UPS and "embed_tokens" in str(node.name):
            tables |= _rows(node.inputs[0], 0)
        elif node.op_type in _PRODUCTS and _OUTERMOST.split(str(node.name).lstrip("/"))[0] in _HEADS:
            by_row = node.op_type == "MatMulNBits" or "transB" in node.attributes
            heads |= _rows(node.inputs[1], 0 if by_row else 1)
    for what, sizes in (("the embedding", tables), ("the output matrix", heads)):
        n_rows = sum(sizes.values())
        if n_rows != config.vocab_size:
            yield f"{what} has {n_rows} rows for {config.vocab_size} tokens"
    if config.tie_word_embeddings and tables.keys() != heads.keys():
        yield f"a tied embedding is stored twice: {', '.join(sorted(tables.keys() | heads.keys()))}"
    if not config.tie_word_embeddings and tables.keys() & heads.keys():
        yield "the output matrix is stored as the embedding, which it is not tied to"


def _rows(matrix: ir.Value | None, axis: int) -> dict[str, int]:
    """Name of a stored matrix -> its size along an axis, or if what is multiplied is its transpose, along the other."""
    producer = matrix.producer() if matrix is not None else None
    if producer is not None and producer.op_type == "Transpose":
        return _rows(producer.inputs[0], 1 - axis)
    if matrix is None or matrix.const_value is None or len(matrix.const_value.shape) < 2:
        return {}
    return {str(matrix.name): int(matrix.const_value.shape.numpy()[axis])}


def _untyped(graph: ir.Graph) -> Iterator[str]:
    """Every runtime can infer the outputs of standard operators, and none those of ONNX Runtime's own."""
    if CONTRIB not in graph.opset_imports:
        return
    for value in chain.from_iterable(node.outputs for node in graph):
        if value.name and (value.dtype is None or value.shape is None):
            yield f"{value.name} has no type or shape"


def _caches(graph: ir.Graph, config: ModelConfig) -> Iterator[str]:
    """Of each block that mixes tokens, of the sizes that the config says."""
    caches = {str(value.name): value.shape for value in graph.inputs if str(value.name).startswith("past_")}
    wanted = dict(_wanted_caches(config))
    if caches.keys() != wanted.keys():
        yield f"caches {', '.join(sorted(caches))}, not {', '.join(sorted(wanted))}"
    for name, sizes in wanted.items():
        shape = caches.get(name)
        if shape is None or tuple(size for size in shape if isinstance(size, int)) != sizes:
            yield f"{name} is {shape}, not of {sizes}"


def _wanted_caches(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Each cache: heads and their numbers, or what is kept of a text in attention's place."""
    mixing = [block for block in config.shape.blocks if block.has_attention]
    for index, block in enumerate(mixing):
        if block.is_keyless:
            yield from ((f"past_{kind}.{index}", sizes) for kind, sizes in config.kept_of_texts.items())
        else:
            for part in ("key", "value"):
                yield f"past_key_values.{index}.{part}", (block.kv_groups or 0, config.head_dim)


def check_numbers(path: Path, model: Any, chosen: Mapping[str, Sums] = MappingProxyType({})) -> None:
    """Hold every matrix of a graph against the model's.

    Args:
        path: One of the product's own graphs.
        model: What it was made from, float32.
        chosen: By `slope_sums`, of layers whose numbers were chosen for a text.

    Raises:
        LimitError: A matrix is not the model's (`exporters.proof`), or there is none.
    """
    values = ir.load(path).graph.initializers
    tensors = {name: value.const_value for name, value in values.items() if value.const_value is not None}
    found = False
    for name, tensor in tensors.items():
        match = _STORED.fullmatch(name)
        if match is None or len(tensor.shape) < 2:
            continue
        found, (module, part, bits) = True, match.groups()
        is_table, embedding = f"{module}.weight" == TABLE, model.get_input_embeddings()
        if is_table:
            names: Sequence[str] = HEAD_PARTS if is_tied(model) else ()
        else:
            names = packed_names(_in_model(model, module))
        names = names if part is None else names[int(part) : int(part) + 1]
        with at_hand(embedding):
            exact = (
                torch.cat([read_weight(model, one) for one in names])
                if names
                else embedding.weight.detach().float()
            )
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
        sums = [chosen[one] for one in names if one in chosen]
        inner, squares = (sum(each) for each in zip(*sums, strict=True)) if sums else (0.0, 0.0)
        check_matrix(
            f"{name} in {path.name}",
            len(exact),
            _rows_of(exact),
            _rows_of(stored),
            partial(_nearest, form, bool(bits)),
            inner / squares if squares else None,
        )
    if not found:
        raise LimitError(f"{path.name} has no matrix that is known")


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


def _nearest(form: BlockFormat | None, is_rounded: bool, rows: FloatArray) -> FloatArray:
    """Rows in blocks of few bits, in int8 (without a form), or as they are."""
    if not is_rounded:
        return rows
    weight = torch.from_numpy(rows)
    stored = round_rows(weight) if form is None else round_to_nearest(weight, form)
    return np.asarray(stored.dequantize().numpy())


def _rows_of(matrix: torch.Tensor) -> Callable[[int, int], FloatArray]:
    return lambda start, stop: matrix[start:stop].float().numpy()
