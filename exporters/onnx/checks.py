"""What a graph on disk must look like, beyond computing the right numbers."""

from __future__ import annotations

import re
from pathlib import Path

import onnx_ir as ir

from cfsp.errors import LimitError
from exporters.checkpoint_reader import ModelConfig
from exporters.onnx.graph_builder import CONTRIB

_PRODUCTS = ("MatMul", "FusedMatMul", "MatMulInteger", "MatMulNBits")
_LOOK_UPS = ("Gather", "GatherBlockQuantized")
_HEADS = ("logits", "lm_head")
_OUTERMOST = re.compile(r"[./]")  # optimum has /lm_head/MatMul


def check_graph(path: Path, config: ModelConfig) -> None:
    """Hold a written graph against the checkpoint's config.

    Raises:
        LimitError: An FFN of another width than the config says, an embedding stored twice, a value without type or
            shape that only the file can say, or a cache input without a fixed head size; the first problem is named.
    """
    graph = ir.load(path).graph
    for problem in (
        *_widths(graph, config),
        *_embeddings(graph, config),
        *_untyped(graph),
        *_caches(graph, config),
    ):
        raise LimitError(f"{path.name}: {problem}")


def _widths(graph: ir.Graph, config: ModelConfig) -> list[str]:
    """Of the stored matrices, not of what the file says about the values between."""
    nodes = {str(node.name).removesuffix(".product"): node for node in graph if node.op_type in _PRODUCTS}
    problems = []
    for index, width in enumerate(config.shape.ffn_widths):
        wanted = {
            "gate_proj": (config.hidden_size, width),
            "up_proj": (config.hidden_size, width),
            "down_proj": (width, config.hidden_size),
        }
        for part, sizes in wanted.items():
            found = _sizes(nodes.get(f"model.layers.{index}.mlp.{part}"))
            if found != sizes:
                problems.append(f"block {index}'s {part} is {found}, not {sizes}")
    return problems


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


def _embeddings(graph: ir.Graph, config: ModelConfig) -> list[str]:
    """The tables that are looked up and the output matrix, each for the whole vocabulary, are one where tied."""
    tables: dict[str, int] = {}
    heads: dict[str, int] = {}
    for node in graph:
        if node.op_type in _LOOK_UPS and "embed_tokens" in str(node.name):
            tables |= _rows(node.inputs[0], 0)
        elif node.op_type in _PRODUCTS and _OUTERMOST.split(str(node.name).lstrip("/"))[0] in _HEADS:
            by_row = node.op_type == "MatMulNBits" or "transB" in node.attributes
            heads |= _rows(node.inputs[1], 0 if by_row else 1)
    problems = [
        f"{what} has {found} rows for {config.vocab_size} tokens"
        for what, found in (
            ("the embedding", sum(tables.values())),
            ("the output matrix", sum(heads.values())),
        )
        if found != config.vocab_size
    ]
    if config.tie_word_embeddings and tables.keys() != heads.keys():
        problems.append(
            f"a tied embedding is stored twice: {', '.join(sorted(tables.keys() | heads.keys()))}"
        )
    if not config.tie_word_embeddings and tables.keys() & heads.keys():
        problems.append("the output matrix is stored as the embedding, which it is not tied to")
    return problems


def _rows(matrix: ir.Value | None, axis: int) -> dict[str, int]:
    """Name of a stored matrix -> its size along an axis, or if what is multiplied is its transpose, along the other."""
    producer = matrix.producer() if matrix is not None else None
    if producer is not None and producer.op_type == "Transpose":
        return _rows(producer.inputs[0], 1 - axis)
    if matrix is None or matrix.const_value is None or len(matrix.const_value.shape) < 2:
        return {}
    return {str(matrix.name): int(matrix.const_value.shape.numpy()[axis])}


def _untyped(graph: ir.Graph) -> list[str]:
    """Every runtime can infer the outputs of standard operators, and none those of ONNX Runtime's own."""
    if CONTRIB not in graph.opset_imports:
        return []
    values = [value for node in graph for value in node.outputs if value.name]
    return [f"{v.name} has no type or shape" for v in values if v.dtype is None or v.shape is None]


def _caches(graph: ir.Graph, config: ModelConfig) -> list[str]:
    caches = [value for value in graph.inputs if value.name and value.name.startswith("past_key_values.")]
    wanted = (config.num_key_value_heads, config.head_dim)
    wrong = [v for v in caches if v.shape is None or (v.shape[1], v.shape[3]) != wanted]
    problems = [f"{value.name} is {value.shape}, not of {wanted} heads and numbers" for value in wrong]
    if len(caches) != 2 * config.num_hidden_layers:
        problems.append(f"{len(caches)} cache inputs for {config.num_hidden_layers} blocks")
    return problems
