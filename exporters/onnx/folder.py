"""Finding one's way in the folder of an ONNX variant; how it is laid out, see `exporters.onnx.companions`."""

from __future__ import annotations

from pathlib import Path

from cfsp.errors import InputError

GRAPHS = "onnx"
"""Folder of the graphs."""
GENAI_CONFIG = "genai_config.json"
"""What ONNX Runtime GenAI reads first."""


def is_onnx(reference: str) -> bool:
    """Whether a reference is an .onnx file, or a folder of graphs without the weights that make it a checkpoint."""
    path = Path(reference)
    if path.suffix == ".onnx":
        return True
    graphs = (path / "config.json").is_file() and any((path / GRAPHS).glob("*.onnx"))
    return graphs and not any(path.glob("*.safetensors"))


def folder_of(graph: Path) -> Path:
    """The variant's folder that a graph belongs to: the one with the tokenizer, beside it or above."""
    for folder in graph.resolve().parents[:2]:
        if (folder / "tokenizer.json").is_file():
            return folder
    raise InputError(f"no tokenizer.json beside {graph} or in the folder above")


def find_graph(reference: str, *, last_logits: bool = False) -> Path:
    """The graph of a reference: the file, or the folder's with the logits that are wanted, or with all; InputError."""
    path = Path(reference)
    if path.suffix == ".onnx":
        return path
    by_kind: dict[bool, list[Path]] = {True: [], False: []}
    for graph in (path / GRAPHS).glob("*.onnx"):
        by_kind[graph.stem.endswith("_last")].append(graph)
    graphs = (by_kind[True] if last_logits else []) or by_kind[False]
    if len(graphs) != 1:
        raise InputError(
            f"{path} has {len(graphs)} such graphs under {GRAPHS}",
            field="model",
            allowed="name the .onnx file",
        )
    return graphs[0]
