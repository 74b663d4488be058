"""A type for each tensor, by what rounding it costs, so that the file has a size: `mixed:SIZE`.

One backward pass over calibration text says what a change of each weight costs
(`rounding.gradients.collect_weight_moments`), and ggml's own rounding of some rows in every type says what changes.
Loss and bytes of all tensors are then a knapsack with one choice a tensor, which dynamic programming solves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cfsp.devices import exact, moved
from cfsp.errors import InputError
from cfsp.models.checkpoint import open_pruned
from cfsp.models.gguf_file import read_gguf
from cfsp.models.offload import WHOLE, Keeping
from cfsp.progress import Progress, no_progress
from exporters.gguf.architecture import read_layout
from exporters.gguf.fallbacks import block_of
from exporters.gguf.imatrix import Imatrix, floored
from exporters.gguf.llama_library import FloatArray, rounded
from exporters.gguf.size import padded
from exporters.gguf.tensors import TensorSpec, tensor_specs
from exporters.quantize.gradients import LOOKUP, WeightMoments, collect_weight_moments

GUIDED_TYPES = ("IQ3_S", "IQ3_XXS", "IQ2_S")
"""Of no use without an importance matrix."""
TYPES = (
    *("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_1", "Q4_K", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K", "Q2_K"),
    *GUIDED_TYPES,
)
GRADIENT_WINDOWS = 4
_ROWS, _TABLE_ROWS = 64, 512
"""Of a matrix, and of a table of tokens, that are rounded to see what a type costs it. Of SmolLM2-135M's matrices 64
drawn rows know what all of them cost to 2 to 7 %, by type (root mean square); 128 that matter most knew it to 15 %."""
_SLOW = {"IQ2_S": "IQ3_S"}
"""Types of which ggml rounds few weights in the time that all others take, and one that costs rows alike: some rows
tell how much more a slow one costs."""
_FEW_ROWS, _ROWS_AT_ONCE = 16, 8192
_HEAD, _TABLE = "lm_head", "model.embed_tokens"
_STEPS = 2**16


@dataclass(frozen=True)
class _Part:
    """Some rows of a module's weight, (n, columns of the file) float32, and what changes of all rows cost.

    Attributes:
        weights: What `moments.rows` has of each of them and of those that it stands for, (n,) float64.
    """

    moments: WeightMoments
    weights: torch.Tensor
    values: FloatArray

    def costs(self, kinds: Iterable[str], importance: FloatArray | None) -> dict[str, float]:
        """Nats a token that each type costs, in an order in which the likes of slow ones come before them."""
        of_rows: dict[str, torch.Tensor] = {}
        totals: dict[str, float] = {}
        step = -(-len(self.values) // _FEW_ROWS)
        for kind in kinds:
            like = _SLOW.get(kind)
            if like is None:
                of_rows[kind] = self._of_rows(kind, importance)
                totals[kind] = float(of_rows[kind].sum())
            else:
                some, known = self._of_rows(kind, importance, step), of_rows[like][::step].sum()
                totals[kind] = float(some.sum() * totals[like] / known) if known else 0.0
        return totals

    def _of_rows(self, kind: str, importance: FloatArray | None, step: int = 1) -> torch.Tensor:
        """What a type costs, by rows, of which one in `step` is taken, (n,) float64."""
        values = self.values[::step]
        change = torch.from_numpy(rounded(values, kind, importance) - values)
        return self.moments.cost(change[:, : len(self.moments.columns)], self.weights[::step])


@dataclass(frozen=True)
class Option:
    """A type that a tensor may have.

    Attributes:
        kind: ggml's name.
        n_bytes: In the file.
        loss: Nats a token, predicted.
    """

    kind: str
    n_bytes: int
    loss: float


@dataclass(frozen=True)
class Mixture:
    """What was chosen.

    Attributes:
        types: Tensor -> ggml type, of all that are quantized.
        loss: Nats a token, predicted.
        file_bytes: Size of the file.
    """

    types: dict[str, str]
    loss: float
    file_bytes: int


@dataclass(frozen=True)
class TypeCosts:
    """What each type costs each tensor.

    Attributes:
        options: Tensor -> the types that it may have, the smallest first.
        imatrix: What they are rounded by.
        rest_bytes: All else that is in the file.
    """

    options: Mapping[str, Sequence[Option]]
    imatrix: Imatrix
    rest_bytes: int

    def choose(self, budget_bytes: int, *, must_fit: bool = True) -> Mixture:
        """Types with which a file takes no more than a size.

        Args:
            budget_bytes: Of the whole file.
            must_fit: Whether a size that is too small is an error; the smallest types are taken where not.

        Raises:
            InputError: No types are small enough; the message says what the smallest file takes.
        """
        least = self.rest_bytes + sum(each[0].n_bytes for each in self.options.values())
        if least > budget_bytes and must_fit:
            raise InputError(
                "no types are small enough for the size",
                field="mixed",
                value=budget_bytes,
                allowed=f"{least} bytes or more",
            )
        chosen = solve(self.options, max(budget_bytes, least) - self.rest_bytes)
        return Mixture(
            {name: option.kind for name, option in chosen.items()},
            sum(option.loss for option in chosen.values()),
            self.rest_bytes + sum(option.n_bytes for option in chosen.values()),
        )


def measure_types(
    checkpoint: Path,
    base: Path,
    input_ids: torch.Tensor,
    imatrix: Imatrix | None,
    *,
    device: str = "cpu",
    keeping: Keeping = WHOLE,
    progress: Progress = no_progress,
) -> TypeCosts:
    """Round some rows of every tensor in every type, and predict what that costs.

    Args:
        checkpoint: Hugging Face folder.
        base: The unquantized file of it.
        input_ids: Calibration text, (nsamples, seqlen).
        imatrix: The checkpoint's, which goes before what the text's few windows say; None to use none at all.
        device: Where gradients are computed.
        keeping: How the model's weights are kept.
        progress: Told about every step.
    """
    chosen = read_layout(checkpoint)
    specs = [spec for spec in tensor_specs(chosen) if spec.is_matrix]
    model = open_pruned(checkpoint, keeping=keeping if device == "cpu" else WHOLE)
    modules = {spec.name: _modules(spec, chosen.config.tie_word_embeddings) for spec in specs}
    names = [name for of_tensor in modules.values() for name in of_tensor]
    with moved(model, device):
        moments = collect_weight_moments(model, names, input_ids[:GRADIENT_WINDOWS], progress=progress)
    weights: Imatrix = {}
    if imatrix is not None:
        weights = {spec.name: _importance(spec, moments[modules[spec.name][0]]) for spec in specs} | dict(
            imatrix
        )
    options: dict[str, Sequence[Option]] = {}
    for done, spec in enumerate(specs, 1):
        parts = [_part(model, spec, name, moments[name]) for name in modules[spec.name]]
        each = _options(spec, parts, weights.get(spec.name))
        options[spec.name] = sorted(each, key=lambda option: option.n_bytes)
        progress("measuring types", done, len(specs))
    matrices = {spec.name for spec in specs}
    stored = [len(tensor.data) for tensor in read_gguf(base).tensors if tensor.name in matrices]
    rest = base.stat().st_size - sum(map(padded, stored))
    return TypeCosts(options, weights, rest)


def solve(options: Mapping[str, Sequence[Option]], left_bytes: int) -> dict[str, Option]:
    """One option for each name with the least loss in all that fits; of equal ones the first.

    Sizes are in steps of 1/65536 of what is to be shared out beyond the smallest, rounded up.

    Args:
        options: Name -> what it may have.
        left_bytes: For all, at least what the smallest take.
    """
    least = {name: min(option.n_bytes for option in each) for name, each in options.items()}
    spare = left_bytes - sum(least.values())
    step = max(1, spare // _STEPS)
    best = np.zeros(spare // step + 1)  # least loss of the names so far, by the steps that they may take
    picks = []
    for name, each in options.items():
        steps = [-(-(option.n_bytes - least[name]) // step) for option in each]
        tried = np.full((len(each), len(best)), np.inf)
        for row, cost, option in zip(tried, steps, each, strict=True):
            if cost < len(best):
                row[cost:] = best[: len(best) - cost] + option.loss
        pick = tried.argmin(0)
        best = tried[pick, np.arange(len(best))]
        picks.append((name, pick.astype(np.int8), steps))
    place, chosen = len(best) - 1, {}
    for name, pick, steps in reversed(picks):
        chosen[name] = options[name][pick[place]]
        place -= steps[pick[place]]
    return dict(reversed(chosen.items()))


def drawn_rows(sizes: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that stand for all in a sum over rows which is known of few.

    Rows are drawn at even steps of the running sum of sizes, the largest first: systematic sampling with probability
    proportional to size (Madow 1949). The more a row's part in the sum is as its size says, the less the sum is off.

    Args:
        sizes: Not negative, (n,) float64.
        count: Draws. With no more rows than that each stands for itself.

    Returns:
        Rows, each once, (m,) int64, and the factors with which theirs sum up to all rows' parts, (m,) float64.
    """
    if count >= len(sizes):
        return torch.arange(len(sizes)), torch.ones_like(sizes)
    least = torch.finfo(sizes.dtype).tiny
    total = sizes.sum().clamp_min(least)
    order = sizes.argsort(descending=True, stable=True)
    steps = (torch.arange(count, dtype=sizes.dtype) + 0.5) / count
    draws = torch.searchsorted(sizes[order].cumsum(0) / total, steps).clamp_max(len(sizes) - 1)
    rows, times = torch.unique_consecutive(order[draws], return_counts=True)
    return rows, times / count * total / sizes[rows].clamp_min(least)


def _sizes(weight: torch.Tensor, moments: WeightMoments) -> torch.Tensor:
    """About what rounding each row of a weight costs beside others, (rows,) float64.

    rows_i (1 + u_i / mean(u) + v_i / mean(v)), u_i = sum_j W_ij^2 and v_i = sum_j W_ij^2 columns_j: some types lose
    what is as large as the numbers, some more where inputs are huge.
    """
    columns = moments.columns.float()
    kinds = torch.stack([torch.ones_like(columns), columns], 1)
    squares = exact(torch.cat([part.float().square() @ kinds for part in torch.split(weight, _ROWS_AT_ONCE)]))
    relative = squares / squares.mean(0).clamp_min(torch.finfo(squares.dtype).tiny)
    return moments.rows * (1 + relative.sum(1))


def _modules(spec: TensorSpec, tied: bool) -> tuple[str, ...]:
    """The modules that read a tensor, as `collect_weight_moments` names them."""
    names = [name.removesuffix(".weight") for name, _ in spec.sources]
    if names == [_TABLE]:
        return (_HEAD, LOOKUP) if tied else (LOOKUP,)
    return tuple(names)


def _importance(spec: TensorSpec, moments: WeightMoments) -> FloatArray:
    values = spec.of_inputs(moments.inputs.float().numpy())
    values = np.pad(values, (0, spec.shape[1] - len(values)))
    return floored(values)


def _part(model: Any, spec: TensorSpec, name: str, moments: WeightMoments) -> _Part:
    """Some rows of a module's weight, as wide as they are in the file."""
    module = model.get_submodule(_TABLE if name == LOOKUP else name)
    weight = module.weight.detach()
    is_table = name in (_HEAD, LOOKUP) or isinstance(module, nn.Embedding)
    rows, factors = drawn_rows(_sizes(weight, moments), _TABLE_ROWS if is_table else _ROWS)
    values = spec.of_inputs(weight[rows].float().numpy())
    in_file = replace(moments, columns=torch.from_numpy(spec.of_inputs(moments.columns.numpy())))
    values = np.pad(values, ((0, 0), (0, spec.shape[1] - values.shape[1])))
    return _Part(in_file, moments.rows[rows] * factors, values)


def _options(spec: TensorSpec, parts: Sequence[_Part], importance: FloatArray | None) -> Iterator[Option]:
    kinds = [
        kind
        for kind in TYPES
        if spec.shape[1] % block_of(kind)[0] == 0 and (kind not in GUIDED_TYPES or importance is not None)
    ]
    costs = [part.costs(kinds, importance) for part in parts]
    for kind in kinds or ["F16"]:
        elements, size = block_of(kind)
        n_bytes = padded(math.prod(spec.shape) // elements * size)
        yield Option(kind, n_bytes, sum(one[kind] for one in costs) if kinds else 0.0)
