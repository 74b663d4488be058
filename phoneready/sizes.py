"""Sizes of exported files that are not made, and what GGUF files would need on a device."""

from __future__ import annotations

import functools
import math
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cfsp.models.architectures import block_linears, model_shape
from cfsp.models.checkpoint import save_checkpoint
from cfsp.models.gguf_file import looked_up_alone
from cfsp.models.offload import copied
from cfsp.models.shape import ModelShape
from cfsp.models.source import LoadedModel
from cfsp.pruning.parts import Removal
from cfsp.pruning.plan import BlockPlan, PruningPlan, ScoreSummary
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.surgery import cut_to_shape
from exporters.family import ExportOptions
from exporters.gguf.architecture import ChosenLayout, read_layout
from exporters.gguf.files import TYPES, draft_gguf
from exporters.gguf.matrix import block_of
from exporters.gguf.quants import find_quant
from exporters.gguf.size import SizeTemplate, padded, size_template
from exporters.gguf.tensors import tensor_specs
from runtime_bench.devices.model_facts import ModelFacts

_TEMPLATE_WIDTH = 256
"""No type falls back at this width."""


_Key = tuple[str, bool, bool, tuple[tuple[int, int], ...]]
"""Quantization; whether all blocks are alike; whether it is the dense model; which blocks stay, with how many
key-value groups."""


@dataclass
class Sizes:
    """Computes sizes of GGUF files from a small one of every quantization and architecture, written when first needed.

    Args:
        loaded: The model before channels go: the dense one, or what is left of it with fewer tokens.
        folder: Scratch.
        use_imatrix: Whether files are quantized with an importance matrix.
        seed: Of the run.
        n_threads: Threads of the quantizer.
        items: Quantizations that will be asked for: their small files are written together.
    """

    loaded: LoadedModel
    folder: Path
    use_imatrix: bool
    seed: int
    n_threads: int
    items: tuple[str, ...] = ()
    _templates: dict[_Key, tuple[ChosenLayout, SizeTemplate]] = field(default_factory=dict)

    def file_bytes(self, item: str, shape: ModelShape, *, dense: bool = False) -> int:
        """Size of the file with this shape, exact to one step of its alignment (32 bytes), and what a long name takes.

        Args:
            item: Quantization.
            shape: Of the model.
            dense: Whether it is the dense model's, which carries no plan's hash.
        """
        layout, template = self._template(item, shape, dense)
        return template.file_bytes(layout.of_shape(shape))

    def least_bytes(self, item: str, shape: ModelShape, *, dense: bool = False) -> int:
        """As `file_bytes`; of a mixture what its smallest types take."""
        if find_quant(item).is_sized:
            return self.file_bytes(item, shape, dense=dense)
        layout, template = self._template(next(iter(self.items), "Q8_0"), shape, dense)
        total, chosen = template.overhead_bytes, layout.of_shape(shape)
        for spec, tensor in zip(tensor_specs(chosen), template.tensors(chosen), strict=True):
            blocks = [block_of(kind) for kind in TYPES] if spec.is_matrix else []
            count = math.prod(spec.shape)
            sizes = [count // n * size for n, size in blocks if spec.shape[1] % n == 0]
            total += padded(min(sizes, default=2 * count if spec.is_matrix else tensor.n_bytes))
        return total

    def facts(self, item: str, shape: ModelShape) -> ModelFacts:
        """What a projection to a device needs to know of it."""
        layout, template = self._template(item, shape, dense=False)
        config, tensors = layout.config, template.tensors(layout.of_shape(shape))
        aside = looked_up_alone({t.name for t in tensors})
        read = [t for t in tensors if t.name not in aside]
        matrices = [t for t in read if len(t.shape) > 1]
        by_type: Counter[str] = Counter()
        for tensor in matrices:
            by_type[tensor.kind] += tensor.n_bytes
        return ModelFacts(
            path=self.folder,
            weight_bytes=sum(t.n_bytes for t in tensors),
            read_bytes=sum(t.n_bytes for t in read),
            n_multiplied=sum(math.prod(t.shape) for t in matrices),
            bytes_by_type=dict(by_type),
            key_value_width=config.key_value_width,
            hidden_size=config.hidden_size,
            ffn_width=max(shape.ffn_widths),
            vocab_size=config.vocab_size,
            context_length=layout.context_length,
        )

    def _template(self, item: str, shape: ModelShape, dense: bool) -> tuple[ChosenLayout, SizeTemplate]:
        """What a file of the same blocks in all but their widths, which are small, says of others."""
        # Of models of one width llama.cpp may have another architecture than of others.
        groups = self._groups(shape)
        rest = (shape.is_uniform, dense, tuple(groups.items()))
        key = (item, *rest)
        if key not in self._templates:
            folder = self.folder / "template"
            shutil.rmtree(folder, ignore_errors=True)
            self._save(folder / "model", shape.is_uniform, groups, dense)
            stem = _stem(self.loaded.source.name, dense=dense)
            options = ExportOptions(name=stem, use_imatrix=self.use_imatrix, n_threads=self.n_threads)
            files = draft_gguf(folder / "model", folder, list(dict.fromkeys((item, *self.items))), options)
            for name, path in files.items():
                made = read_layout(folder / "model"), size_template(path, name)
                self._templates[name, *rest] = made
            shutil.rmtree(folder)
        return self._templates[key]

    @functools.cached_property
    def small(self) -> Any:
        """The model with the first few channels of each block, as it was when sizes were first asked for."""
        model = copied(self.loaded.model)
        shape = model_shape(model)
        cut_to_shape(model, shape.with_ffn_widths([min(_TEMPLATE_WIDTH, w) for w in shape.ffn_widths]))
        return model

    def _groups(self, shape: ModelShape) -> dict[int, int]:
        """Blocks that stay -> their key-value groups, those of the dense model if the shape does not say."""
        known = model_shape(self.small).blocks
        return {
            block.origin: known[block.origin].kv_groups or 0 if block.kv_groups is None else block.kv_groups
            for block in shape.blocks
        }

    def _save(self, folder: Path, uniform: bool, groups: Mapping[int, int], dense: bool) -> None:
        model = copied(self.small)
        shape = model_shape(model)
        shape = shape.without(blocks=set(range(len(shape.blocks))) - groups.keys())
        shape = shape.with_kv_groups(list(groups.values()))
        first, *widths = shape.ffn_widths
        cut_to_shape(model, shape.with_ffn_widths([first if uniform else first // 2, *widths]))
        ones = {
            name: torch.ones(linear.in_features)
            for linears in block_linears(model)
            for name, linear in linears.items()
        }
        save_checkpoint(
            replace(self.loaded, model=model),
            folder,
            plan=None if dense else _some_plan(model),
            input_moments=ones if self.use_imatrix else None,
            seed=self.seed,
        )


def _stem(name: str, *, dense: bool) -> str:
    """A name as long as that of a release's file."""
    return f"{name}-{'dense' if dense else 'pruned12_3456'}"


def _some_plan(model: Any) -> PruningPlan:
    """A plan by which a model is what it is, for what any plan adds to a file: its hash."""
    scores, shape = ScoreSummary(0.0, 0.0, 0.0, 1.0), model_shape(model)
    silent = tuple(block.origin for block in shape.blocks if not block.has_attention)
    return PruningPlan(
        model_type=model.config.model_type,
        source="",
        source_sha256=None,
        calibration=(),
        calibration_sha256="",
        calibration_tokens=0,
        seed=0,
        settings=PruneSettings(),
        dense_widths=shape.ffn_widths,
        blocks=tuple(BlockPlan(width, 0.0, tuple(range(width)), scores) for width in shape.ffn_widths),
        attention=Removal(silent, (), 0.0, 0) if silent else None,
    )
