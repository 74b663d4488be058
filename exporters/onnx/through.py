"""A model as a 4-bit ONNX variant holds it, for training through its rounding.

Numbers and which layers get eight bits are chosen for a text, as export chooses them. The numbers stay; the float16
scale of every block is trained, and so are the norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cfsp.errors import InputError
from cfsp.models.rounded_numbers import RoundedFormat, RoundedNumbers
from cfsp.models.weights import sha256_tensors
from cfsp.progress import Progress
from exporters.checkpoint_reader import read_config
from exporters.job import load_checkpoint
from exporters.onnx.block_quantize import Rounded
from exporters.onnx.mixed import choose_few, measured_model, rounded_model
from exporters.onnx.variants import INT8, VARIANTS, BlockFormat, Variant, find_variant
from exporters.onnx.weights import HEAD_PARTS, check_blocks, is_tied, weight_of
from exporters.quantize.scaled import factors_of, make_plain, stands_for, train_blocks, train_norms


@dataclass(frozen=True)
class OnnxRounded:
    """See `cfsp.recovery.rounding.RoundedModel`.

    Attributes:
        variant: What export calls it.
        layers: Every Linear of the blocks, and the output matrix's parts.
        table: The token embedding as it is stored, where it is not the output matrix.
    """

    variant: str
    layers: Mapping[str, Rounded]
    table: Rounded | None

    @property
    def sha256(self) -> str:
        """Hash of all numbers."""
        return sha256_tensors(_tensors(self.layers).items())

    def attach(self, model: Any) -> None:
        """See `RoundedModel`."""
        train_norms(model)
        self._hold(model, self.layers)
        for name, layer in self.layers.items():
            if name not in HEAD_PARTS:
                train_blocks(model.get_submodule(name), layer.form.block_size)

    def finish(self, model: Any) -> RoundedNumbers:
        """See `RoundedModel`."""
        layers = dict(self.layers)
        for name in self.layers.keys() - set(HEAD_PARTS):
            module = model.get_submodule(name)
            factors = factors_of(module)
            if factors is not None:
                layers[name] = layers[name].scaled(factors)
            make_plain([module])
        self._hold(model, layers)
        types = {name: str(layer.form.bits) for name, layer in layers.items()}
        return RoundedNumbers(RoundedFormat(self.variant, types, None), _tensors(layers))

    def _hold(self, model: Any, layers: Mapping[str, Rounded]) -> None:
        """Give modules what is stored of them."""
        with torch.no_grad():
            for name, layer in layers.items():
                weight_of(model, name).copy_(layer.dequantized())
            if self.table is not None:
                model.get_input_embeddings().weight.copy_(self.table.dequantized())


class OnnxRounding:
    """See `cfsp.recovery.rounding.Rounding`."""

    def check(self, name: str) -> None:
        """See `Rounding`: what is chosen for a size, or loses nothing to speak of, is not trained through."""
        if not _is_trainable(find_variant(name)):
            allowed = ", ".join(row.name for row in VARIANTS.values() if _is_trainable(row))
            raise InputError("cannot be trained through", field="for_quant", value=name, allowed=allowed)

    def start(
        self, checkpoint: Path, name: str, input_ids: torch.Tensor, device: str, progress: Progress
    ) -> OnnxRounded:
        """See `Rounding`."""
        variant = find_variant(name)
        check_blocks(read_config(checkpoint).spec)
        assert variant.form is not None
        model = load_checkpoint(checkpoint)
        measured = measured_model(model, variant.form, input_ids, device=device, progress=progress)
        names = choose_few(model, measured)
        few = rounded_model(model, variant.form, names, input_ids, device=device, progress=progress)
        table = None if is_tied(model) else few.nearest(model.get_input_embeddings().weight.detach(), INT8)
        return OnnxRounded(variant.name, few.layers, table)


def trained_layers(model: Any, variant: Variant, numbers: RoundedNumbers) -> dict[str, Rounded]:
    """The layers of a checkpoint that has a variant's numbers.

    Raises:
        InputError: They are not what its weights stand for, or not of its shape.
    """
    assert variant.form is not None
    forms: dict[str, BlockFormat] = {str(form.bits): form for form in (variant.form, INT8)}
    layers = {}
    for name, bits in numbers.format.types.items():
        weight = weight_of(model, name).float()
        q, scales = (numbers.tensors.get(f"{name}.{part}") for part in ("q", "scales"))
        if q is None or scales is None or bits not in forms or scales.shape != q.shape[:2]:
            raise InputError(f"the checkpoint's rounded numbers are not whole: {name}")
        layer = Rounded(q, scales, weight.shape[1], forms[bits])
        if (
            q.shape[0] != len(weight)
            or q[0].numel() < weight.shape[1]
            or not stands_for(layer.dequantized(), weight)
        ):
            raise InputError(f"the checkpoint's rounded numbers are not what its weights stand for: {name}")
        layers[name] = layer
    return layers


def _is_trainable(variant: Variant) -> bool:
    return variant.calibrated and not variant.mixed


def _tensors(layers: Mapping[str, Rounded]) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{part}": getattr(layer, part).contiguous()
        for name, layer in layers.items()
        for part in ("q", "scales")
    }
