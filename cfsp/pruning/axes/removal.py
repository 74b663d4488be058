"""What the model misses least: parts of it are left out one at a time, and the divergence says which goes.

A part's worth is measured as mean KL(dense || without it), nats a token, on a few calibration windows. The cheapest
goes; then those that were cheapest alone are tried again, beside what is gone, until enough has gone. Of parts that
are many, half of what is still to go goes at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cfsp.models.architectures import decoder_layers, output_logits
from cfsp.models.block_pass import Calls, computing, enter_blocks, leave_blocks, run_layer
from cfsp.processes import mine, number_summed
from cfsp.progress import Progress, no_progress

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
        """Choose the parts that go, a few at a time, each beside those that are gone.

        Args:
            candidates: Numbers of parts.
            count: How many go.
            progress: Told after each choice.
            what: Is chosen, in words.
        """
        alone = losses = self._losses(sorted(candidates), ())
        removed: list[int] = []
        while True:
            left = count - len(removed)
            # One goes last, so that the loss of all is measured.
            removed += self._cheapest(losses, alone.keys() - set(removed), left // 2 if self.parts > 1 else 1)
            progress(f"choosing {what}", len(removed), count)
            if len(removed) == count:
                return self._removal(removed, alone, losses[removed[-1]])
            stay = alone.keys() - set(removed)
            again = sorted(self._may_go(stay), key=lambda part: (alone[part], part))
            tried = max(_TRIED, count - len(removed) if self.parts > 1 else 1)
            losses = self._losses(again[:tried], removed)

    def in_order(
        self, candidates: Iterable[int], counts: Iterable[int], *, progress: Progress = no_progress, what: str
    ) -> Iterator[Removal]:
        """Of every count so many parts that are cheapest alone, and what they cost together.

        Args:
            candidates: Numbers of parts.
            counts: Ascending.
            progress: Told of each.
            what: Goes, in words.
        """
        alone = self._losses(sorted(candidates), ())
        for count in counts:
            removed = self._cheapest(alone, alone.keys(), count)
            together = (
                self._losses(removed[-1:], removed[:-1])[removed[-1]] if count > 1 else alone[removed[0]]
            )
            progress(f"without {what}", count, len(alone))
            yield self._removal(removed, alone, together)

    def _removal(self, removed: Iterable[int], alone: Mapping[int, float], loss: float) -> Removal:
        every = range(self.parts * len(decoder_layers(self.model)))
        losses = tuple(alone.get(part, 0.0) for part in every)
        return Removal(tuple(sorted(removed)), losses, loss, self.input_ids.numel())

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
        with torch.inference_mode():
            for window in torch.split(windows := mine(self.input_ids), 1):
                (hidden,), calls = enter_blocks(self.model, layers, window)
                expected = self._log_probabilities(_run(layers, calls, 0, hidden))
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
                            actual = self._log_probabilities(_run(layers, calls, index + 1, without))
                            sums[part] += float((expected.exp() * (expected - actual)).sum(-1).mean())
                        hidden = run_layer(layer, hidden, calls.of(index))
        n_windows = number_summed(len(windows))
        return {part: max(number_summed(total) / n_windows, 0.0) for part, total in sums.items()}

    def _log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        return output_logits(self.model, leave_blocks(self.model, hidden[..., ::_EVERY, :])).log_softmax(-1)


def block_left_out(layer: nn.Module, part: int = 0) -> AbstractContextManager[None]:
    """A block, which is one part, hands on what it gets while the context is open."""
    return computing([layer], lambda hidden_states, **arguments: hidden_states)


def attention_left_out(layer: Any, part: int = 0) -> AbstractContextManager[None]:
    """A block's attention, which is one part, adds nothing while the context is open."""
    return computing(
        [layer.self_attn], lambda hidden_states, **arguments: (torch.zeros_like(hidden_states), None)
    )


def _run(layers: Sequence[nn.Module], calls: Calls, start: int, hidden: torch.Tensor) -> torch.Tensor:
    for index, layer in enumerate(layers[start:], start):
        hidden = run_layer(layer, hidden, calls.of(index))
    return hidden
