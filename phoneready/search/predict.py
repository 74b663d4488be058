"""What files take and lose before they are made: sizes by shapes, losses by what types and fewer tokens cost."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from cfsp.models.architectures import block_linears, model_shape
from cfsp.models.checkpoint import save_checkpoint
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
from exporters.quantize.mixture import Option, solve


class Losses(NamedTuple):
    """Nats a token: the divergence from the dense model, and what the text's likelihood loses."""

    kl: float
    nats: float


@dataclass
class Predictor:
    """What a mixture of types loses with fewer tokens.

        loss(n, S) = trim(n) + c quantized(n, S)

    `quantized` is the knapsack's own sum of what types cost the tensors of the dense model, whose tables have n rows
    here; `trim` is measured of trimmed models in float32, and a power of n between them. Both are nats a token. c is
    what files that were made have lost of their own, over that sum: 1 before any is made.
    """

    options: Mapping[str, Sequence[Option[str]]]  # of the dense model: tensor -> types, the smallest first
    vocabulary: int  # tokens of the dense model
    overhead: Callable[[int], int]  # tokens -> bytes of a file that are no quantized tensor
    trimmed: dict[int, Losses] = field(default_factory=dict)  # tokens -> what fewer cost
    ratios: list[float] = field(default_factory=list)
    _known: dict[tuple[int, int], float | None] = field(default_factory=dict)

    def quantized(self, tokens: int, n_bytes: int) -> float | None:
        """Nats a token; None if no types are so small."""
        if (tokens, n_bytes) not in self._known:
            share, left = tokens / self.vocabulary, n_bytes - self.overhead(tokens)
            options = {
                name: [one._replace(n_bytes=int(one.n_bytes * share)) for one in each]
                if name in _TABLES
                else each
                for name, each in self.options.items()
            }
            fits = sum(each[0].n_bytes for each in options.values()) <= left
            lost = sum(one.loss for one in solve(options, left, _STEPS).values()) if fits else None
            self._known[tokens, n_bytes] = lost
        return self._known[tokens, n_bytes]

    def predict(self, tokens: int, n_bytes: int) -> Losses | None:
        """What a file loses; None if there is none so small."""
        found, trim = self.quantized(tokens, n_bytes), self.trim(tokens)
        if found is None:
            return None
        lost = found * (fmean(self.ratios) if self.ratios else 1.0)
        return Losses(trim.kl + lost, trim.nats + lost)

    def learn(self, tokens: int, n_bytes: int, kl: float) -> None:
        """What a file has lost that was made."""
        if found := self.quantized(tokens, n_bytes):
            self.ratios.append(max(kl - self.trim(tokens).kl, 0.1 * kl) / found)

    def trim(self, tokens: int) -> Losses:
        """What fewer tokens cost; beyond what was measured along the nearest line."""
        if tokens >= self.vocabulary or not self.trimmed:
            return Losses(0.0, 0.0)
        first, *more = sorted(self.trimmed, key=lambda one: abs(math.log(one / tokens)))
        found = []
        for a, b in zip(self.trimmed[first], self.trimmed[more[0]] if more else (1.0, 1.0), strict=True):
            a, b = max(a, 1e-6), max(b, 1e-6)
            power = math.log(b / a) / math.log(more[0] / first) if more else -1.5
            found.append(a * (tokens / first) ** power)
        return Losses(*found)


_STEPS = 4096
"""Of the knapsack: on SmolLM2-135M the sum is within 0.4 % of that with 65,536, in a twentieth of the time."""
_TABLES = frozenset({"token_embd.weight", "output.weight"})
"""Tensors with a row for each token."""
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

        A file of a dense model carries no plan's hash.
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

    def rest_bytes(self, shape: ModelShape, vocabulary: VocabularyPlan | None) -> int:
        """Bytes of a mixture that are no quantized tensor."""
        shape = shape if vocabulary is None else replace(shape, vocab_size=len(vocabulary.kept))
        layout, template = self._template("Q8_0", shape, vocabulary, dense=vocabulary is None)
        chosen, total = layout.of_shape(shape), template.overhead_bytes
        pairs = zip(tensor_specs(chosen), template.tensors(chosen), strict=True)
        return total + sum(padded(tensor.n_bytes) for spec, tensor in pairs if not spec.is_matrix)

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
        options = ExportOptions(n_threads=self._n_threads)
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
