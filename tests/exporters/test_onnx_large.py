"""Weights beyond 2 GiB, which no protobuf holds: they lie beside the graph, at offsets beyond 2^31."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import psutil
import pytest
import torch

from exporters.onnx.decoder_graph import decoder_graph
from exporters.onnx.export import save_graph
from exporters.onnx.weights import Weights

HIDDEN, HEADS, HEAD_DIM = 256, 4, 64
ROWS = 64
"""Rows of the table that are not zero: as many at its beginning as at its end."""


def graph_of(tiny_model: Callable[..., Any], vocab_size: int) -> ir.Model:
    """One block; the same numbers whatever the vocabulary. A table of zeros takes no memory until it is written."""
    settings = {
        "num_hidden_layers": 1,
        "hidden_size": HIDDEN,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD_DIM,
    }
    model, _ = tiny_model("llama", num_attention_heads=HEADS, **settings)
    rows = torch.randn(2, ROWS, HIDDEN, generator=torch.Generator().manual_seed(0)) * 0.1
    table = torch.zeros(vocab_size, HIDDEN)
    table[:ROWS], table[-ROWS:] = rows
    weight = torch.nn.Parameter(table, requires_grad=False)
    model.get_input_embeddings().weight = model.get_output_embeddings().weight = weight
    return decoder_graph(model, Weights(), name="large")


def logits(path: Path, ids: list[int]) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    past = np.zeros((1, HEADS, 0, HEAD_DIM), dtype=np.float32)
    feeds = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), dtype=np.int64)}
    feeds |= {f"past_key_values.0.{part}": past for part in ("key", "value")}
    found: np.ndarray = session.run(["logits"], feeds)[0][0]
    return found


@pytest.mark.everything
def test_weights_beyond_two_gibibytes_lie_beside_the_graph(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    vocab_size = 2**31 // (4 * HIDDEN) + 4096
    if psutil.disk_usage(str(tmp_path)).free < 4 * 2**30 or psutil.virtual_memory().available < 6 * 2**30:
        pytest.skip("wants 4 GiB of disk and 6 GiB of memory")
    large, small = tmp_path / "large" / "model.onnx", tmp_path / "small" / "model.onnx"
    for path, rows in ((large, vocab_size), (small, 2 * ROWS)):
        path.parent.mkdir()
        save_graph(graph_of(tiny_model, rows), path)
    data = large.with_name("model.onnx_data")
    assert data.stat().st_size > 2**31
    assert large.stat().st_size < 100_000
    values = ir.load(large).graph.initializers.values()
    outside = [v.const_value for v in values if isinstance(v.const_value, ir.ExternalTensor)]
    ends = sorted((tensor.offset or 0, tensor.length or 0) for tensor in outside)
    assert ends[-1][0] > 2**31
    # Each begins where the one before it ends, or later, and the last ends with the file.
    assert all(start + length <= following for (start, length), (following, _) in pairwise(ends))
    assert sum(ends[-1]) == data.stat().st_size
    ids = [0, ROWS - 1, ROWS, 2 * ROWS - 1]
    there = [i if i < ROWS else vocab_size - 2 * ROWS + i for i in ids]
    found = logits(large, there)
    expected = logits(small, ids)
    np.testing.assert_allclose(found[:, :ROWS], expected[:, :ROWS], atol=1e-5)
    np.testing.assert_allclose(found[:, -ROWS:], expected[:, ROWS:], atol=1e-5)
