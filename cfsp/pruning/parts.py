"""Blocks, attentions and key-value groups: which can go, and which the model misses least.

A part is judged by mean KL(dense || without it), nats per token, on the start of every calibration window. The cheapest
goes; then the cheapest of the first round are tried again without it, until enough are gone. Of groups, which are many,
half of what remains goes at once. What goes is repaired in cfsp/pruning/block_by_block.py.

- Blocks: the first stays, as nothing before it could make up for it. down_proj of the block before a gap is solved for
  what the gap added; ReplaceMe (arXiv 2505.02819) folds a linear map of the FFN's output into it instead.
- Attentions: such a block is x + ffn(norm(x)) and has no place in the cache (LLM-Drop, arXiv 2406.15786). The first
  block keeps its own, and so does the first of each kind if some have sliding windows: runtimes read the text's length
  from the first block's keys.
- Groups: a key-value head with the query heads that read it. Every block that attends keeps one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from cfsp.errors import InputError
from cfsp.models.architectures import attention_of, decoder_layers, model_shape, output_logits, spec_for
from cfsp.models.offload import Calls, computing, enter_blocks, leave_blocks, run_layer
from cfsp.precision import products_in
from cfsp.progress import Progress, no_progress
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.surgery import group_channels

PROBE_TOKENS = 128
"""Tokens of every window on which parts are judged. Of SmolLM2-135M, what one attention costs more than another differs
by 0.02 nats from window to window, however long these are: more windows say more, longer ones do not."""
PROBED = 4
"""Logits are compared at every fourth position: the output matrix costs as much as many blocks."""
_TRIED = 12
"""Parts of the first round that are tried again once some are gone: the cheapest."""


@dataclass(frozen=True)
class Removal:
    """Which blocks go, or lose their attention."""

    removed: tuple[int, ...]  # their indices in the dense model, ascending
    # per block the divergence without its part, nats per token; 0 if it was not tried. Of attentions it
    # includes the blocks that go.
    losses: tuple[float, ...]
    loss: float  # the divergence without all of `removed`, before any repair
    tokens: int  # tokens of the windows that this was measured on


@dataclass(frozen=True)
class Forecast:
    """The divergence without the channels that go at each of some ratios, nats per token, before any repair."""

    ratios: tuple[float, ...]
    losses: tuple[float, ...]
    tokens: int  # tokens of the windows that this was measured on

    def __post_init__(self) -> None:
        if len(self.ratios) != len(self.losses):
            raise InputError("not one for each ratio", field="losses", value=len(self.losses))

    def __str__(self) -> str:
        each = (f"{loss:.2f} at {ratio:.0%}" for ratio, loss in zip(self.ratios, self.losses, strict=True))
        return (
            f"Predicted KL, without the repair, on {self.tokens} calibration tokens: {', '.join(each)}. Repaired, "
            "SmolLM2-135M lost, at 10 to 40%, 0.8 to 1.2 times as much on text unlike the calibration's, 0.5 to 0.7 on "
            "text like it."
        )


@dataclass(frozen=True)
class GroupRemoval:
    """Which key-value groups stay.

    `kept` are ascending per block of the dense model, none in a block that goes or does not attend; `losses` are per
    block and group. The rest is as in `Removal`.
    """

    kept: tuple[tuple[int, ...], ...]
    losses: tuple[tuple[float, ...], ...]
    loss: float
    tokens: int

    def __post_init__(self) -> None:
        if len(self.kept) != len(self.losses):
            raise InputError("not one for each block", field="kept", value=len(self.kept))
        for kept, losses in zip(self.kept, self.losses, strict=True):
            if list(kept) != sorted(set(kept)) or not set(kept) <= set(range(len(losses))):
                raise InputError("no groups of the block, ascending", field="kept", value=kept)

    def __str__(self) -> str:
        """How many groups each block keeps."""
        return ", ".join(str(len(kept)) for kept in self.kept)

    @property
    def narrowed(self) -> dict[int, tuple[int, ...]]:
        """Blocks that lose some of their groups -> those that stay."""
        blocks = enumerate(zip(self.kept, self.losses, strict=True))
        return {index: kept for index, (kept, losses) in blocks if 0 < len(kept) < len(losses)}

    @property
    def removed(self) -> tuple[int, int]:
        """How many groups go, and of how many in the blocks that keep their attention."""
        total = sum(len(losses) for kept, losses in zip(self.kept, self.losses, strict=True) if kept)
        return total - sum(map(len, self.kept)), total


def removable_blocks(model: Any) -> list[int]:
    """All but the first, and the first that attends, from which libraries read the text's length."""
    if spec_for(model.config).blocks_stay:
        return []
    attending = [bool(attention_of(model, layer)) for layer in decoder_layers(model)]
    return [index for index in range(1, len(attending)) if index != attending.index(True)]


def removable_attentions(model: Any, gone: Set[int] = frozenset()) -> list[int]:
    """Blocks beside those `gone` whose attention can go: all but the first of each kind."""
    if spec_for(model.config).attentions_stay:
        return []
    layers = enumerate(decoder_layers(model))
    stay = [index for index, layer in layers if index not in gone and attention_of(model, layer)]
    kinds = getattr(model.config, "layer_types", None) or [""] * (max(stay) + 1)
    firsts = {kinds[index]: index for index in reversed(stay)}
    return [index for index in stay if index not in firsts.values()]


def removable_groups(model: Any, ratio: float, without: Set[int] = frozenset()) -> int:
    """How many groups a share is, of the attentions of all blocks but some.

    Raises InputError: it is none, or more than can go; or no group of such a model can go.
    """
    if reason := spec_for(model.config).groups_stay:
        raise InputError(f"{model.config.model_type}: {reason}", field="kv_groups", value=ratio)
    counts = [n for index, n in enumerate(_group_counts(model)) if n and index not in without]
    total = sum(counts)
    most, count = total - len(counts), round(ratio * total)
    if not 0 < count <= most:
        raise InputError(
            f"each of the {len(counts)} blocks that attend keeps one of its groups, {total} in all",
            field="kv_groups",
            value=ratio,
            allowed=f"{1 / total:.4g} to {most / total:.4g}" if most else "0",
        )
    return count


def _group_counts(model: Any) -> list[int]:
    return [block.kv_groups or 0 for block in model_shape(model).blocks]


def counted_removals(model: Any, settings: PruneSettings) -> PruneSettings:
    """Settings with numbers of blocks and attentions in place of shares; attentions are of the blocks that stay.

    Raises InputError: the model has fewer, or cannot lose any. Of groups beside other cuts only `choose_removals` can
    tell.
    """
    spec, shape = spec_for(model.config), model_shape(model)

    def count(amount: float, of: int, field: str, reason: str | None, candidates: list[int]) -> int:
        if not amount:
            return 0
        if amount >= 1 and amount != int(amount):
            raise InputError("neither a number nor a share", field=field, value=amount)
        count = int(amount) if amount >= 1 else round(amount * of)
        if not count:
            raise InputError(f"less than one of {of}", field=field, value=amount)
        if reason:
            raise InputError(reason, field=field, value=count, allowed="0")
        _check_count(candidates, count, field)
        return count

    total = len(shape.blocks)
    blocks = count(settings.blocks, total, "blocks", spec.blocks_stay, removable_blocks(model))
    attending = total - len(shape.without_attention) - blocks
    left = removable_attentions(model)[: total - blocks - 1]
    attentions = count(settings.attentions, attending, "attentions", spec.attentions_stay, left)
    if settings.kv_groups and not (blocks or attentions):
        removable_groups(model, settings.kv_groups)
    return replace(settings, blocks=blocks, attentions=attentions)


def _check_count(candidates: Sequence[int], count: int, field: str) -> None:
    if count > len(candidates):
        first = "the first block stays" if field == "blocks" else "the first block's attention stays"
        raise InputError(first, field=field, value=count, allowed=f"at most {len(candidates)}")


def choose_removals(
    model: Any, input_ids: torch.Tensor, settings: PruneSettings, *, progress: Progress = no_progress
) -> tuple[Removal | None, Removal | None, GroupRemoval | None]:
    """Choose the blocks that go, the attentions beside them, and the groups beside both; None of what all stays.

    Args:
        model: The dense model, in eval mode.
        input_ids: Calibration windows (nsamples, seqlen) int64.
        settings: Shares of blocks and attentions are counted.

    Raises:
        InputError: More than can go.
    """
    settings, depth, attention, groups = counted_removals(model, settings), None, None, None
    ids, layers = input_ids[:, :PROBE_TOKENS], decoder_layers(model)
    left_out: list[Callable[[], AbstractContextManager[None]]] = []

    def leave_out(how: Callable[[Any], AbstractContextManager[None]], removal: Removal) -> frozenset[int]:
        left_out.extend(partial(how, layers[index]) for index in removal.removed)
        return frozenset(removal.removed)

    gone = silent = frozenset[int]()
    with products_in(settings.dtype, model.device.type):
        if count := int(settings.blocks):
            told = partial(progress, "choosing blocks")
            depth = _choose(model, ids, removable_blocks(model), count, block_left_out, left_out, told)
            gone = leave_out(block_left_out, depth)
        if count := int(settings.attentions):
            _check_count(candidates := removable_attentions(model, gone), count, "attentions")
            told = partial(progress, "choosing attentions")
            attention = _choose(model, ids, candidates, count, attention_left_out, left_out, told)
            silent = leave_out(attention_left_out, attention)
        if ratio := settings.kv_groups:
            sizes, parts, out = (
                list(enumerate(_group_counts(model))),
                model_shape(model).most_kv_groups,
                gone | silent,
            )
            count = removable_groups(model, ratio, out)
            candidates = [parts * i + g for i, n in sizes for g in range(n) if n > 1 and i not in out]
            told = partial(progress, "choosing key-value groups")
            found = _choose(model, ids, candidates, count, group_left_out, left_out, told, parts)
            kept = (
                tuple(g for g in range(n) if i not in out and parts * i + g not in found.removed)
                for i, n in sizes
            )
            losses = (found.losses[parts * i : parts * i + n] for i, n in sizes)
            groups = GroupRemoval(tuple(kept), tuple(losses), found.loss, found.tokens)
    return depth, attention, groups


def _choose(
    model: Any,
    input_ids: torch.Tensor,
    candidates: Sequence[int],
    count: int,
    leave_out: Callable[[Any, int], AbstractContextManager[None]],
    left_out: Sequence[Callable[[], AbstractContextManager[None]]],
    progress: Callable[[int, int], None],
    parts: int = 1,
) -> Removal:
    """Choose `count` parts, a few at a time, each beside those that are gone and what is left out anyway.

    Part p of block l has the number l * parts + p. Of several parts a block keeps one.
    """
    layers = decoder_layers(model)

    def measured(tried: Sequence[int], removed: Sequence[int]) -> dict[int, float]:
        """The divergence without each of `tried`, beside `removed`."""
        sums = dict.fromkeys(tried, 0.0)

        def log_probabilities(calls: Calls, start: int, hidden: torch.Tensor) -> torch.Tensor:
            for index, layer in enumerate(layers[start:], start):
                hidden = run_layer(layer, hidden, calls.of(index))
            return output_logits(model, leave_blocks(model, hidden[..., ::PROBED, :])).log_softmax(-1)

        with torch.inference_mode():
            for window in torch.split(input_ids, 1):
                (hidden,), calls = enter_blocks(model, layers, window)
                expected = log_probabilities(calls, 0, hidden)
                with ExitStack() as stack:
                    for opened in left_out:
                        stack.enter_context(opened())
                    for part in removed:
                        stack.enter_context(leave_out(layers[part // parts], part % parts))
                    for index, layer in enumerate(layers):
                        for part in (part for part in sums if part // parts == index):
                            with leave_out(layer, part % parts):
                                without = run_layer(layer, hidden, calls.of(index))
                            actual = log_probabilities(calls, index + 1, without)
                            sums[part] += float((expected.exp() * (expected - actual)).sum(-1).mean())
                        hidden = run_layer(layer, hidden, calls.of(index))
        return {part: max(total / len(input_ids), 0.0) for part, total in sums.items()}

    def may_go(stay: Set[int]) -> list[int]:
        of_block = Counter(part // parts for part in stay)
        return [part for part in stay if parts == 1 or of_block[part // parts] > 1]

    alone = losses = measured(sorted(candidates), ())
    removed: list[int] = []
    while True:
        # The last goes by itself, so that the loss of all is measured.
        left, stay = count - len(removed), alone.keys() - set(removed)
        most, going = max(left // 2 if parts > 1 else 1, 1), list[int]()
        for part in sorted(losses, key=lambda part: (losses[part], part)):
            if len(going) < most and part in may_go(stay - set(going)):
                going.append(part)
        removed += going
        progress(len(removed), count)
        if len(removed) == count:
            each = tuple(alone.get(part, 0.0) for part in range(parts * len(layers)))
            return Removal(tuple(sorted(removed)), each, losses[removed[-1]], input_ids.numel())
        again = sorted(may_go(stay - set(going)), key=lambda part: (alone[part], part))
        losses = measured(again[: max(_TRIED, count - len(removed) if parts > 1 else 1)], removed)


def block_left_out(layer: nn.Module, part: int = 0) -> AbstractContextManager[None]:
    """A block returns its input while the context is open."""
    return computing([layer], lambda hidden_states, **arguments: hidden_states)


def attention_left_out(layer: Any, part: int = 0) -> AbstractContextManager[None]:
    """A block's attention adds nothing while the context is open."""
    return computing(
        [layer.self_attn], lambda hidden_states, **arguments: (torch.zeros_like(hidden_states), None)
    )


@contextmanager
def group_left_out(layer: Any, group: int) -> Iterator[None]:
    """A group of a block's attention adds nothing while the context is open."""
    attention = layer.self_attn
    channels = group_channels(attention, attention.o_proj.in_features, [group])
    with attention.o_proj.register_forward_pre_hook(lambda _, args: args[0].index_fill(-1, channels, 0)):
        yield
