"""An ONNX file that cannot be loaded says why once, in our words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")

from cfsp.errors import InputError  # noqa: E402
from exporters.onnx.runtime import open_model  # noqa: E402


def test_onnx_runtime_writes_nothing_about_a_file_it_refuses(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weight = onnx.numpy_helper.from_array(np.zeros(4096, np.float32), "w")
    # The first is folded when the file is opened, which reads the data.
    nodes = [onnx.helper.make_node("Add", [a, "w"], [b]) for a, b in ("wv", "xy")]
    nodes[1].input[1] = "v"
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [4096]) for n in "xy")
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    file = tmp_path / "a.onnx"
    onnx.save(model, file, save_as_external_data=True, location="a.onnx_data", size_threshold=0)
    data = tmp_path / "a.onnx_data"
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(InputError, match="ONNX Runtime cannot load"):
        open_model(file, n_ctx=8, n_threads=1)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
