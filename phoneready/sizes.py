"""Sizes of exported files that are not made, and what GGUF files would need on a device."""

from __future__ import annotations

import copy
import functools
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
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
from cfsp.pruning.axes.parts import Removal
from cfsp.pruning.budget import Cost
from cfsp.pruning.outline import cut_to_shape, outline
from cfsp.pruning.plan import BlockPlan, PruningPlan, ScoreSummary
from cfsp.pruning.settings import PruneSettings
from exporters.families import family_of
from exporters.gguf.architecture import ChosenLayout, read_layout
from exporters.gguf.files import draft_gguf
from exporters.gguf.size import SizeTemplate, size_template
from exporters.gguf.tokenizer_metadata import tokenizer_bytes
from exporters.options import ExportOptions
from exporters.provenance import SOME_HASH, Provenance, file_stem
from runtime_bench.devices.model_facts import ModelFacts

_TEMPLATE_WIDTH = 256
"""No type falls back at this width."""
_NAMES_BYTES = 128
"""By which a file may be larger that has a longer name than was thought."""


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
        """Blocks that stay -> their key-value groups, those of the dense model where the shape does not say."""
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


@dataclass
class DraftedSizes:
    """Bytes of the largest of some GGUF files of a model: a `cfsp.pruning.budget.Cost`.

    Args:
        sizes: Of the dense model.
        items: Quantizations.
    """

    sizes: Sizes
    items: Sequence[str]
    _tokens: dict[tuple[int, int], int] = field(default_factory=dict)

    def __call__(self, shape: ModelShape, tokenizer: Any) -> float:
        """Of a model with this shape and tokenizer."""
        dense = self.sizes.loaded.tokenizer
        more = self._vocabulary(tokenizer, shape) - self._vocabulary(dense, model_shape(self.sizes.small))
        return max(self.sizes.file_bytes(item, shape) for item in self.items) + more + _NAMES_BYTES

    def _vocabulary(self, tokenizer: Any, shape: ModelShape) -> int:
        tokens, rows = len(tokenizer), shape.vocab_size or 0
        if (tokens, rows) not in self._tokens:
            self._tokens[tokens, rows] = tokenizer_bytes(tokenizer, max(tokens, rows))
        return self._tokens[tokens, rows]


@dataclass
class OutlinedSizes:
    """Most bytes of the largest of some files whose size follows from the shape: a `cfsp.pruning.budget.Cost`.

    Args:
        sizes: Of the dense model.
        items: Formats of families that compute it.
    """

    sizes: Sizes
    items: Sequence[str]
    _known: dict[ModelShape, int] = field(default_factory=dict)

    def __call__(self, shape: ModelShape, tokenizer: Any) -> float:
        """Of a model with this shape; what tokens are called lies in another file."""
        if shape not in self._known:
            model = copy.deepcopy(self._outline)
            cut_to_shape(model, shape)
            self._known[shape] = max(self._size(model, item) for item in self.items) + _NAMES_BYTES
        return self._known[shape]

    def _size(self, model: Any, item: str) -> int:
        compute = family_of(item).largest_size
        assert compute is not None  # what the items are chosen by
        return compute(model, item, self._origin)

    @functools.cached_property
    def _outline(self) -> Any:
        """Of the model as it was when sizes were first asked for."""
        return outline(self.sizes.loaded.model)

    @property
    def _origin(self) -> Provenance:
        """As long as what a checkpoint will say."""
        source = self.sizes.loaded.source
        return Provenance(
            name=file_stem(_stem(source.name, dense=False)),
            source_model=source.name,
            source_sha256=SOME_HASH,
            checkpoint_sha256=SOME_HASH,
            plan_sha256=SOME_HASH,
            license=source.license,
        )


@dataclass(frozen=True)
class LargestOf:
    """The most of several costs: a `cfsp.pruning.budget.Cost`."""

    costs: tuple[Cost, ...]

    def __call__(self, shape: ModelShape, tokenizer: Any) -> float:
        """Of a model with this shape and tokenizer."""
        return max(cost(shape, tokenizer) for cost in self.costs)


def file_sizes(sizes: Sizes, items: Sequence[str]) -> Cost:
    """Bytes of the largest of some exported files, of whatever family.

    Args:
        sizes: Of the dense model.
        items: Formats of which the size follows from the shape.
    """
    outlined = [item for item in items if family_of(item).largest_size]
    drafted = [item for item in items if item not in outlined]
    kinds = ((DraftedSizes, drafted), (OutlinedSizes, outlined))
    return LargestOf(tuple(kind(sizes, some) for kind, some in kinds if some))


@dataclass(frozen=True)
class DecodeTimes:
    """Time that a token takes, as a share of the dense model's: a `cfsp.pruning.budget.Cost`.

    A generated token reads all weights once, which is what takes the time on a phone; of several files the slowest
    counts.

    Args:
        sizes: Of the dense model.
        items: Quantizations.
    """

    sizes: Sizes
    items: Sequence[str]

    def __call__(self, shape: ModelShape, tokenizer: Any) -> float:
        """Of a model with this shape; what tokens are called takes no time."""
        return max(self.sizes.facts(item, shape).read_bytes / self._dense[item] for item in self.items)

    @functools.cached_property
    def _dense(self) -> dict[str, int]:
        shape = model_shape(self.sizes.loaded.model)
        return {item: self.sizes.facts(item, shape).read_bytes for item in self.items}


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
