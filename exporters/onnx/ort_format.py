"""A graph in ONNX Runtime's own format: one file with its weights, for builds that hold no more than it needs.

Such a minimal build cannot read ONNX and does not optimize graphs; what depends on weights alone is computed when
the file is written. See https://onnxruntime.ai/docs/performance/model-optimizations/ort-format-models.html
"""

from __future__ import annotations

from pathlib import Path

from cfsp.errors import InputError, require_extra

OPERATORS_FILE = "required_operators.config"
"""What ONNX Runtime's build script wants to know: `--include_ops_by_config`."""
_MAX_BYTES = 2**31 - 1


def write_ort(graph: Path, folder: Path) -> Path:
    """Write folder/<stem>.ort and the list of its operators.

    Args:
        graph: The .onnx file; its external data lies beside it.
        folder: To create.

    Raises:
        InputError: The weights do not fit into one file.
        MissingExtraError: ONNX Runtime is not installed.
    """
    require_extra("onnxruntime", "onnx")
    import onnxruntime
    from onnxruntime.tools.ort_format_model import create_config_from_models

    folder.mkdir()
    path = folder / f"{graph.stem}.ort"
    if sum(file.stat().st_size for file in graph.parent.glob("*.onnx_data")) > _MAX_BYTES:
        raise InputError(f"{graph.name} and its weights do not fit into one file of 2 GiB, as .ort wants it")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    # What a minimal build could not do itself; extended optimizations would be for this processor.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    operators = folder / OPERATORS_FILE
    create_config_from_models([path], operators, False)
    # Its comments name the file by a path of this machine.
    lines = [line for line in operators.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    operators.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
