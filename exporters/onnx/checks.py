"""What a graph on disk must look like, beyond computing the right numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
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
