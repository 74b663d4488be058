"""Sizes of GGUF files that are not made, and what such files would need on a device."""

from __future__ import annotations

import copy
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from cfsp.models.architectures import block_linears, decoder_layers, feed_forward, model_shape
from cfsp.models.checkpoint import save_checkpoint
from cfsp.models.shape import ModelShape
from cfsp.models.source import LoadedModel
from cfsp.pruning.plan import PruningPlan
from cfsp.pruning.surgery import cut_channels, set_config_shape
from exporters.gguf.architecture import ChosenLayout, read_layout
from exporters.gguf.files import draft_gguf
from exporters.gguf.size import SizeTemplate, size_template
from exporters.options import ExportOptions
from runtime_bench.devices.model_facts import ModelFacts

_TEMPLATE_WIDTH = 256
"""No type falls back at this width."""
_TABLE, _HEAD = "token_embd.weight", "output.weight"


@dataclass
class Sizes:
    """Computes sizes from one small file of every quantization and architecture, written when it is first needed.

    Args:
        loaded: The model before channels go: the dense one, or what is left of it with fewer tokens.
        plan: A plan of it, for what a plan adds to a file; not read for files of the dense model.
        folder: Scratch.
        use_imatrix: Whether files are quantized with an importance matrix.
        seed: Of the run.
        n_threads: Threads of the quantizer.
        items: Quantizations that will be asked for: their small files are written together.
    """

    loaded: LoadedModel
    plan: PruningPlan | None
    folder: Path
    use_imatrix: bool
    seed: int
    n_threads: int
    items: tuple[str, ...] = ()
    _templates: dict[tuple[str, bool, bool], tuple[ChosenLayout, SizeTemplate]] = field(default_factory=dict)

    def file_bytes(self, item: str, shape: ModelShape, *, dense: bool = False) -> int:
        """Size of the file with this shape, exact to one step of its alignment (32 bytes).

        Args:
            item: Quantization.
            shape: Of the model.
            dense: Whether it is the dense model's, which carries no plan's hash.
        """
        layout, template = self._template(item, shape, dense)
        return template.file_bytes(layout.of_shape(shape))

    def facts(self, item: str, shape: ModelShape) -> ModelFacts:
        """What a projection to a device needs to know of it."""
        layout, template = self._template(item, shape, dense=False)
        config, tensors = layout.config, template.tensors(layout.of_shape(shape))
        has_head = any(t.name == _HEAD for t in tensors)
        read = [t for t in tensors if t.name != _TABLE or not has_head]
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
            key_value_width=config.num_hidden_layers * config.num_key_value_heads * 2 * config.head_dim,
            hidden_size=config.hidden_size,
            ffn_width=max(shape.ffn_widths),
            vocab_size=config.vocab_size,
            context_length=config.context_length,
        )

    def _template(self, item: str, shape: ModelShape, dense: bool) -> tuple[ChosenLayout, SizeTemplate]:
        """What a file of the dense model in all but its widths, which are small, says of others."""
        # Of models of one width llama.cpp may have another architecture than of others.
        key = (item, shape.is_uniform, dense)
        if key not in self._templates:
            widths = [min(_TEMPLATE_WIDTH, width) for width in model_shape(self.loaded.model).ffn_widths]
            if not shape.is_uniform:
                widths[0] //= 2
            folder = self.folder / "template"
            shutil.rmtree(folder, ignore_errors=True)
            self._save(folder / "model", widths, dense)
            stem = f"{self.loaded.source.name}-{'dense' if dense else 'pruned12_3456'}"
            options = ExportOptions(name=stem, use_imatrix=self.use_imatrix, n_threads=self.n_threads)
            files = draft_gguf(folder / "model", folder, list(dict.fromkeys((item, *self.items))), options)
            for name, path in files.items():
                made = read_layout(folder / "model"), size_template(path, name)
                self._templates[name, shape.is_uniform, dense] = made
            shutil.rmtree(folder)
        return self._templates[key]

    def _save(self, folder: Path, widths: Sequence[int], dense: bool) -> None:
        model = copy.deepcopy(self.loaded.model)
        with torch.no_grad():
            for layer, width in zip(decoder_layers(model), widths, strict=True):
                cut_channels(feed_forward(model, layer), torch.arange(width))
        set_config_shape(model)
        ones = {
            name: torch.ones(linear.in_features)
            for linears in block_linears(model)
            for name, linear in linears.items()
        }
        plan = None
        if self.plan is not None and not dense:
            blocks = zip(self.plan.blocks, widths, strict=True)
            plan = replace(self.plan, blocks=tuple(replace(block, width=width) for block, width in blocks))
        save_checkpoint(
            replace(self.loaded, model=model),
            folder,
            plan=plan,
            input_moments=ones if self.use_imatrix else None,
            seed=self.seed,
        )
