"""Sizes of GGUF files that are not made, from a small one of each quantization, vocabulary and architecture."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cfsp.models.architectures import block_linears, model_shape
from cfsp.models.checkpoint import save_checkpoint
from cfsp.models.gguf_file import looked_up_alone
from cfsp.models.offload import at_hand, copied
from cfsp.models.shape import ModelShape
from cfsp.models.source import LoadedModel
from cfsp.pruning.parts import Removal
from cfsp.pruning.plan import BlockPlan, PruningPlan
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.surgery import cut_to_shape
from cfsp.pruning.vocabulary import VocabularyPlan, cut_vocabulary
from exporters.family import ExportOptions
from exporters.gguf.architecture import ChosenLayout, read_layout
from exporters.gguf.files import TYPES, draft_gguf
from exporters.gguf.quants import block_of, find_quant
from exporters.gguf.tensors import SizeTemplate, padded, size_template, tensor_specs
from runtime_bench.devices import ModelFacts

_TEMPLATE_WIDTH = 256
"""No type falls back at this width."""


class Sizes:
    """Computes sizes of files; `items` are quantizations that will be asked for, `folder` is scratch."""

    def __init__(
        self, loaded: LoadedModel, folder: Path, seed: int, n_threads: int, items: Sequence[str]
    ) -> None:
        self._loaded, self._folder, self._seed, self._n_threads = loaded, folder, seed, n_threads
        self._items = tuple(items)
        self._small: Any = None
        self._templates: dict[tuple[Any, ...], tuple[ChosenLayout, SizeTemplate]] = {}

    def least_bytes(
        self, item: str, shape: ModelShape, vocabulary: VocabularyPlan | None = None, *, dense: bool = False
    ) -> int:
        """Size of a file, exact to 32 bytes and what a long name takes; of a mixture with its smallest types.

        Args:
            item: Quantization.
            shape: Of the model.
            vocabulary: Tokens that are kept; None: all.
            dense: Whether nothing is pruned: the file carries no plan's hash then.
        """
        shape = shape if vocabulary is None else replace(shape, vocab_size=len(vocabulary.kept))
        if find_quant(item).is_sized:
            layout, template = self._template(item, shape, vocabulary, dense)
            return template.file_bytes(layout.of_shape(shape))
        layout, template = self._template(next(iter(self._items), "Q8_0"), shape, vocabulary, dense)
        total, chosen = template.overhead_bytes, layout.of_shape(shape)
        for spec, tensor in zip(tensor_specs(chosen), template.tensors(chosen), strict=True):
            blocks = [block_of(kind) for kind in TYPES] if spec.is_matrix else []
            count = math.prod(spec.shape)
            sizes = [count // n * size for n, size in blocks if spec.shape[1] % n == 0]
            total += padded(min(sizes, default=2 * count if spec.is_matrix else tensor.n_bytes))
        return total

    def facts(self, item: str, shape: ModelShape, vocabulary: VocabularyPlan | None = None) -> ModelFacts:
        """What a projection to a device needs to know of a file."""
        shape = shape if vocabulary is None else replace(shape, vocab_size=len(vocabulary.kept))
        layout, template = self._template(item, shape, vocabulary, dense=False)
        config, tensors = layout.config, template.tensors(layout.of_shape(shape))
        aside = looked_up_alone({t.name for t in tensors})
        read = [t for t in tensors if t.name not in aside]
        matrices = [t for t in read if len(t.shape) > 1]
        by_type: Counter[str] = Counter()
        for tensor in matrices:
            by_type[tensor.kind] += tensor.n_bytes
        return ModelFacts(
            path=Path(item),
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

    def _template(
        self, item: str, shape: ModelShape, vocabulary: VocabularyPlan | None, dense: bool
    ) -> tuple[ChosenLayout, SizeTemplate]:
        """A file of the same blocks and tokens, and of few channels, says of others what is no tensor, and types."""
        if self._small is None:  # before anything else is done to the model
            self._small = copied(self._loaded.model)
            whole = model_shape(self._small)
            widths = [min(_TEMPLATE_WIDTH, width) for width in whole.ffn_widths]
            cut_to_shape(self._small, whole.with_ffn_widths(widths))
        small = model_shape(self._small)
        groups = {
            one.origin: small.blocks[one.origin].kv_groups or 0 if one.kv_groups is None else one.kv_groups
            for one in shape.blocks
        }
        # Of models of one width llama.cpp may have another architecture than of others.
        kept = None if vocabulary is None else vocabulary.kept
        rest = (shape.is_uniform, dense, kept, tuple(groups.items()))
        if (item, *rest) in self._templates:
            return self._templates[item, *rest]

        twin = replace(self._loaded, model=copied(self._small))
        if vocabulary is not None:
            with at_hand(twin.model.get_input_embeddings(), twin.model.get_output_embeddings()):
                twin = cut_vocabulary(twin, vocabulary)
        model = twin.model
        small = replace(small, vocab_size=model_shape(model).vocab_size)
        small = small.without(blocks=set(range(len(small.blocks))) - groups.keys())
        small = small.with_kv_groups(list(groups.values()))
        first, *widths = small.ffn_widths
        cut_to_shape(model, small.with_ffn_widths([first if shape.is_uniform else first // 2, *widths]))
        folder = self._folder / "template"
        shutil.rmtree(folder, ignore_errors=True)
        linears = [(name, one) for each in block_linears(model) for name, one in each.items()]
        save_checkpoint(
            twin,
            folder / "model",
            plan=None if dense else _some_plan(model),
            input_moments={name: torch.ones(linear.in_features) for name, linear in linears},
            seed=self._seed,
        )
        stem = f"{self._loaded.source.name}-{'dense' if dense else 'pruned12_3456'}"  # as long as a release's
        options = ExportOptions(name=stem, use_imatrix=True, n_threads=self._n_threads)
        drafts = draft_gguf(folder / "model", folder, list(dict.fromkeys((item, *self._items))), options)
        for name, path in drafts.items():
            self._templates[name, *rest] = read_layout(folder / "model"), size_template(path, name)
        shutil.rmtree(folder)
        return self._templates[item, *rest]


def _some_plan(model: Any) -> PruningPlan:
    """A plan by which a model is what it is, for what any plan adds to a file: its hash."""
    shape = model_shape(model)
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
        blocks=tuple(BlockPlan(width, 0.0, tuple(range(width))) for width in shape.ffn_widths),
        attention=Removal(silent, (), 0.0, 0) if silent else None,
    )
