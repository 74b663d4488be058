"""A transformers checkpoint as a `LanguageModel`."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from cfsp.errors import InputError
from cfsp.evaluation.language_model import Branches, Score, branch_scores, check_length, contains_any
from cfsp.models.architectures import output_logits, spec_for, windows_of_blocks
from cfsp.models.offload import at_hand, computing_dtype, is_paged, last_hidden_states
from cfsp.models.source import LoadedModel
from cfsp.text.self_sampling import generate, stop_ids

_log = logging.getLogger(__name__)
_CHUNK = 256
_BATCH_TOKENS = 2048
_GENERATION_BATCH = 32
_TOKENS_AHEAD = 2**14


def next_token_logits(model: Any, window: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """As `LanguageModel.next_token_logits`, in chunks: seqlen x vocab_size is never held."""
    yield from _logits_from_hidden(model, _last_hidden(model, window))


def _last_hidden(model: Any, window: torch.Tensor) -> torch.Tensor:
    """The decoder's last hidden states (seqlen, hidden_size) of a window."""
    ids = window[None].to(model.device)
    hidden: torch.Tensor = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
    return hidden


def _logits_from_hidden(model: Any, hidden: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    last = len(hidden) - 1
    for start in range(0, last, _CHUNK):
        stop = min(start + _CHUNK, last)
        yield slice(start + 1, stop + 1), output_logits(model, hidden[start:stop])


class BlocksAhead:
    """`next_token_logits` of a paged model for windows in turn: each block is read once for many of them."""

    def __init__(self, model: Any, windows: Sequence[torch.Tensor]) -> None:
        self._model, self._left = model, deque(windows)
        self._ready: deque[tuple[torch.Tensor, torch.Tensor]] = deque()

    @torch.inference_mode()
    def __call__(self, window: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        if not self._ready:
            windows: list[torch.Tensor] = []
            while self._left and sum(map(len, windows)) < _TOKENS_AHEAD:
                windows.append(self._left.popleft())
            by_length: dict[int, list[torch.Tensor]] = {}
            for one in windows:
                by_length.setdefault(len(one), []).append(one)
            states = {
                length: iter(last_hidden_states(self._model, torch.stack(alike), "running blocks"))
                for length, alike in by_length.items()
            }
            self._ready.extend((one, next(states[len(one)])[0]) for one in windows)
        asked, hidden = self._ready.popleft() if self._ready else (None, None)
        if asked is None or hidden is None or not torch.equal(asked, window):
            yield from next_token_logits(self._model, window)
            return
        with at_hand(self._model.get_output_embeddings()):
            yield from _logits_from_hidden(self._model, hidden)


class TorchLanguageModel:
    """A loaded model, run by torch.

    Continuations of one context share a row with it, each attending to the context and itself: the context is computed
    once, and the result is that of separate sequences.
    """

    runtime = "torch"
    gives_logits = True

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.name = loaded.source.reference
        self.sha256 = loaded.source.sha256
        self.source_sha256 = loaded.source.made_from
        self.cache_type: str | None = None
        self.tokenizer = loaded.tokenizer
        self.vocab_size = int(loaded.model.get_output_embeddings().weight.shape[0])
        self.context_length = int(getattr(loaded.model.config, "max_position_embeddings", None) or 2048)

    def close(self) -> None:
        """Nothing to let go: the loaded model belongs to the caller."""

    @torch.inference_mode()
    def next_token_logits(self, window: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """See `LanguageModel`."""
        yield from next_token_logits(self.loaded.model, window)

    @torch.inference_mode()
    def score(self, items: Sequence[Branches]) -> list[list[Score]]:
        """See `LanguageModel`; items of similar length share a batch."""
        if not all(item.context and all(item.continuations) for item in items):
            raise InputError("a context and a continuation need at least one token each")
        config = self.loaded.model.config
        # One mask serves all blocks: it knows no sliding windows, and convolutions ignore it.
        narrowest = min((window for window in windows_of_blocks(config) if window), default=math.inf)
        lengths = [item.n_tokens for item in items]
        scores: list[list[Score]] = [[] for _ in items]
        batches: list[list[int]] = []
        for index in sorted(range(len(items)), key=lengths.__getitem__, reverse=True):
            item = items[index]
            longest = len(item.context) + max(map(len, item.continuations), default=0) - 1
            if longest > narrowest or spec_for(config).sees_neighbours:
                scores[index] = list(branch_scores(item, self._apart(item)))
            elif batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= _BATCH_TOKENS:
                batches[-1].append(index)
            else:
                batches.append([index])
        for batch in batches:
            for index, item_scores in zip(batch, self._score_batch([items[i] for i in batch]), strict=True):
                scores[index] = item_scores
        return scores

    def _apart(self, item: Branches) -> torch.Tensor:
        """What `branch_scores` reads, from a row of its own for each continuation."""
        model, start = self.loaded.model, len(item.context)
        rows: list[torch.Tensor] = []
        for continuation in item.continuations:
            ids = torch.tensor([[*item.context, *continuation[:-1]]], device=model.device)
            hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, start - 1 :]
            rows.append(hidden[1 if rows else 0 :])
        return output_logits(model, torch.cat(rows)).log_softmax(-1).cpu()

    def _score_batch(self, items: Sequence[Branches]) -> Iterator[list[Score]]:
        width = max(item.n_tokens for item in items)
        ids = torch.zeros(len(items), width, dtype=torch.int64)
        positions = torch.zeros(len(items), width, dtype=torch.int64)
        allowed = torch.zeros(len(items), 1, width, width, dtype=torch.bool)
        for row, item in enumerate(items):
            _lay_out(item, ids[row], positions[row], allowed[row, 0])
        model = self.loaded.model
        dtype = computing_dtype(model)
        bias = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
        hidden = model.get_decoder()(
            input_ids=ids.to(model.device),
            attention_mask=bias.to(model.device),
            position_ids=positions.to(model.device),
            use_cache=False,
        ).last_hidden_state
        for row, item in enumerate(items):
            start = len(item.context)
            logits = output_logits(model, hidden[row, start - 1 : item.n_tokens])
            yield list(branch_scores(item, logits.log_softmax(-1).cpu()))

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, stop_strings: Sequence[str] = ()
    ) -> list[list[int]]:
        """See `LanguageModel`; prompts of similar length share a batch, padded on the left."""
        check_length(self, max(map(len, prompts), default=0), "a prompt")
        if is_paged(self.loaded.model):
            _log.warning("%s: for every token that is written all weights become float32", self.name)
        stops = stop_ids(self.loaded)
        greedy: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        extra = {"stop_strings": list(stop_strings), "tokenizer": self.tokenizer} if stop_strings else {}
        answers: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        for start in range(0, len(order), _GENERATION_BATCH):
            batch = order[start : start + _GENERATION_BATCH]
            rows = generate(self.loaded, [prompts[i] for i in batch], max_new_tokens, **greedy, **extra)
            for index, row in zip(batch, rows, strict=True):
                ids = row[:-1] if row and row[-1] in stops else row
                if contains_any(self.tokenizer, ids, stop_strings):
                    # Its shortest beginning with a stop string: the batch went on for the others.
                    beginnings = (ids[:end] for end in range(1, len(ids) + 1))
                    ids = next(one for one in beginnings if contains_any(self.tokenizer, one, stop_strings))
                answers[index] = ids
        return answers


def _lay_out(item: Branches, ids: torch.Tensor, positions: torch.Tensor, allowed: torch.Tensor) -> None:
    """Fill one row (width,) and its attention (width, width): the context, then each continuation but its end."""
    start = len(item.context)
    ids[:start] = torch.tensor(item.context)
    positions[:start] = torch.arange(start)
    allowed[:start, :start] = torch.ones(start, start, dtype=torch.bool).tril()
    place = start
    for continuation in item.continuations:
        length = len(continuation) - 1
        stop = place + length
        if length:
            ids[place:stop] = torch.tensor(continuation[:-1])
            positions[place:stop] = torch.arange(start, start + length)
            allowed[place:stop, :start] = True
            allowed[place:stop, place:stop] = torch.ones(length, length, dtype=torch.bool).tril()
        place = stop
    # Padding attends to itself, or its softmax would be over nothing.
    allowed[place:, place:] |= torch.eye(allowed.shape[0] - place, dtype=torch.bool)


class RememberedModel(TorchLanguageModel):
    """The dense model, run once over every window: its last hidden states are kept, which are smaller than logits."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded)
        self._hidden: dict[bytes, torch.Tensor] = {}

    @torch.inference_mode()
    def next_token_logits(self, window: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """See `LanguageModel`."""
        key, model = window.numpy().tobytes(), self.loaded.model
        if key not in self._hidden:
            self._hidden[key] = _last_hidden(model, window)
        yield from _logits_from_hidden(model, self._hidden[key])
