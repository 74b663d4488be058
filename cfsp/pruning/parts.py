"""Parts that go whole: blocks, attentions and key-value groups. Which are there, and which the model misses least.

A part's worth is measured as mean KL(dense || without it), nats a token, on the start of every calibration window. The
cheapest goes; then those that were cheapest alone are tried again, beside what is gone, until enough has gone. Of parts
that are many, half of what is still to go goes at once. What goes is made up for by the weights that stay
(cfsp/pruning/block_by_block.py).

- Blocks: the first stays, as nothing before it could make up for it. down_proj of the block before those that go is
  solved for what they added. ReplaceMe (arXiv 2505.02819) folds a linear map of the FFN's output into it; solved for
  down_proj itself the change may be any matrix.
- Attentions: a block without is x + ffn(norm(x)), with no place in the cache, and its own down_proj is solved anew.
  Half of a large model's attentions add little (LLM-Drop, arXiv 2406.15786). The first block keeps its own, and so does
  the first of each kind if some have sliding windows: runtimes read the text's length from the first block's keys.
- Key-value groups: a key-value head with the query heads that read it. One stays in every block that attends, and its
  o_proj is solved anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cfsp.errors import InputError
from cfsp.models.architectures import attention_of, decoder_layers, model_shape, output_logits, spec_for
from cfsp.models.block_pass import Calls, computing, enter_blocks, leave_blocks, run_layer
from cfsp.progress import Progress, no_progress
from cfsp.pruning.surgery import group_channels

_EVERY = 4
"""Logits are compared at every fourth position: the output matrix costs as much as many blocks."""
_TRIED = 12
"""Parts that are tried again once some are gone: the cheapest of the first round."""


@dataclass(frozen=True)
class Removal:
    """Which blocks lose a part, or go whole, and what that is worth.

    Attributes:
        removed: Indices of the blocks in the dense model, ascending; of parts of them, as `Probe` numbers these.
        losses: Per block of the dense model the divergence where its part alone is left out, nats a token; 0 where it
            was not tried. Of attentions it counts the blocks that go as well.
        loss: The same where all of `removed` are left out and nothing makes up for them.
        tokens: Tokens of the windows that this was measured on.
    """

    removed: tuple[int, ...]
    losses: tuple[float, ...]
    loss: float
    tokens: int


@dataclass(frozen=True)
class GroupRemoval:
    """Which key-value groups stay, and what each is worth.

    Attributes:
        kept: Per block of the dense model the groups that stay, ascending; none where it goes or does not attend.
        losses: Per block and group the divergence where it alone is left out, beside the blocks and attentions that
            go, nats a token; 0 where it was not tried.
        loss: The same where all that go are left out and nothing makes up for them.
        tokens: Tokens of the windows that this was measured on.
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
        """How many groups each block of the dense model keeps."""
        return ", ".join(str(len(kept)) for kept in self.kept)

    @property
    def narrowed(self) -> dict[int, tuple[int, ...]]:
        """Blocks that lose some of their groups -> those that stay."""
        blocks = enumerate(zip(self.kept, self.losses, strict=True))
        return {index: kept for index, (kept, losses) in blocks if 0 < len(kept) < len(losses)}

    @property
    def removed(self) -> tuple[int, int]:
        """How many groups go, and of how many that the blocks have which keep their attention."""
        total = sum(len(losses) for kept, losses in zip(self.kept, self.losses, strict=True) if kept)
        return total - sum(map(len, self.kept)), total


def candidate_blocks(model: Any) -> list[int]:
    """Blocks that may go: all but the first, and the first that attends, from which libraries tell a text's length."""
    if spec_for(model.config).blocks_stay:
        return []
    attending = [bool(attention_of(model, layer)) for layer in decoder_layers(model)]
    return [index for index in range(1, len(attending)) if index != attending.index(True)]


def removable_blocks(model: Any, count: int) -> list[int]:
    """Those of which so many may go; raises InputError if there are not so many."""
    candidates = candidate_blocks(model)
    if reason := spec_for(model.config).blocks_stay:
        raise InputError(reason, field="blocks", value=count, allowed="0")
    if not 0 < count <= len(candidates):
        allowed = f"at most {len(candidates)}"
        raise InputError("the first block stays", field="blocks", value=count, allowed=allowed)
    return candidates


def removable_attentions(model: Any, gone: frozenset[int]) -> list[int]:
    """Blocks that can do without their attention: all that stay and have one, but the first of each kind."""
    if spec_for(model.config).attentions_stay:
        return []
    layers = enumerate(decoder_layers(model))
    stay = [index for index, layer in layers if index not in gone and attention_of(model, layer)]
    kinds = getattr(model.config, "layer_types", None) or [""] * (max(stay) + 1)
    firsts = {kinds[index]: index for index in reversed(stay)}
    return [index for index in stay if index not in firsts.values()]


def check_attentions(candidates: Sequence[int], count: int) -> None:
    """Raise InputError if not so many of the candidates can go."""
    if not 0 < count <= len(candidates):
        allowed = f"at most {len(candidates)}"
        raise InputError(
            "the first block's attention stays", field="attentions", value=count, allowed=allowed
        )


def removable_groups(model: Any) -> list[int]:
    """Groups of blocks that have several, numbered as a `Probe` does; none where one norm sees all heads."""
    if spec_for(model.config).groups_stay:
        return []
    parts = model_shape(model).most_kv_groups
    return [parts * index + g for index, n in enumerate(_group_counts(model)) if n > 1 for g in range(n)]


def removable_count(model: Any, ratio: float, without: frozenset[int] = frozenset()) -> int:
    """How many groups a share is of the attentions of all blocks but some.

    Raises:
        InputError: It is none, or more than can go; or no group of such a model can go.
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


def plan_blocks(
    model: Any, input_ids: torch.Tensor, count: int, *, progress: Progress = no_progress
) -> Removal:
    """Choose the blocks to remove, by windows (n_windows, seqlen) int64; InputError: more than can go."""
    candidates = removable_blocks(model, count)
    return Probe(model, input_ids, block_left_out).choose(candidates, count, progress=progress, what="blocks")


def plan_attentions(
    model: Any,
    input_ids: torch.Tensor,
    count: int,
    gone: frozenset[int] = frozenset(),
    *,
    progress: Progress = no_progress,
) -> Removal:
    """Choose the blocks that lose their attention, beside blocks that go; as `plan_blocks`."""
    candidates = removable_attentions(model, gone)
    check_attentions(candidates, count)
    probe = Probe(model, input_ids, attention_left_out, gone)
    return probe.choose(candidates, count, progress=progress, what="attentions")


def plan_kv_groups(
    model: Any,
    input_ids: torch.Tensor,
    ratio: float,
    *,
    gone: frozenset[int] = frozenset(),
    silent: frozenset[int] = frozenset(),
    progress: Progress = no_progress,
) -> GroupRemoval:
    """Choose the groups to remove, over all blocks that stay and keep their attention; as `plan_blocks`."""
    parts, out = model_shape(model).most_kv_groups, gone | silent
    count = removable_count(model, ratio, out)
    candidates = [part for part in removable_groups(model) if part // parts not in out]
    probe = Probe(model, input_ids, group_left_out, gone, silent, parts)
    found = probe.choose(candidates, count, progress=progress, what="key-value groups")
    counts = list(enumerate(_group_counts(model)))
    kept = (
        tuple(g for g in range(n) if index not in out and parts * index + g not in found.removed)
        for index, n in counts
    )
    losses = (found.losses[parts * index : parts * index + n] for index, n in counts)
    return GroupRemoval(tuple(kept), tuple(losses), found.loss, found.tokens)


@dataclass(frozen=True)
class Probe:
    """A model, and the text on which it is tried without a part.

    Part p of block l has the number l * parts + p. Where blocks have several, each keeps one.

    Attributes:
        model: The dense model, in eval mode.
        input_ids: Windows (n_windows, seqlen) int64.
        leave_out: Context in which a block lacks the part of a number.
        gone: Blocks that are left out whole besides.
        silent: Blocks whose attention is left out besides.
        parts: Most that a block has.
    """

    model: Any
    input_ids: torch.Tensor
    leave_out: Callable[[nn.Module, int], AbstractContextManager[None]]
    gone: frozenset[int] = frozenset()
    silent: frozenset[int] = frozenset()
    parts: int = 1

    def choose(
        self, candidates: Iterable[int], count: int, *, progress: Progress = no_progress, what: str
    ) -> Removal:
        """Choose the parts that go, a few at a time, each beside those that are gone; `what` is for `progress`."""
        alone = losses = self._losses(sorted(candidates), ())
        removed: list[int] = []
        while True:
            left = count - len(removed)
            # One goes last, so that the loss of all is measured.
            removed += self._cheapest(losses, alone.keys() - set(removed), left // 2 if self.parts > 1 else 1)
            progress(f"choosing {what}", len(removed), count)
            if len(removed) == count:
                every = range(self.parts * len(decoder_layers(self.model)))
                each = tuple(alone.get(part, 0.0) for part in every)
                return Removal(tuple(sorted(removed)), each, losses[removed[-1]], self.input_ids.numel())
            stay = alone.keys() - set(removed)
            again = sorted(self._may_go(stay), key=lambda part: (alone[part], part))
            tried = max(_TRIED, count - len(removed) if self.parts > 1 else 1)
            losses = self._losses(again[:tried], removed)

    def _cheapest(self, losses: Mapping[int, float], stay: Set[int], most: int) -> list[int]:
        """At least one part, at most `most`, in the order of their losses; each may go once those before it have."""
        going: list[int] = []
        for part in sorted(losses, key=lambda part: (losses[part], part)):
            if len(going) < max(most, 1) and part in self._may_go(stay - set(going)):
                going.append(part)
        return going

    def _may_go(self, stay: Set[int]) -> list[int]:
        """Those of the parts that stay which are not their block's last of several."""
        count = Counter(part // self.parts for part in stay)
        return [part for part in stay if self.parts == 1 or count[part // self.parts] > 1]

    def _losses(self, candidates: Sequence[int], removed: Sequence[int]) -> dict[int, float]:
        """The divergence for every candidate left out beside `removed`."""
        layers, parts = decoder_layers(self.model), self.parts
        sums = dict.fromkeys(candidates, 0.0)

        def log_probabilities(calls: Calls, start: int, hidden: torch.Tensor) -> torch.Tensor:
            for index, layer in enumerate(layers[start:], start):
                hidden = run_layer(layer, hidden, calls.of(index))
            ending = leave_blocks(self.model, hidden[..., ::_EVERY, :])
            return output_logits(self.model, ending).log_softmax(-1)

        with torch.inference_mode():
            for window in torch.split(self.input_ids, 1):
                (hidden,), calls = enter_blocks(self.model, layers, window)
                expected = log_probabilities(calls, 0, hidden)
                with ExitStack() as stack:
                    for index in self.gone:
                        stack.enter_context(block_left_out(layers[index]))
                    for index in self.silent:
                        stack.enter_context(attention_left_out(layers[index]))
                    for part in removed:
                        stack.enter_context(self.leave_out(layers[part // parts], part % parts))
                    for index, layer in enumerate(layers):
                        for part in (part for part in sums if part // parts == index):
                            with self.leave_out(layer, part % parts):
                                without = run_layer(layer, hidden, calls.of(index))
                            actual = log_probabilities(calls, index + 1, without)
                            sums[part] += float((expected.exp() * (expected - actual)).sum(-1).mean())
                        hidden = run_layer(layer, hidden, calls.of(index))
        return {part: max(total / len(self.input_ids), 0.0) for part, total in sums.items()}


def block_left_out(layer: nn.Module, part: int = 0) -> AbstractContextManager[None]:
    """A block, which is one part, hands on what it gets while the context is open."""
    return computing([layer], lambda hidden_states, **arguments: hidden_states)


def attention_left_out(layer: Any, part: int = 0) -> AbstractContextManager[None]:
    """A block's attention, which is one part, adds nothing while the context is open."""
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
