"""What a graph on disk must look like, beyond computing the right numbers."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from cfsp.errors import LimitError
from exporters.checkpoint_reader import ModelConfig

__all__ = ["check_graph"]


def check_graph(path: Path, config: ModelConfig) -> None:
    """Hold a written graph against the checkpoint's config.

    Raises:
        LimitError: An FFN of another width than the config says, an embedding stored twice, a value without type or
            shape, or a cache input without a fixed head size; the first problem is named.
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
    found = {node.name: node for node in graph}
    problems = []
    for index, width in enumerate(config.widths):
        for part, wanted in (("gate_proj", width), ("up_proj", width), ("down_proj", config.hidden_size)):
            output = found[f"model.layers.{index}.mlp.{part}"].outputs[0]
            if output.shape is None or output.shape[-1] != wanted:
                problems.append(f"block {index}'s {part} gives {output.shape}, not {wanted} channels")
    return problems


def _embeddings(graph: ir.Graph, config: ModelConfig) -> list[str]:
    """Matrices with a row or column a token."""
    large = [
        name
        for name, value in graph.initializers.items()
        if value.shape is not None and config.vocab_size in tuple(value.shape) and not name.endswith(".scale")
    ]
    wanted = 1 if config.tie_word_embeddings else 2
    return (
        []
        if len(large) == wanted
        else [f"{len(large)} matrices over the vocabulary ({', '.join(large)}), not {wanted}"]
    )


def _untyped(graph: ir.Graph) -> list[str]:
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
