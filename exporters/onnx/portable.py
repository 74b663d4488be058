"""A decoder in only ONNX's standard operators, as optimum exports it: for runtimes without ONNX Runtime's own.

It computes the same from the same inputs as `exporters.onnx.decoder_graph`, and wants `position_ids` besides. Its
attention reads the mask, so rows of a batch may begin with padding. It is slower: thousands of small operators.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import onnx_ir as ir

from cfsp.errors import InputError, require_extra
from cfsp.files import LargeScratch
from cfsp.models.shape import ModelShape
from cfsp.models.weights import quiet_transformers
from cfsp.reading import one_line

_TASK = "text-generation-with-past"
_SCOPES = re.compile(r"^/(.*)/[^/]+$")


def check_portable(shape: ModelShape) -> None:
    """Raise InputError for a model that optimum's exporter cannot take, and MissingExtraError if it is not there."""
    if any(block.is_keyless for block in shape.blocks):
        raise InputError(
            "optimum exports no blocks with something else in the place of attention",
            field="portable",
            allowed="the other variants",
        )
    heads = [block.kv_groups for block in shape.blocks]
    if len(set(heads)) != 1:
        raise InputError(
            "optimum gives every block a cache of the same heads, and key-value heads are missing",
            field="portable",
            value=", ".join(map(str, heads)),
            allowed="the other variants, or whole blocks that go (--blocks)",
        )
    require_extra("optimum", "portable", "optimum-onnx")
    require_extra("optimum.exporters.onnx", "portable", "optimum-onnx")


def portable_graph(model: Any, name: str, opset: int | None) -> ir.Model:
    """Trace a causal LM, whose class becomes transformers' own, and store a tied embedding once."""
    from optimum.exporters.onnx import onnx_export_from_model

    # optimum only knows transformers' classes. Ours differ in how they are built and saved, not in what they compute.
    model.__class__ = next(c for c in type(model).__mro__ if c.__module__.startswith("transformers."))
    with LargeScratch("traced") as scratch, quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # Without the empty list it asks the hub for a tokenizer.
            onnx_export_from_model(
                model, output=scratch.path, opset=opset, task=_TASK, do_validation=False, preprocessors=[]
            )
        except (ValueError, KeyError, NotImplementedError) as error:
            raise InputError(f"optimum cannot export this model: {one_line(error)}") from error
        traced = ir.load(scratch.path / "model.onnx")
        ir.external_data.load_to_model(traced)
    graph = traced.graph
    graph.name = name
    for node in graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is not None and weight.const_value is not None:
            # /model/layers.0/mlp/up_proj/MatMul is module model.layers.0.mlp.up_proj, as in the other graph.
            node.name = _SCOPES.sub(lambda scope: scope[1].replace("/", "."), node.name or "")
    # Multiply by the transpose of the embedding if the output matrix is stored as that; runtimes fold it.
    look_up = next(node for node in graph if node.op_type == "Gather" and "embed_tokens" in (node.name or ""))
    head = next(node for node in reversed(graph) if node.op_type == "MatMul")
    table, matrix = look_up.inputs[0], head.inputs[1]
    if table is None or matrix is None or table.const_value is None or matrix.const_value is None:
        return traced
    if np.array_equal(table.const_value.numpy(), matrix.const_value.numpy().T):
        shape = list(reversed(table.const_value.shape.numpy()))
        output = ir.val("lm_head.weight", table.const_value.dtype, shape)
        attributes = {"perm": [1, 0]}
        turned = ir.node("Transpose", [table], attributes, name="lm_head.transpose", outputs=[output])
        graph.insert_before(head, turned)
        head.replace_input_with(1, output)
        graph.initializers.pop(str(matrix.name))
    return traced
