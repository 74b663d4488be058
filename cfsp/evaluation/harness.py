"""Any `LanguageModel` as a model of lm-evaluation-harness.

Requests with the same context (the choices of one question) are scored together, so the context is computed once.
Tokens are made as the harness's own transformers model makes them, and longer requests are cut on the left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cfsp.errors import InputError, MissingExtraError
from cfsp.evaluation.language_model import Branches, LanguageModel, Score
from cfsp.progress import Progress, no_progress
from cfsp.text.encoding import encode
from cfsp.text.templates import render_chat

MAX_CONTEXT = 2048
"""Most tokens of a request, in every runtime; what is longer loses its beginning."""
_MAX_NEW_TOKENS = 256
_ITEMS_AT_ONCE = 64


def import_harness() -> Any:
    """The lm_eval package.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.evaluator
        import lm_eval.tasks
    except ImportError as error:
        raise MissingExtraError("lm_eval", "eval") from error
    return lm_eval


def harness_model(model: LanguageModel, *, progress: Progress = no_progress) -> Any:
    """An lm_eval.api.model.TemplateLM around a model."""
    # Made here, as its base class is of an optional package.
    adapter: Any = type("Adapter", (_Requests, import_harness().api.model.TemplateLM), {})
    return adapter(model, progress)


class _Requests:
    """What lm_eval asks of a model; its TemplateLM comes after this class and does the rest."""

    def __init__(self, model: LanguageModel, progress: Progress) -> None:
        super().__init__()
        self.model, self.progress = model, progress
        self.tokenizer = model.tokenizer
        self.max_length = min(model.context_length, MAX_CONTEXT)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by."""
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return int(next((number for number in ids if number is not None), 0))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        return encode(self.tokenizer, string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        likelihoods: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[misc]
        return likelihoods

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        pairs = [_cut(context, continuation, self.max_length) for _, context, continuation in requests]
        scores = _score_pairs(self.model, pairs, self.progress)
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pairs, counts = [], []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            disjoint = [make_disjoint_window(window) for window in windows]
            pairs += [(tuple(context), tuple(targets)) for context, targets in disjoint]
            counts.append(len(disjoint))
        scores = iter(_score_pairs(self.model, pairs, self.progress))
        return [sum(next(scores).log_likelihood for _ in range(count)) for count in counts]

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Requests that end alike are written together."""
        alike: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(_ending(request.args[1], self.max_length), []).append(index)
        texts, done = [""] * len(requests), 0
        for (limit, until), indices in alike.items():
            for start in range(0, len(indices), _ITEMS_AT_ONCE):
                part = indices[start : start + _ITEMS_AT_ONCE]
                written = self._write([requests[index].args[0] for index in part], limit, until)
                for index, text in zip(part, written, strict=True):
                    texts[index] = text
                done += len(part)
                self.progress("answering tasks", done, len(requests))
        return texts

    def _write(self, contexts: Sequence[str], limit: int, until: tuple[str, ...]) -> list[str]:
        prompts = [self.tok_encode(context)[-(self.max_length - limit) :] for context in contexts]
        prompts = [ids or [self.prefix_token_id] for ids in prompts]
        answers = self.model.generate(prompts, limit, stop_strings=until)
        texts = [str(self.tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]
        for stop in until:
            texts = [text.partition(stop)[0] for text in texts]
        return texts

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.name).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return render_chat(self.tokenizer, chat_history, add_generation_prompt=add_generation_prompt)


def _ending(settings: Mapping[str, Any], max_length: int) -> tuple[int, tuple[str, ...]]:
    """Most tokens of an answer, and the strings that end it.

    Raises:
        InputError: The task samples.
    """
    if settings.get("do_sample") or float(settings.get("temperature") or 0) > 0:
        raise InputError(
            "tasks that sample are not supported", field="do_sample", value=True, allowed="false"
        )
    until = settings.get("until") or []
    until = [until] if isinstance(until, str) else until
    limit = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or _MAX_NEW_TOKENS)
    return min(limit, max_length - 1), tuple(stop for stop in until if stop)


def _cut(
    context: Sequence[int], continuation: Sequence[int], max_length: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A pair whose tokens but the last fit `max_length`, its beginning left out where it is longer."""
    ids = [*context, *continuation][-(max_length + 1) :]
    start = max(1, len(ids) - len(continuation))
    return tuple(ids[:start]), tuple(ids[start:])


def _score_pairs(
    model: LanguageModel, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], progress: Progress
) -> list[Score]:
    """Scores of (context, continuation) pairs in their order; each distinct context is run once."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (context, _) in enumerate(pairs):
        groups.setdefault(context, []).append(index)
    items = [(Branches(c, tuple(pairs[i][1] for i in indices)), indices) for c, indices in groups.items()]
    items.sort(key=lambda pair: pair[0].n_tokens, reverse=True)
    scores: list[Score] = [Score(0.0, False)] * len(pairs)
    done = 0
    for start in range(0, len(items), _ITEMS_AT_ONCE):
        part = items[start : start + _ITEMS_AT_ONCE]
        for (_, indices), item_scores in zip(part, model.score([item for item, _ in part]), strict=True):
            for index, score in zip(indices, item_scores, strict=True):
                scores[index] = score
            done += len(indices)
        progress("scoring choices", done, len(pairs))
    return scores
