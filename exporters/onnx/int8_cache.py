"""Graphs whose keys and values are kept in 8 bits: GroupQueryAttention rounds them as they come, with a scale for each
channel that the graph states.

The graph that an export makes has a cache of floats. `make_ready` makes the other one of it, without weights of its
own, and keeps it in the user's cache; `exporters.onnx.ready` finds it there, by a look at the files alone. A scale is
the largest value of its channel, without its sign, over CALIBRATION_TOKENS tokens or the model's context, divided by
127; what is larger later is clipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cfsp.errors import InputError, require_extra
from cfsp.files import made_once
from exporters.checkpoint_reader import read_config
from exporters.onnx.folder import folder_of, told_context
from exporters.onnx.ready import GRAPH, place_of
from exporters.onnx.runtime import open_model, present_name

if TYPE_CHECKING:
    import onnx

CALIBRATION_TOKENS = 1024
"""From the end of the built-in text, which judgements read from its beginning."""
_LARGEST, _LEAST = np.float32(127), np.float32(1e-6)
"""Code of a channel's largest value, and the least that it is taken to be: a channel may be all zeros."""
_OPERATOR = "GroupQueryAttention"
_PAST_INPUTS, _SCALE_INPUT = (3, 4), 12
"""Where the operator's inputs have past keys and values, and where their scales begin."""

_Scales = dict[str, npt.NDArray[np.float32]]


def make_ready(path: Path, n_threads: int = 1) -> None:
    """Make the graph with an 8-bit cache, where it is not there yet.

    Args:
        path: An .onnx file whose weights lie beside it.
        n_threads: To run the text with.

    Raises:
        InputError: The graph has no GroupQueryAttention with a cache of floats, or its tokenizer is not there.
        MissingExtraError: onnx is not installed.
    """
    require_extra("onnx", "onnx")

    def make(place: Path) -> None:
        (place / GRAPH).write_bytes(_with_int8_cache(path, _scales(path, n_threads)))

    made_once(place_of(path), lambda folder: (folder / GRAPH).is_file(), make)


def _scales(path: Path, n_threads: int) -> _Scales:
    """Input of a cache -> the scale of each of its channels, (heads * numbers of a head,)."""
    folder = folder_of(path)
    longest = told_context(folder, read_config(folder).max_position_embeddings)
    ids = _calibration_ids(folder)[-longest:]
    model = open_model(path, n_ctx=len(ids), n_threads=n_threads)
    try:
        for start in range(0, len(ids), model.n_batch):
            model.decode(ids[start : start + model.n_batch])
        held = model.fixed_caches()
    finally:
        model.close()
    if not held:
        raise InputError(f"{path} keeps no keys and values in buffers of a fixed length")
    largest = {name: np.abs(values.astype(np.float32)).max(axis=1) for name, values in held.items()}
    return {name: np.maximum(most, _LEAST).reshape(-1) / _LARGEST for name, most in largest.items()}


def _calibration_ids(folder: Path) -> list[int]:
    from tokenizers import Tokenizer

    from cfsp.text.settings import BUILTIN_TEXT
    from cfsp.text.tokens import load_documents

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    (document,) = load_documents(BUILTIN_TEXT)[-1:]
    ids: list[int] = tokenizer.encode(str(document.text)[-8 * CALIBRATION_TOKENS :]).ids
    return ids[-CALIBRATION_TOKENS:]


def _with_int8_cache(path: Path, scales: _Scales) -> bytes:
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        if node.op_type == _OPERATOR:
            _round_cache(model.graph, node, scales)
    names = {name for past in scales for name in (past, present_name(past))}
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.name in names:
            value.type.tensor_type.elem_type = onnx.TensorProto.INT8
    stored: bytes = model.SerializeToString()
    return stored


def _round_cache(graph: Any, node: onnx.NodeProto, scales: _Scales) -> None:
    """Have an attention keep its keys and values in 8 bits."""
    import onnx

    kinds = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    node.attribute.extend(onnx.helper.make_attribute(name, kind) for name, kind in kinds.items())
    past = [node.input[index] for index in _PAST_INPUTS]
    node.input.extend([""] * (_SCALE_INPUT - len(node.input)))
    for name in past:
        scale = onnx.numpy_helper.from_array(scales[name], f"{name}.scale")
        graph.initializer.append(scale)
        node.input.append(scale.name)
