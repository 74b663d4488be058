"""A transformers checkpoint as a `LanguageModel`."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from cfsp.errors import InputError
from cfsp.evaluation.language_model import Branches, Score, branch_scores, check_length, contains_any
from cfsp.models.architectures import output_logits
from cfsp.models.offload import at_hand, is_paged, last_hidden_states
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
    """A loaded model, run by torch."""

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
        """See `LanguageModel`; each continuation is a row behind its context, and rows of about one length a batch."""
        if not all(item.context and all(item.continuations) for item in items):
            raise InputError("a context and a continuation need at least one token each")
        model = self.loaded.model
        rows = [(place, item.context, ids) for place, item in enumerate(items) for ids in item.continuations]
        scores: dict[int, Score] = {}
        left = sorted(range(len(rows)), key=lambda n: len(rows[n][1]) + len(rows[n][2]), reverse=True)
        most = _TOKENS_AHEAD if is_paged(model) else _BATCH_TOKENS
        while left:
            _, context, continuation = rows[left[0]]
            width = len(context) + len(continuation) - 1
            batch, left = left[: max(1, most // width)], left[max(1, most // width) :]
            ids = torch.zeros(len(batch), width, dtype=torch.int64)
            for row, n in zip(ids, batch, strict=True):  # what comes behind a text changes nothing before
                text = (*rows[n][1], *rows[n][2][:-1])
                row[: len(text)] = torch.tensor(text)
            hidden = model.get_decoder()(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
            for states, n in zip(hidden, batch, strict=True):
                _, context, continuation = rows[n]
                start = len(context) - 1
                logits = output_logits(model, states[start : start + len(continuation)])
                one = Branches(context, (continuation,))
                (scores[n],) = branch_scores(one, logits.log_softmax(-1).cpu())
        found: list[list[Score]] = [[] for _ in items]
        for n, (place, *_) in enumerate(rows):
            found[place].append(scores[n])
        return found

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
