"""A graph on disk: what it is called and says of itself, and its weights in a file beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from cfsp.files import sha256_file
from exporters.onnx.decoder_graph import OPSET, Decoder, build_decoder
from exporters.onnx.variants import Variant
from exporters.provenance import SOME_HASH, Provenance

_EXTERNAL_BYTES = 1024
"""Smaller weights stay inside the graph."""


@dataclass(frozen=True)
class Labels:
    """What a graph says beside what it computes.

    Attributes:
        stem: Of its file.
        name: Of the graph.
        metadata: Where it comes from.
        opset: Of ONNX's own operators.
    """

    stem: str
    name: str
    metadata: Mapping[str, str]
    opset: int

    @classmethod
    def of(
        cls, variant: Variant, origin: Provenance, text_sha256: str | None, opset: int | None = None
    ) -> Labels:
        """Those of a variant.

        Args:
            variant: Row of the table.
            origin: Of the checkpoint.
            text_sha256: Hash of the text that it is rounded for.
            opset: As it was asked for.
        """
        more = {"phoneready.license": origin.license, "phoneready.calibration_sha256": text_sha256}
        metadata = origin.metadata() | {key: value for key, value in more.items() if value}
        return cls(variant.stem, f"{origin.name}-{variant.name}", metadata, opset or OPSET)

    def graph(self, decoder: Decoder, stored: Mapping[str, ir.TensorProtocol] | None = None) -> ir.Model:
        """The graph with all logits; over weights that it has stored, the one with the last position's alone."""
        return build_decoder(
            decoder, name=self.name, last_logits=stored is not None, stored=stored, opset=self.opset
        )


def save_graph(
    graph: ir.Model,
    path: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    sha256: Callable[[Path], str] = sha256_file,
) -> Path:
    """Write a graph, and its weights beside it, whose hash it holds: no protobuf is larger than 2 GiB.

    Args:
        graph: Its weights become references to the file.
        path: The .onnx file.
        metadata: More keys for it.
        sha256: Hash of that file.

    Returns:
        The file of the weights.
    """
    data = path.with_name(f"{path.name}_data")
    ir.external_data.unload_from_model(graph, path.parent, data.name, size_threshold_bytes=_EXTERNAL_BYTES)
    graph.metadata_props.update({**(metadata or {}), "phoneready.data_sha256": sha256(data)})
    ir.save(graph, path)
    return data


def stored_size(path: Path, data: Path) -> int:
    """What is said to be an export's size: the graph with all logits and its weights."""
    return path.stat().st_size + data.stat().st_size


def size_of(decoder: Decoder, labels: Labels) -> int:
    """What files of a decoder, whose weights are nowhere, would take in bytes; they are written and deleted."""
    with tempfile.TemporaryDirectory(prefix="sizing-") as scratch:
        path = Path(scratch) / f"{labels.stem}.onnx"
        graph = labels.graph(decoder)
        return stored_size(
            path, save_graph(graph, path, metadata=labels.metadata, sha256=lambda _: SOME_HASH)
        )
